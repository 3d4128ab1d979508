"""The options of storage, without pydantic (see `model.fields`)."""

from dataclasses import dataclass
from typing import Annotated

from masklake.model.fields import Option


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StorageFields:
    """How storage is accessed."""

    endpoint_url: Annotated[
        str | None,
        Option(
            "S3 endpoint URL (MinIO, Ceph, R2).",
            default="AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else AWS",
            panel="Storage",
            name="endpoint",
        ),
    ] = None
    region: Annotated[
        str | None, Option("AWS region.", default="AWS_REGION, AWS_DEFAULT_REGION, the profile's, the bucket's")
    ] = None
    profile: Annotated[str | None, Option("A profile of the AWS config files.", default="AWS_PROFILE")] = None
    anonymous: Annotated[bool, Option("Send unsigned requests, for public buckets.")] = False
    connect_timeout_s: Annotated[float, Option("Seconds to open a connection.", gt=0)] = 3.0
    request_timeout_s: Annotated[float, Option("Seconds for a whole request.", gt=0)] = 60.0
    max_retries: Annotated[
        int, Option("Maximum number of retries of a request after a connection error or a 5xx response.", ge=0)
    ] = 3
