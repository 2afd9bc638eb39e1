"""OSS's request signatures as the service checks them: V4 and V1, with dates and temporary credentials.

Written from the protocol, not from a client: both sides sharing a mistake would prove nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from urllib.parse import quote

_MAX_SKEW = timedelta(minutes=15)
_V4 = re.compile(
    r"OSS4-HMAC-SHA256 Credential=(?P<key>[^/,\s]+)/(?P<date>\d{8})/(?P<region>[^/,\s]+)/oss/aliyun_v4_request,\s*"
    r"(?:AdditionalHeaders=(?P<additional>[^,\s]*),\s*)?Signature=(?P<signature>[0-9a-f]{64})\Z"
)
_V1 = re.compile(r"OSS (?P<key>[^:\s]+):(?P<signature>[A-Za-z0-9+/=]+)\Z")
#: Query parameters that V1 signs. Source: "Include signatures in the Authorization header", OSS developer guide.
_V1_PARAMS = frozenset(
    {"uploads", "uploadId", "partNumber", "delete", "continuation-token", "security-token", "bucketInfo"}
)


@dataclass(frozen=True)
class Account:
    """An access key; temporary if it has a token."""

    access_key: str
    secret: str
    token: str = ""
    expires: datetime | None = None


@dataclass(frozen=True)
class Request:
    """A request as it came in; header names in lower case, key and query decoded."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


class Refused(Exception):  # noqa: N818 - it is an answer
    """An error that the service answers."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message


def check_signature(request: Request, accounts: Mapping[str, Account], region: str, now: datetime) -> None:
    """Accept a request or refuse it.

    Raises:
        Refused: who signed is not known, no longer, or didn't sign this, now, for this region.
    """
    authorization = request.headers.get("authorization", "")
    if match := _V4.match(authorization):
        account = _account(request, accounts, match["key"], now)
        _check_time(_v4_time(request), now)
        if match["region"] != region or not request.headers["x-oss-date"].startswith(match["date"]):
            raise Refused(400, "InvalidArgument", "Invalid signing region or date in Authorization header.")
        expected = v4_signature(request, account.secret, match["date"], match["region"], match["additional"] or "")
    elif match := _V1.match(authorization):
        account = _account(request, accounts, match["key"], now)
        _check_time(_v1_time(request), now)
        expected = v1_signature(request, account.secret)
    elif authorization:
        raise Refused(400, "InvalidArgument", "The Authorization header is malformed.")
    else:
        raise Refused(403, "AccessDenied", "You have no right to access this object because of bucket acl.")
    if not hmac.compare_digest(expected, match["signature"]):
        raise Refused(
            403,
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check your key and method.",
        )


def v4_signature(request: Request, secret: str, date: str, region: str, additional: str) -> str:
    """Hex HMAC-SHA256 by the key chain date, region, product, request."""
    signed = {"content-type", "content-md5", *filter(None, additional.split(";"))}
    headers = sorted(item for item in request.headers.items() if item[0].startswith("x-oss-") or item[0] in signed)
    query = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in request.query.items())
    canonical = "\n".join(
        [
            request.method,
            quote(f"/{request.bucket}/{request.key}", safe="/~"),
            "&".join(f"{name}={value}" if value else name for name, value in query),
            "".join(f"{name}:{value.strip()}\n" for name, value in headers),
            additional,
            request.headers.get("x-oss-content-sha256", ""),
        ]
    )
    scope = f"{date}/{region}/oss/aliyun_v4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"OSS4-HMAC-SHA256\n{request.headers['x-oss-date']}\n{scope}\n{digest}"
    key = f"aliyun_v4{secret}".encode()
    for step in (date, region, "oss", "aliyun_v4_request"):
        key = hmac.digest(key, step.encode(), "sha256")
    return hmac.digest(key, to_sign.encode(), "sha256").hex()


def v1_signature(request: Request, secret: str) -> str:
    """Base64 HMAC-SHA1."""
    headers = sorted(item for item in request.headers.items() if item[0].startswith("x-oss-"))
    params = sorted((name, value) for name, value in request.query.items() if name in _V1_PARAMS)
    resource = f"/{request.bucket}/{request.key}"
    if params:
        resource += "?" + "&".join(f"{name}={value}" if value else name for name, value in params)
    to_sign = "\n".join(
        [
            request.method,
            request.headers.get("content-md5", ""),
            request.headers.get("content-type", ""),
            request.headers.get("x-oss-date") or request.headers.get("date", ""),
            "".join(f"{name}:{value}\n" for name, value in headers) + resource,
        ]
    )
    return base64.b64encode(hmac.digest(secret.encode(), to_sign.encode(), "sha1")).decode()


def _account(request: Request, accounts: Mapping[str, Account], access_key: str, now: datetime) -> Account:
    account = accounts.get(access_key)
    token = request.headers.get("x-oss-security-token", "")
    if account is None or bool(token) != bool(account.token):
        raise Refused(403, "InvalidAccessKeyId", "The OSS Access Key Id you provided does not exist in our records.")
    if token != account.token:
        raise Refused(403, "InvalidSecurityToken", "The security token you provided is invalid.")
    if account.expires is not None and now >= account.expires:
        raise Refused(403, "SecurityTokenExpired", "The security token you provided has expired.")
    return account


def _v4_time(request: Request) -> datetime | None:
    try:
        return datetime.strptime(request.headers.get("x-oss-date", ""), "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    except ValueError:
        return None


def _v1_time(request: Request) -> datetime | None:
    try:
        return parsedate_to_datetime(request.headers.get("x-oss-date") or request.headers.get("date", ""))
    except ValueError:
        return None


def _check_time(signed: datetime | None, now: datetime) -> None:
    if signed is None:
        raise Refused(403, "AccessDenied", "A valid date is required.")
    if abs(now - signed) > _MAX_SKEW:
        raise Refused(
            403, "RequestTimeTooSkewed", "The difference between the request time and the server's is too large."
        )
