"""Options of storage, from which every client is built."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict

from masklake.model.errors import ConfigError
from masklake.pipeline.storage.fields import StorageFields


class StorageOptions(BaseModel, StorageFields, frozen=True):
    """How storage is accessed. Credentials are not included: they come from the environment or a profile."""

    model_config = ConfigDict(extra="forbid")

    def resolved(self) -> StorageOptions:
        """Returns these options, completed from the environment, so that workers on other hosts reach the same storage. Raises
        ConfigError for an invalid endpoint.
        """
        env = os.environ.get
        endpoint = self.endpoint_url or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL") or None
        if endpoint is not None and not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s:]+)(:\d+)?(/\S*)?", endpoint):
            raise ConfigError(f"the endpoint {endpoint!r} is not a URL; write http://HOST:PORT or https://HOST")
        return self.model_copy(
            update={
                "endpoint_url": endpoint,
                "region": self.region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or None,
                "profile": self.profile or env("AWS_PROFILE") or None,
            }
        )
