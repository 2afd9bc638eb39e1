"""The door to boto3: a client made from a URL and an environment, and its errors in our words."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ckptstore._version import __version__
from ckptstore.blob.address import Address
from ckptstore.blob.bucket import md5_base64
from ckptstore.blob.proxies import proxies_of
from ckptstore.blob.refusals import Refusal, unreachable
from ckptstore.errors import CkptError, ConfigError, CredentialsError, TransientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_TIMEOUT_S = 10
#: What servers say to keys that are not valid, or no more.
_UNKNOWN = ("InvalidAccessKeyId",)
#: Endpoints that know virtual-hosted addressing only (Alibaba, Tencent, Volcano).
_VIRTUAL_ONLY = (".aliyuncs.com", ".myqcloud.com", ".volces.com")


class S3Connection:
    """Requests to one bucket. Thread-safe.

    Args:
        address: The URL: endpoint, region, addressing, profile, checksum.
        environ: Where ``AWS_*`` is looked up; None: the process's environment and boto3's default chain.
        read_timeout_s: Longest silence of the server.
    """

    def __init__(self, address: Address, bucket: str, environ: Mapping[str, str] | None, read_timeout_s: float) -> None:
        self.bucket = bucket
        self._address = address
        self._environ = environ
        self._read_timeout_s = read_timeout_s
        self._checksum = address.choice("checksum", ("auto", "md5", "crc32", "none"), "auto")
        self._addressing: Any = address.choice("addressing", ("path", "virtual", "auto"), "auto")
        self._check_endpoint(address.params.get("endpoint"))
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._retired: list[S3Client] = []
        self._used = self._keys()
        #: A request has succeeded, so the bucket exists.
        self.has_succeeded = False

    @property
    def host(self) -> str:
        """Of the endpoint; "" for Amazon's own."""
        return urlsplit(self._endpoint() or "").hostname or ""

    def close(self) -> None:
        """Close the clients' sockets; idempotent. A later request connects anew."""
        with self._lock:
            clients = [*self._retired, *([self._client] if self._client else [])]
            self._client, self._retired = None, []
        for client in clients:
            client.close()

    @contextlib.contextmanager
    def request(self, what: str, key: str) -> Iterator[S3Client]:
        """A client whose errors, raised in the body of the ``with``, come out as ours."""
        client = self._connected()
        try:
            yield client
        except CkptError:
            raise
        except Exception as error:
            ours = self._translate(error, what, key)
            if ours is None:
                raise
            if ours.context.get("reason") == "expired":
                self._forget(client)
            raise ours from error
        self.has_succeeded = True

    def _translate(self, error: Exception, what: str, key: str) -> CkptError | None:
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        place: dict[str, Any] = {"bucket": self.bucket, "endpoint": self._shown_endpoint(), "key": key}
        name = type(error).__name__
        if isinstance(error, boto.ClientError):
            said = error.response.get("Error", {})
            metadata = error.response.get("ResponseMetadata", {})
            code, status = str(said.get("Code", "")), int(metadata.get("HTTPStatusCode", 0))
            if code in _UNKNOWN and (self._is_temporary() or self._used != self._keys()):
                # Some servers know an expired session token no more than an invented one; and there may be others.
                code = "ExpiredToken"
            refusal = self.refusal(what, key, code, status, said.get("Message", ""), metadata.get("HTTPHeaders"))
            return refusal.error()
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)):
            return CredentialsError(
                f"there are no usable credentials for bucket {self.bucket} at {place['endpoint']}: {error}",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role",
                **place,
            )
        if isinstance(error, (boto.TokenRetrievalError, boto.SSOError)):
            return CredentialsError(f"could not {what}: {error}", hint="log in again: aws sso login", **place)
        if isinstance(error, boto.ProfileNotFound):
            return ConfigError(f"could not {what}: {error}", hint="see ~/.aws/config", **place)
        if isinstance(error, boto.SSLError):
            return ConfigError(
                f"could not {what}: TLS with {place['endpoint']} failed: {error}",
                hint="set AWS_CA_BUNDLE to the certificate of a private CA",
                **place,
            )
        if isinstance(error, (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)):
            return unreachable(what, error, place)
        if isinstance(error, boto.ReadTimeoutError):
            return TransientError(
                f"could not {what}: {place['endpoint']} did not answer in time", reason="timeout", **place
            )
        if isinstance(error, (boto.HTTPClientError, boto.IncompleteReadError, ResponseParserError, HTTPError)):
            return TransientError(
                f"could not {what}: the connection to {place['endpoint']} broke ({name})", reason="cut_off", **place
            )
        if isinstance(error, (boto.BotoCoreError, ValueError)):
            return ConfigError(f"could not {what} in bucket {self.bucket}: {error}", **place)
        return None

    def refusal(
        self, what: str, key: str, code: str, status: int, detail: str = "", headers: Mapping[str, str] | None = None
    ) -> Refusal:
        """What the server said, ready to become an error."""
        return Refusal(what, code, status, detail, self.bucket, self._shown_endpoint(), key, headers)

    def guard(self, client: S3Client, payload: bytes | bytearray) -> dict[str, Any]:
        """The header by which the server knows that a body arrived as it was sent."""
        if self._checksum == "crc32":  # with "auto" on Amazon the SDK sees to it
            return {"ChecksumCRC32": base64.b64encode(zlib.crc32(payload).to_bytes(4, "big")).decode()}
        if self.dialect(client) == "Content-MD5":
            return {"ContentMD5": md5_base64(payload)}
        return {}

    def dialect(self, client: S3Client) -> str | None:
        """The header in which uploads carry their checksum; None: they carry none."""
        if self._checksum == "none":
            return None
        is_md5 = self._checksum == "md5" or (self._checksum == "auto" and not _is_amazon(client.meta.endpoint_url))
        return "Content-MD5" if is_md5 else "x-amz-checksum-crc32"

    def declared(self) -> dict[str, Any]:
        """What an upload in parts must say beforehand about :meth:`guard`."""
        return {"ChecksumAlgorithm": "CRC32"} if self._checksum == "crc32" else {}

    def _connected(self) -> S3Client:
        with self._lock:
            if self._client is None:
                self._used = self._keys()
                self._client = self._connect()
            return self._client

    def _forget(self, client: S3Client) -> None:
        """Read the credentials anew at the next request; others may still be using this client."""
        with self._lock:
            if self._client is client:
                self._retired.append(client)
                self._client = None

    def _connect(self) -> S3Client:
        import boto3
        from botocore import exceptions as boto

        given = self._environ if self._environ is not None else {}
        profile = self._address.params.get("profile") or given.get("AWS_PROFILE")
        keys: dict[str, str | None] = {}
        if given.get("AWS_ACCESS_KEY_ID") and not self._address.params.get("profile"):
            if not given.get("AWS_SECRET_ACCESS_KEY"):
                raise CredentialsError(
                    f"there is an access key for bucket {self.bucket}, but no secret",
                    hint="set AWS_SECRET_ACCESS_KEY as well",
                    bucket=self.bucket,
                )
            keys = {
                "aws_access_key_id": given["AWS_ACCESS_KEY_ID"],
                "aws_secret_access_key": given["AWS_SECRET_ACCESS_KEY"],
                "aws_session_token": given.get("AWS_SESSION_TOKEN") or None,
            }
            profile = None
        region = self._address.params.get("region") or given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION")
        try:
            session = boto3.Session(profile_name=profile, region_name=region or os.environ.get("AWS_REGION"), **keys)  # type: ignore[arg-type]
            client = self._client_of(session, self._endpoint())
            actual = client.meta.endpoint_url
            if self._endpoint() is None and not _is_amazon(actual):  # the profile's own endpoint
                client.close()
                client = self._client_of(session, actual)
        except (boto.BotoCoreError, ValueError) as error:
            raise self._translate(error, "open the store", "") or error from error
        return client

    def _client_of(self, session: Any, endpoint: str | None) -> S3Client:
        from botocore.config import Config

        is_amazon = endpoint is None or _is_amazon(endpoint)
        checksums: Literal["when_supported", "when_required"] = "when_supported" if is_amazon else "when_required"
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=self._read_timeout_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=64,
            tcp_keepalive=True,
            s3={
                "addressing_style": self._addressing_of(endpoint),
                # The checksum header is signed and covers the body: no need to hash it again for the signature.
                **({} if is_amazon or self._checksum == "none" else {"payload_signing_enabled": False}),
            },
            proxies=self._proxies(endpoint),
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            user_agent_extra=f"ckptstore/{__version__}",
        )
        region = session.region_name or (None if is_amazon else "us-east-1")
        bundle = (self._environ or {}).get("AWS_CA_BUNDLE")
        client: S3Client = session.client("s3", endpoint_url=endpoint, region_name=region, verify=bundle, config=config)
        if not is_amazon:
            client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
        return client

    def _proxies(self, endpoint: str | None) -> dict[str, str] | None:
        """None: those of the process."""
        host = (urlsplit(endpoint).hostname or "") if endpoint is not None else "s3.amazonaws.com"
        if host in ("localhost", "127.0.0.1", "::1"):
            return {}
        return None if self._environ is None else proxies_of(self._environ, host)

    def _addressing_of(self, endpoint: str | None) -> Literal["path", "virtual", "auto"]:
        if self._addressing != "auto" or endpoint is None or _is_amazon(endpoint):
            return self._addressing  # type: ignore[no-any-return]
        return "virtual" if (urlsplit(endpoint).hostname or "").endswith(_VIRTUAL_ONLY) else "path"

    def _endpoint(self) -> str | None:
        given = os.environ if self._environ is None else self._environ
        return (
            self._address.params.get("endpoint")
            or given.get("AWS_ENDPOINT_URL_S3")
            or given.get("AWS_ENDPOINT_URL")
            or None
        )

    def _check_endpoint(self, endpoint: str | None) -> None:
        if endpoint is not None:
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise self._address.refuse(f"has endpoint={endpoint}", hint="write endpoint=https://HOST[:PORT]")

    def _shown_endpoint(self) -> str:
        endpoint = self._endpoint()
        return urlsplit(endpoint)._replace(query="").geturl().rpartition("@")[2] if endpoint else "Amazon S3"

    def _keys(self) -> tuple[str | None, ...]:
        """The credentials that the environment holds at present."""
        given = os.environ if self._environ is None else self._environ
        return tuple(given.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))

    def _is_temporary(self) -> bool:
        given = os.environ if self._environ is None else self._environ
        return bool(given.get("AWS_SESSION_TOKEN"))


def _is_amazon(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """DeleteObjects needs a checksum; the SDK sends a CRC that older servers don't take for one."""
    params["headers"]["Content-MD5"] = md5_base64(params["body"])
