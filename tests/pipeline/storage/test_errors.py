"""Every client's exception for the same answer of a store becomes one error with its remedy, without the answer's body."""

from __future__ import annotations

import errno
import re
from typing import Any

import botocore.exceptions
import obstore.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from masklake.model.errors import MaskLakeError
from masklake.pipeline.errors import AccessDeniedError, InputNotFoundError, StorageError
from masklake.pipeline.labelling import run_output
from masklake.pipeline.storage.errors import fault, of_the_machine, reason_of, translate
from masklake.pipeline.storage.storage import Storage
from masklake.pipeline.table.table import Table

SECRET = "AKIASECRET"
XML = "<?xml version='1.0'?><Error><Code>{code}</Code><AWSAccessKeyId>" + SECRET + "</AWSAccessKeyId></Error>"


def by_obstore(status: int, code: str) -> Exception:
    answer = f"Server returned non-2xx status code: {status} Some Phrase: {XML.format(code=code)}"
    return obstore.exceptions.GenericError(f"Generic S3 error: Error performing GET http://h/b/k in 1ms - {answer}")


def by_deltalake(status: int, code: str) -> Exception:
    arrow = "\n          \x1b[31m↳\x1b[0m "
    return OSError(
        f"Kernel error -> Generic S3 error{arrow}Error performing GET http://h/b/k in 1ms - Server returned non-2xx status code"
        f"{arrow}{status} Some Phrase{arrow}{XML.format(code=code)}"
    )


def by_pyarrow(status: int, code: str) -> Exception:
    return OSError(
        f"When creating key 'f/' in bucket 'b': AWS Error UNKNOWN (HTTP status {status}) during PutObject operation: "
        f"Unable to parse ExceptionName: {code} Message: m"
    )


def by_botocore(status: int, code: str) -> Exception:
    answer = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "ListObjectsV2")


@pytest.mark.parametrize("client", [by_obstore, by_deltalake, by_pyarrow, by_botocore])
@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (403, "ExpiredToken", AccessDeniedError, r"credentials have expired .*aws sso login"),
        (400, "ExpiredToken", AccessDeniedError, r"credentials have expired .*aws sso login"),
        (400, "InvalidToken", AccessDeniedError, r"session token is not .*AWS_SESSION_TOKEN"),
        (403, "InvalidAccessKeyId", AccessDeniedError, r"does not know the access key .*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", AccessDeniedError, r"secret key does not belong .*AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", AccessDeniedError, r"clock .*set the clock"),
        (403, "AccessDenied", AccessDeniedError, r"access denied .*the policy"),
        (403, "InvalidObjectState", StorageError, r"archive tier .Glacier. .*restore it first"),
        (301, "PermanentRedirect", StorageError, r"another region .*AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", StorageError, r"another region .*AWS_REGION"),
        (404, "NoSuchBucket", InputNotFoundError, r"no such bucket .*its name"),
        (507, "XMinioStorageFull", StorageError, r"is full.*free some space"),
        (501, "NotImplemented", StorageError, r"does not implement .*docs/labelling"),
        (503, "SlowDown", StorageError, r"overloaded or out of order.*when it has recovered"),
        (500, "InternalError", StorageError, r"overloaded or out of order"),
        (400, "KMS.DisabledException", AccessDeniedError, r"key that encrypts .*KMS"),
        (403, "AccountProblem", AccessDeniedError, r"suspended the account"),
        (400, "InvalidArgument", StorageError, r"400 Bad Request InvalidArgument; the documentation of the store"),
    ],
)
def test_one_answer_has_one_meaning(client: Any, status: int, code: str, kind: type[MaskLakeError], said: str) -> None:
    error = translate(client(status, code), "s3://b/k")
    assert type(error) is kind
    assert str(error).startswith("s3://b/k: ")
    assert re.search(said, str(error))
    assert f"{status} " in str(error)
    assert code in str(error)
    assert SECRET not in str(error)
    assert "\n" not in str(error)
    assert getattr(error, "may_pass", False) is (status in (500, 503))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: m", "InvalidAccessKeyId"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: m", "SignatureDoesNotMatch"),
        ("AWS Error REQUEST_TIME_TOO_SKEWED during PutObject operation: m", "RequestTimeTooSkewed"),
        ("AWS Error [code 136] during PutObject operation: m", "InvalidObjectState"),
        ("AWS Error NO_SUCH_BUCKET during PutObject operation: m", "NoSuchBucket"),
        ("AWS Error SLOW_DOWN during PutObject operation: m", "SlowDown"),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Couldn't connect to server", None),
    ],
)
def test_pyarrows_own_names(text: str, code: str | None) -> None:
    assert fault(OSError(text)).code == code


def test_a_name_that_no_bucket_can_have_is_told() -> None:
    error = botocore.exceptions.ParamValidationError(report='Invalid bucket name "a b!": Bucket name must match the regex')
    told = translate(error, "s3://a b!/k")
    assert (type(told), str(told)) == (InputNotFoundError, "s3://a b!/k: no bucket can have this name; check it")


def test_a_lost_connection_may_pass_and_a_local_disk_does_not() -> None:
    refused = obstore.exceptions.GenericError("Generic S3 error: HTTP error: error sending request (os error 111)")
    assert getattr(translate(refused, "s3://b/k"), "may_pass", None) is True
    full = translate(OSError(errno.ENOSPC, "No space left on device"), "/data/k")
    assert getattr(full, "may_pass", None) is False
    assert str(full) == "/data/k: no space left on the disk; free some space and start the same command again"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (FileExistsError(errno.EEXIST, "File exists"), InputNotFoundError, "is a file where a folder is needed"),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, "read-only"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError, "quota"),
        (OSError(errno.EIO, "Input/output error"), StorageError, "Input/output error; check the path and the disk"),
        (OSError("Generic LocalFileSystem error\n  ↳ No space left on device (os error 28)"), StorageError, "no space left"),
        (OSError("Cannot open for reading: path '/k' is a directory"), InputNotFoundError, "is a folder"),
    ],
)
def test_local_trouble_in_any_clients_words(error: Exception, kind: type[MaskLakeError], said: str) -> None:
    told = translate(error, "/data/k")
    assert type(told) is kind
    assert said in str(told)
    assert "endpoint" not in str(told)


def test_words_without_an_answer_are_kept_to_one_line() -> None:
    assert (
        reason_of(OSError("Generic S3 error\n          \x1b[31m↳\x1b[0m timed out")) == "OSError: Generic S3 error: timed out"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("ExpiredToken", AccessDeniedError, "credentials have expired"),
        ("InvalidObjectState", StorageError, "archive tier"),
        ("AccessDenied", AccessDeniedError, "access denied"),
    ],
)
def test_a_refusal_without_its_reason_is_asked_for_it(
    s3: Any, s3_proxy: Any, code: str, kind: type[MaskLakeError], said: str
) -> None:
    """The answer to a HEAD has no body, and pyarrow drops the body of a refused GET."""
    storage = Storage()
    table = Table(storage, s3.uri("table"))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_id": [0]}), sink)
    s3.put("table/run=r/driver-1.parquet", sink.getvalue().to_pybytes())
    for methods in (("GET", "HEAD"), ("GET",)):
        s3_proxy.clear()
        for method in methods:
            s3_proxy.answer(403, code, method, "driver-1")
        with pytest.raises(kind, match=said):
            run_output.finished(table, "r")
    s3_proxy.answer(403, code, "HEAD", "driver-1")
    with pytest.raises(kind, match=said):
        storage.stat(s3.uri("table/run=r/driver-1.parquet"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "denied", "/a/b"), (AccessDeniedError, "/a/b: permission denied")),
        (OSError(errno.ENOSPC, "full", b"/a/b"), (StorageError, "/a/b: no space left")),
        (OSError(errno.ENOSPC, "full"), (StorageError, "standard output or a temporary file (TMPDIR): no space left")),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            (StorageError, "No usable temporary directory found in ['/tmp']; free some space, or set TMPDIR"),
        ),
    ],
)
def test_an_error_of_the_machine_is_told(error: OSError, expected: tuple[type[Exception], str]) -> None:
    told = of_the_machine(error)
    assert type(told) is expected[0]
    assert str(told).startswith(expected[1])


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("without a number"),
        OSError(errno.EBADF, "a closed file"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.EBADF, "bad", 7),  # a descriptor's number is no name
        KeyError("bug"),
    ],
)
def test_what_may_be_a_fault_of_ours_is_not_told_as_the_machine_s(error: Exception) -> None:
    assert of_the_machine(error) is None


def test_a_reason_is_one_line() -> None:
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"
