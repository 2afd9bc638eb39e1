"""What servers say, and what it means to us."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from ckptstore.blob.refusals import Refusal
from ckptstore.errors import (
    CheckpointExistsError,
    ConfigError,
    CredentialsError,
    NoSpaceError,
    NoStoreError,
    NotFoundError,
    StorageError,
    TransientError,
)


def _error(code: str, status: int, **headers: str) -> StorageError | ConfigError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Refusal("write k", code, status, "The server's words.", "bkt", "http://host", "k", named).error()


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("NoSuchBucket", 404, NoStoreError),
        ("NoSuchKey", 404, NotFoundError),
        ("404", 404, NotFoundError),
        ("", 404, NotFoundError),
        ("NoSuchUpload", 404, StorageError),
        ("PreconditionFailed", 412, CheckpointExistsError),
        ("412", 412, CheckpointExistsError),
        ("FileAlreadyExists", 409, CheckpointExistsError),
        ("AccessDenied", 403, CredentialsError),
        ("403", 403, CredentialsError),
        ("401", 401, CredentialsError),
        ("UserDisable", 403, CredentialsError),
        ("InvalidToken", 400, CredentialsError),
        ("RequestTimeTooSkewed", 403, CredentialsError),
        ("QuotaExceeded", 403, NoSpaceError),
        ("XMinioStorageFull", 507, NoSpaceError),
        ("PermanentRedirect", 301, ConfigError),
        ("SecondLevelDomainForbidden", 403, ConfigError),
        ("KMS.DisabledException", 400, ConfigError),
        ("NotImplemented", 501, StorageError),
        ("EntityTooLarge", 400, StorageError),
        ("InvalidObjectState", 403, StorageError),
        ("MalformedXML", 400, StorageError),
    ],
)
def test_a_permanent_refusal_gets_its_own_class_when_read(code: str, status: int, expected: type[StorageError]) -> None:
    assert type(_error(code, status)) is expected


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("SlowDown", 503, "throttled"),
        ("503", 503, "server_error"),
        ("TooManyRequests", 429, "throttled"),
        ("429", 429, "throttled"),
        ("InternalError", 500, "server_error"),
        ("InternalError", 200, "server_error"),
        ("502", 502, "server_error"),
        ("504", 504, "server_error"),
        ("ConditionalRequestConflict", 409, "server_error"),
        ("RequestTimeout", 400, "timeout"),
        ("BadDigest", 400, "damaged"),
        ("InvalidDigest", 400, "damaged"),
        ("XAmzContentSHA256Mismatch", 400, "damaged"),
        ("ExpiredToken", 400, "expired"),
        ("SecurityTokenExpired", 403, "expired"),
    ],
)
def test_a_passing_refusal_names_its_reason_when_read(code: str, status: int, reason: str) -> None:
    error = _error(code, status)
    assert type(error) is TransientError
    assert error.context["reason"] == reason


@pytest.mark.parametrize(
    "code", ["NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "QuotaExceeded", "PermanentRedirect"]
)
def test_a_sentence_names_the_place_and_the_way_out_when_somebody_must_act(code: str) -> None:
    error = _error(code, 403)
    assert "bkt" in error.message
    assert "http://host" in error.message
    assert error.hint
    assert error.context["bucket"] == "bkt"
    assert not error.message.endswith(".")


@pytest.mark.parametrize(("value", "expected"), [("7", 7.0), ("0.5", 0.5), ("soon", None), ("-1", None), ("1e9", None)])
def test_retry_after_is_passed_on_when_it_makes_sense(value: str, expected: float | None) -> None:
    assert _error("SlowDown", 503, retry_after=value).context.get("retry_after_s") == expected


@pytest.mark.parametrize(("minutes", "words"), [(30, "behind"), (-30, "ahead")])
def test_the_clocks_offset_is_named_when_the_server_tells_its_time(minutes: int, words: str) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(minutes=minutes), usegmt=True)
    message = _error("RequestTimeTooSkewed", 403, date=date).message
    assert words in message
    assert any(f"{seconds} s" in message for seconds in range(1795, 1806))
    assert "clock" in _error("RequestTimeTooSkewed", 403, date="no date").message
