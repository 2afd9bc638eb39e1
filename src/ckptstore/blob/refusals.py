"""What an object store's error code means: one table for S3 and OSS, and a plain sentence for each row."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ckptstore.clock import SYSTEM_CLOCK
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

_THROTTLED = frozenset(
    {
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "TotalQpsLimitExceeded",
        "UploadTrafficRateLimitExceeded",
        "DownloadTrafficRateLimitExceeded",
        "QpsLimitExceeded",
    }
)
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "SecurityTokenExpired"})
_DAMAGED = frozenset(
    {
        "BadDigest",
        "InvalidDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
        "ChecksumMismatch",
        "IncompleteBody",
    }
)
_AGAIN = frozenset({"ConditionalRequestConflict", "OperationAborted", "InternalError", "ServiceUnavailable"})
_WRONG_KEYS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "AuthFailure",
        "UnrecognizedClientException",
        "InvalidClientTokenId",
        "InvalidSecurityToken",
    }
)
_DENIED = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "AccountProblem",
        "UserDisable",
        "Forbidden",
        "Unauthorized",
        "AccessForbidden",
    }
)
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_FULL = frozenset(
    {
        "QuotaExceeded",
        "QuotaExceed",
        "InsufficientStorage",
        "XMinioStorageFull",
        "XMinioAdminBucketQuotaExceeded",
        "StorageQuotaExceeded",
        "InsufficientCapacity",
    }
)
_ELSEWHERE = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "InvalidBucketName",
        "InvalidRegion",
        "SecondLevelDomainForbidden",
    }
)
_EXISTS = frozenset({"PreconditionFailed", "FileAlreadyExists"})


def unreachable(what: str, error: BaseException, place: Mapping[str, Any]) -> TransientError:
    """The error to raise where no connection to ``place["endpoint"]`` could be made, because of ``error``."""
    where, hint = f"{place['endpoint']} can't be reached", "is it running?"
    if is_unknown_name(error):
        where = f"the name of {place['endpoint']} can't be resolved"
        hint = "check the endpoint's spelling, and this machine's DNS"
    return TransientError(f"could not {what}: {where}", reason="unreachable", hint=hint, **place)


def is_unknown_name(error: BaseException | None) -> bool:
    """Whether a host that nobody can resolve is at the bottom of it."""
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None


@dataclass(frozen=True)
class Refusal:
    """An answer that isn't success.

    Attributes:
        what: What was being done, as in "could not <what>".
        code: The server's error code; "" if it gave none (HEAD).
        detail: The server's own sentence.
        headers: Its response headers, names in lower case.
    """

    what: str
    code: str
    status: int
    detail: str
    bucket: str
    endpoint: str
    key: str = ""
    headers: Mapping[str, str] | None = None

    def error(self) -> StorageError | ConfigError:
        """The error to raise."""
        context: dict[str, Any] = {
            "bucket": self.bucket,
            "endpoint": self.endpoint,
            "key": self.key,
            "code": self.code,
            "status": self.status,
        }
        place = f"bucket {self.bucket} at {self.endpoint}"
        said = self.detail.strip().rstrip(".") or f"status {self.status}"
        message = f"could not {self.what}: {place} says {self.code or self.status}: {said}"
        code, status = self.code, self.status
        if code == "NoSuchBucket":
            return NoStoreError(
                f"there is no bucket {self.bucket} at {self.endpoint}",
                hint="check the name, the endpoint and the region; buckets are not created for you",
                **context,
            )
        if code in _EXPIRED:
            return TransientError(
                f"could not {self.what}: the credentials for {place} have expired", reason="expired", **context
            )
        if code in _SKEWED:
            return self._skewed(place, context)
        if code in _WRONG_KEYS:
            return CredentialsError(
                f"{place} does not accept the credentials ({code})",
                hint="check the access key, the secret and, for temporary ones, the session token; "
                "and that they belong to this endpoint",
                **context,
            )
        if code in _EXISTS or status == 412:
            return CheckpointExistsError(f"could not {self.what}: the object exists already", **context)
        if code in _FULL or status == 507:
            return NoSpaceError(message, hint="raise the quota or delete checkpoints with `ckptctl delete`", **context)
        if code in _ELSEWHERE or status == 301:
            return ConfigError(message, hint="set region= and endpoint= of the URL to where the bucket is", **context)
        if code.startswith("KMS."):
            return ConfigError(message, hint="check kms_key= in the URL and the rights to use that key", **context)
        if code in _THROTTLED or status == 429:
            return TransientError(message, reason="throttled", **self._retry_after(), **context)
        if code in _DAMAGED:
            return TransientError(f"{message}; the bytes changed on the way", reason="damaged", **context)
        if code == "RequestTimeout" or status == 408:
            return TransientError(message, reason="timeout", **context)
        if code in _AGAIN or (status >= 500 and status != 501):
            return TransientError(message, reason="server_error", **self._retry_after(), **context)
        if code == "InvalidObjectState":
            return StorageError(message, hint="the object is in an archive class: have it restored first", **context)
        if code in _DENIED or status in (401, 403):
            return CredentialsError(
                message,
                hint="these credentials lack the right to do this here; `ckptctl doctor` says which are needed",
                **context,
            )
        if code == "NoSuchKey" or (status == 404 and code != "NoSuchUpload"):
            return NotFoundError(f"there is no object {self.key} in {place}", **context)
        return StorageError(message, **context)

    def _skewed(self, place: str, context: dict[str, Any]) -> CredentialsError:
        offset = ""
        date = (self.headers or {}).get("date", "")
        try:
            seconds = (SYSTEM_CLOCK.now() - parsedate_to_datetime(date)).total_seconds()
            offset = f", by {abs(seconds):.0f} s {'ahead' if seconds > 0 else 'behind'}"
        except (ValueError, TypeError):
            pass
        return CredentialsError(
            f"could not {self.what}: this machine's clock differs from that of {place}{offset}",
            hint="set the clock (for example: timedatectl set-ntp true); requests are signed with the time",
            **context,
        )

    def _retry_after(self) -> dict[str, Any]:
        try:
            seconds = float((self.headers or {}).get("retry-after", ""))
        except ValueError:
            return {}
        return {"retry_after_s": seconds} if 0 <= seconds < 3600 else {}
