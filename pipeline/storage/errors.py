"""Translates the exceptions of storage clients into MaskLake's errors: what happened, and a remedy that fits.

botocore, obstore, pyarrow and deltalake word the same answer of a store differently. `fault` extracts status and code from any
of them, and `_MEANINGS` contains the meaning of each code. For local files the operating system's error number decides.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import botocore.exceptions
from obstore import exceptions as obstore_errors

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, StorageError

FOREIGN = (obstore_errors.BaseError, OSError, ValueError, botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
"""The exceptions that clients raise for a request that failed (pyarrow and deltalake: OSError)."""


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Context manager that translates an exception of a storage client into MaskLake's error, which names `uri`."""
    try:
        yield
    except MaskLakeError:
        raise
    except FOREIGN as error:
        raise translate(error, uri) from error


def is_vague(error: BaseException) -> bool:
    """Returns whether a refusal contains no reason: the answer to a HEAD has no body, and pyarrow drops that of a GET."""
    found, text = fault(error), str(error)
    if "AWS Error" in text:
        return found.code in (None, "AccessDenied") and bool(re.search(r"ACCESS_DENIED|HTTP status [34]|Failed to flush", text))
    return found.code in (None, "Forbidden") and (found.status in (301, 400, 401, 403) or isinstance(error, PermissionError))


@dataclass(frozen=True)
class Fault:
    """A store's answer. status: the HTTP status. code: the store's own, such as `ExpiredToken`. Each is None if the exception
    does not contain it.
    """

    status: int | None = None
    code: str | None = None

    @property
    def is_refusal(self) -> bool:
        """Whether the store would give the same answer again: a 4xx status, except for those that may pass."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in (408, 409, 412, 429)

    def __str__(self) -> str:
        phrase = f"{self.status} {_PHRASES.get(self.status, '')}".strip() if self.status is not None else None
        return " ".join(filter(None, (phrase, self.code)))


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


_ANSI = re.compile(r"\x1b\[\d+m")
_XML_CODE = re.compile(r"<Code>\s*([\w.]+)")  # KMS.DisabledException
_HTTP_STATUS = re.compile(r"(?:status code|HTTP status)\W*(\d{3})")
_ARROW_CODE = re.compile(r"AWS Error (?:\[code (\d+)\]|([A-Z_]+))")
_ARROW_UNKNOWN = re.compile(r"Unable to parse ExceptionName: ([\w.]+)")
_ARROW_NUMBERS = {"136": "InvalidObjectState"}  # pyarrow has no name for this member of the SDK's list
_ARROW_VAGUE = {"UNKNOWN", "INTERNAL_FAILURE", "NETWORK_CONNECTION"}  # not the store's answer, or not all of it


def fault(error: BaseException) -> Fault:
    """Returns the status and code found in an exception of a storage client."""
    if isinstance(error.__cause__, botocore.exceptions.ClientError):
        error = error.__cause__
    if isinstance(error, botocore.exceptions.ClientError):
        code, status = error.response.get("Error", {}).get("Code"), error.response.get("ResponseMetadata", {})
        return Fault(status.get("HTTPStatusCode"), None if code is None or code.isdigit() else code)
    text = _ANSI.sub("", str(error))
    status_found, code_found = _HTTP_STATUS.search(text), _XML_CODE.search(text) or _ARROW_UNKNOWN.search(text)
    code = code_found.group(1) if code_found else _arrow_code(text)
    if "redirect without LOCATION" in text:
        code = "PermanentRedirect"
    return Fault(int(status_found.group(1)) if status_found else None, code)


def _arrow_code(text: str) -> str | None:
    found = _ARROW_CODE.search(text)
    if found is None or found.group(2) in _ARROW_VAGUE:
        return None
    number, name = found.groups()
    return _ARROW_NUMBERS.get(number) if number else "".join(word.capitalize() for word in name.split("_"))


class Meaning(NamedTuple):
    """The meaning of a code: the class of the error, what happened (empty: the client's own words are used) and the remedy."""

    kind: type[MaskLakeError]
    happened: str
    remedy: str
    may_pass: bool = False

    def error(self, uri: str, cause: BaseException) -> MaskLakeError:
        """Returns the error for `uri`."""
        reason = str(fault(cause))
        happened = f"{self.happened}{f' ({reason})' if reason else ''}" if self.happened else reason_of(cause)
        made = self.kind(f"{uri}: {happened}; {self.remedy}")
        if isinstance(made, StorageError):
            made.may_pass = self.may_pass
        return made


_EXPIRED = Meaning(
    AccessDeniedError,
    "the session's credentials have expired",
    "get new ones (`aws sso login`, or a new AWS_SESSION_TOKEN with its keys) and start the same command again",
)
_FOREIGN_TOKEN = Meaning(
    AccessDeniedError,
    "the session token is not one of this store, or not of these keys",
    "set AWS_SESSION_TOKEN anew together with both keys, or unset it",
)
_WRONG_KEY = Meaning(
    AccessDeniedError,
    "the store does not know the access key",
    "check AWS_ACCESS_KEY_ID or AWS_PROFILE, and whether the endpoint (--endpoint or AWS_ENDPOINT_URL) is the key's own",
)
_WRONG_SECRET = Meaning(
    AccessDeniedError,
    "the secret key does not belong to the access key",
    "check AWS_SECRET_ACCESS_KEY (copied whole, from the same pair as AWS_ACCESS_KEY_ID)",
)
_CLOCK = Meaning(
    AccessDeniedError,
    "this machine's clock and the store's differ too much",
    "set the clock of this machine (NTP) and start the same command again",
)
_ARCHIVED = Meaning(
    StorageError,
    "the object is in an archive tier (Glacier) and cannot be read",
    "restore it first (`aws s3api restore-object`) and start the same command again, or leave it out",
)
_WRONG_REGION = Meaning(StorageError, "the bucket is in another region", "set AWS_REGION to the bucket's region")
_NO_BUCKET = Meaning(InputNotFoundError, "no such bucket", "check its name, the endpoint and the region")
_NO_NAME = Meaning(InputNotFoundError, "no bucket can have this name", "check it")
_NOT_FOUND = Meaning(InputNotFoundError, "not found", "check the path")
_FULL = Meaning(StorageError, "the store is full, or a quota is used up", "free some space and start the same command again")
_BUSY = Meaning(
    StorageError,
    "the store is overloaded or out of order, also when asked again",
    "start the same command again when it has recovered",
    may_pass=True,
)
_LACKS = Meaning(StorageError, "the store does not implement this request", "use a store that does (docs/labelling.md)")
_DENIED = Meaning(
    AccessDeniedError,
    "access denied",
    "check that the AWS_* credentials or the profile are the right ones and have not expired, and the policy",
)
_KEY = Meaning(
    AccessDeniedError,
    "the key that encrypts the bucket cannot be used",
    "ask whoever administers the key (KMS), then start the same command again",
)
_ACCOUNT = Meaning(
    AccessDeniedError,
    "the store has suspended the account",
    "ask whoever administers the account, then start the same command again",
)
_REDIRECTED = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_SPACE = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientCapacity")
_SUSPENDED = ("AccountProblem", "AllAccessDisabled", "NotSignedUp", "UserSuspended", "InvalidPayer")
_PATIENCE = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "TooManyRequests", "Busy")

_MEANINGS: dict[str, Meaning] = {
    **dict.fromkeys(("ExpiredToken", "TokenRefreshRequired", "RequestExpired"), _EXPIRED),
    **dict.fromkeys(("InvalidToken", "InvalidTokenId", "UnrecognizedClient", "InvalidClientTokenId"), _FOREIGN_TOKEN),
    "InvalidAccessKeyId": _WRONG_KEY,
    "SignatureDoesNotMatch": _WRONG_SECRET,
    "RequestTimeTooSkewed": _CLOCK,
    **dict.fromkeys(("InvalidObjectState", "ObjectNotInActiveTierError"), _ARCHIVED),
    **dict.fromkeys(_REDIRECTED, _WRONG_REGION),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), _NO_BUCKET),
    **dict.fromkeys(("NoSuchKey", "ResourceNotFound"), _NOT_FOUND),
    **dict.fromkeys(_SPACE, _FULL),
    **dict.fromkeys(_SUSPENDED, _ACCOUNT),
    **dict.fromkeys(_PATIENCE, _BUSY),
    **dict.fromkeys(("NotImplemented", "MethodNotAllowed"), _LACKS),
}
_BY_STATUS = {301: _WRONG_REGION, 401: _DENIED, 403: _DENIED, 404: _NOT_FOUND, 405: _LACKS, 501: _LACKS, 507: _FULL}

_NO_LOGIN = Meaning(
    AccessDeniedError,
    "the credentials cannot be obtained or renewed",
    "log in again (`aws sso login`), or check the profile and the role",
)
_LOGIN_FAILED = re.compile(
    r"Error when retrieving (?:token|credentials)|Error loading SSO Token|SSO session|Unable to locate cred"
)

_UNKNOWN = Meaning(StorageError, "", "check the endpoint (--endpoint or AWS_ENDPOINT_URL), the region and the network")
_UNREACHABLE = _UNKNOWN._replace(may_pass=True)
_REFUSED = _UNKNOWN._replace(remedy="the documentation of the store says what this code means")


def meaning(error: BaseException) -> Meaning:
    """Returns the meaning of `error`; if it contains no known answer, that the store cannot be reached."""
    if isinstance(error, botocore.exceptions.ParamValidationError) and "bucket name" in str(error):
        return _NO_NAME
    found = fault(error)
    code = found.code and found.code.removesuffix("Exception")
    if code is not None and (known := _MEANINGS.get(code.removeprefix("KMS."))):
        return known
    if code is not None and code.startswith("KMS."):
        return _KEY
    if found.status in _BY_STATUS:
        return _BY_STATUS[found.status]
    if found.status is not None and (found.status >= 500 or found.status == 429):
        return _BUSY
    if isinstance(error, FileNotFoundError):
        return _NOT_FOUND
    if found.code == "AccessDenied" or isinstance(error, _DENIALS):
        return _DENIED
    if _LOGIN_FAILED.search(str(error)):
        return _NO_LOGIN
    if found.status is not None and code is not None:
        return _REFUSED
    return _UNKNOWN if found.status is not None or isinstance(error, ValueError) else _UNREACHABLE


def is_known(error: BaseException) -> bool:
    """Returns whether the store's answer has a specific remedy."""
    return meaning(error) not in (_LACKS, _UNKNOWN, _UNREACHABLE, _REFUSED)


_DENIALS = (PermissionError, obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError)


def translate(error: BaseException, uri: str) -> MaskLakeError:
    """Returns the MaskLakeError for `error`, without request headers or the server's XML."""
    if is_local(uri):
        number = os_error_number(error)
        if number is not None:
            return _translate_local(number, uri)
        if isinstance(error, (OSError, ValueError)):
            return StorageError(f"{uri}: {reason_of(error)}; check the file and the disk, or give another path")
    return meaning(error).error(uri, error)


def is_local(uri: str) -> bool:
    """Returns whether `uri` is a path of this machine's file system."""
    return "://" not in uri.removeprefix("file://")


_OS_ERROR = re.compile(r"\(os error (\d+)\)|Os \{ code: (\d+)|\[errno (\d+)\]")

_NAMED_NUMBERS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    PermissionError: errno.EACCES,
}


def os_error_number(error: BaseException) -> int | None:
    """Returns the operating system's error number, also from a text (deltalake, pyarrow); None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if named := next((number for kind, number in _NAMED_NUMBERS.items() if isinstance(error, kind)), None):
        return named
    found = _OS_ERROR.search(str(error))
    if found:
        return int(next(filter(None, found.groups())))
    return errno.EISDIR if "is a directory" in str(error) else None  # pyarrow's words, without a number


_LOCAL_MEANINGS: dict[int, Meaning] = {
    errno.ENOENT: Meaning(InputNotFoundError, "not found", "check the path"),
    errno.ENOTDIR: Meaning(InputNotFoundError, "is a file where a folder is needed, or lies below one", "check the path"),
    errno.EEXIST: Meaning(InputNotFoundError, "is a file where a folder is needed", "remove it, or give another path"),
    errno.EISDIR: Meaning(InputNotFoundError, "is a folder where a file is needed", "check the path"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        Meaning(AccessDeniedError, "permission denied", "check who owns it, or give another path"),
    ),
    errno.EROFS: Meaning(StorageError, "the file system is read-only", "mount it for writing, or give another path"),
    errno.ENOSPC: Meaning(StorageError, "no space left on the disk", "free some space and start the same command again"),
    errno.EDQUOT: Meaning(StorageError, "the disk quota is used up", "free some space and start the same command again"),
    errno.ENAMETOOLONG: Meaning(StorageError, "the name is too long for this file system", "give a shorter path"),
    errno.EMFILE: Meaning(
        StorageError, "too many open files", "raise the limit (`ulimit -n`) and start the same command again"
    ),
    errno.EFBIG: Meaning(
        StorageError, "the file is larger than allowed", "raise the limit (`ulimit -f`), or give another path"
    ),
    errno.ENOLCK: Meaning(StorageError, "the file system has no locks", "put the table on another file system"),
}


def _translate_local(number: int, uri: str) -> MaskLakeError:
    unknown = Meaning(StorageError, os.strerror(number), "check the path and the disk, or give another path")
    known = _LOCAL_MEANINGS.get(number, unknown)
    return known.kind(f"{uri}: {known.happened}; {known.remedy}")


_NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""Errors of the machine that do not depend on the file; `write` and `tempfile` raise them without a file name."""


def of_the_machine(error: BaseException) -> MaskLakeError | None:
    """Returns the MaskLakeError for an untranslated OSError about this machine's files, or None if it may be a bug of ours.

    Such an error has a number and a file name, or the number of a disk that is full, read-only or failing.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if isinstance(error.filename, (str, bytes)):
        return _translate_local(error.errno, os.fsdecode(error.filename))
    if error.errno in _NAMELESS:
        return _translate_local(error.errno, "standard output or a temporary file (TMPDIR)")
    if error.strerror and error.strerror.startswith("No usable temporary directory"):
        return StorageError(f"{error.strerror}; free some space, or set TMPDIR to a folder that can be written")
    return None


def reason_of(error: BaseException) -> str:
    """Returns one line about an exception of a storage client. It never quotes the answer's body, which may contain an access
    key.
    """
    if answer := str(fault(error)):
        return answer
    text = re.sub(r"\s*↳\s*", ": ", _ANSI.sub("", str(error)))
    first = re.split(r"[\n<]", text, maxsplit=1)[0].strip()
    return f"{type(error).__name__}: {first[:300]}"
