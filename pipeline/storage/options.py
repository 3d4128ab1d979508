"""Options of storage, from which every client is built."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict, Field

from masklake.model.errors import ConfigError


class StorageOptions(BaseModel):
    """Where storage is and who asks. Credentials are no part of it: they come from the environment or a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = Field(
        default=None, description="S3 endpoint (MinIO, Ceph, R2); default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS itself."
    )
    region: str | None = Field(
        default=None, description="Default: AWS_REGION, AWS_DEFAULT_REGION, the profile's, the bucket's."
    )
    profile: str | None = Field(default=None, description="A profile of the AWS config files; default: AWS_PROFILE.")
    anonymous: bool = Field(default=False, description="Send unsigned requests, for public buckets.")
    connect_timeout_s: float = Field(default=3.0, gt=0, description="Seconds to open one connection.")
    request_timeout_s: float = Field(default=60.0, gt=0, description="Seconds for one whole request.")
    max_retries: int = Field(default=3, ge=0, description="Retries of one request after a connection error or a 5xx answer.")

    def resolved(self) -> StorageOptions:
        """Returns these options with the values of the environment filled in, so that a worker elsewhere reaches the same
        storage.
        """
        env = os.environ.get
        endpoint = self.endpoint_url or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None
        if endpoint is not None and not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:]+)(:\d+)?(/\S*)?", endpoint):
            raise ConfigError(f"the endpoint {endpoint!r} is no URL; write http://HOST:PORT or https://HOST")
        return self.model_copy(
            update={
                "endpoint_url": endpoint,
                "region": self.region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
                "profile": self.profile or env("AWS_PROFILE") or None,
            }
        )
