"""Alibaba OSS's protocol on loopback, in memory, checked as strictly as the real service checks it.

There is no OSS server to install, so this one stands in: signatures (V4 and V1), dates, temporary credentials,
Content-MD5, virtual-hosted addressing, and the rules of multipart uploads and listings are enforced; what it doesn't
know it refuses with 501 rather than pretend. It serves requests sent to it directly
(``http://127.0.0.1:PORT/bucket/key``, the form that OSS's SDK uses for addresses) and, as an HTTP proxy, those for
``http://bucket.oss-REGION.aliyuncs.com/key``.
"""

from __future__ import annotations

import secrets
import threading
from datetime import timedelta
from types import TracebackType

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.testing.oss_bucket import Answer, DamagedObject, OSSBucket, StoredObject, md5_base64
from ckptstore.testing.oss_http import HTTPServer, handler_for
from ckptstore.testing.oss_signature import Account, Refused, Request, check_signature


class OSSServer:
    """A server with one bucket; a context manager, in threads of this process.

    Args:
        bucket: Made at the start.
        region: Requests signed for another one are refused.
        clock: What it takes for the time.

    Attributes:
        cnames: Host name -> bucket: domains of somebody's own.
        seen: Method and path of the requests so far.
        lifecycle: The bucket's lifecycle configuration, as XML; None: there is none.
    """

    def __init__(self, bucket: str = "ckptstore", region: str = "cn-hangzhou", *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.bucket = bucket
        self.region = region
        self.clock = clock
        self.cnames: dict[str, str] = {}
        self.seen: list[tuple[str, str]] = []
        self.lifecycle: str | None = None
        self.lock = threading.RLock()
        self._buckets = {bucket: OSSBucket(clock)}
        self._main = Account(f"LTAI{secrets.token_hex(8)}", secrets.token_hex(15))
        self._accounts = {self._main.access_key: self._main}
        self._http = HTTPServer(("127.0.0.1", 0), handler_for(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="oss-server", daemon=True)

    @property
    def endpoint(self) -> str:
        """Its own address, which is also that of the proxy."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def public_host(self) -> str:
        """The host name that requests through the proxy are for."""
        return f"oss-{self.region}.aliyuncs.com"

    @property
    def environ(self) -> dict[str, str]:
        """``OSS_*`` for clients, and the proxy for those that use the public host name."""
        return {**_environ_of(self._main), "http_proxy": self.endpoint}

    def url(self, prefix: str = "") -> str:
        """The store URL of a prefix of the bucket, with the bucket in the host name."""
        path = f"{self.bucket}/{prefix}" if prefix else self.bucket
        return f"oss://{path}?endpoint=http://{self.public_host}"

    def url_by_address(self, prefix: str = "") -> str:
        """The same with the bucket in the path, and without the proxy."""
        path = f"{self.bucket}/{prefix}" if prefix else self.bucket
        return f"oss://{path}?endpoint={self.endpoint}&region={self.region}"

    def issue_token(self, lifetime_s: float) -> dict[str, str]:
        """Temporary credentials, as ``OSS_*``."""
        expires = self.clock.now() + timedelta(seconds=lifetime_s)
        account = Account(f"STS.{secrets.token_hex(8)}", secrets.token_hex(15), secrets.token_urlsafe(60), expires)
        with self.lock:
            self._accounts[account.access_key] = account
        return {**_environ_of(account), "http_proxy": self.endpoint}

    def stored(self, key: str) -> StoredObject | None:
        """What the bucket holds under its full key."""
        with self.lock:
            return self._buckets[self.bucket].objects.get(key)

    def damage(self, key: str) -> None:
        """Flip a bit at rest, unnoticed by the server."""
        with self.lock:
            old = self._buckets[self.bucket].objects[key]
            damaged = DamagedObject(bytes([old.body[0] ^ 1]) + old.body[1:], old.etag, old.modified, old.headers)
            damaged.crc_was = old.crc64
            self._buckets[self.bucket].objects[key] = damaged

    def __enter__(self) -> OSSServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.hang_up()
        self._http.server_close()
        self._thread.join(10)

    # -- requests ----------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        """Do what a request asks.

        Raises:
            Refused: the error that the service would answer.
        """
        check_signature(request, self._accounts, self.region, self.clock.now())
        if "content-md5" in request.headers and request.headers["content-md5"] != md5_base64(request.body):
            raise Refused(400, "InvalidDigest", "The Content-MD5 you specified was invalid.")
        if not request.bucket:
            raise Refused(501, "NotImplemented", "Only buckets and objects are served here.")
        if request.method == "PUT" and not request.key and not request.query:
            self._buckets.setdefault(request.bucket, OSSBucket(self.clock))
            return Answer()
        bucket = self._of(request)
        if request.key:
            return bucket.of_object(request)
        if request.method == "GET" and set(request.query) == {"lifecycle"}:
            if self.lifecycle is None:
                raise Refused(404, "NoSuchLifecycle", "The bucket has no lifecycle configuration.")
            return Answer(200, self.lifecycle.encode())
        return bucket.of_bucket(request)

    def bucket_and_key(self, host: str, path: str) -> tuple[str, str]:
        """Where a request goes, by its host name and path."""
        name = host.rpartition(":")[0] or host if not host.startswith("[") else host
        if name in self.cnames:
            return self.cnames[name], path[1:]
        if name.endswith(f".{self.public_host}"):
            return name.removesuffix(f".{self.public_host}"), path[1:]
        if name == "127.0.0.1":
            bucket, _, key = path[1:].partition("/")
            return bucket, key
        if name == self.public_host:
            raise Refused(403, "SecondLevelDomainForbidden", "Put the bucket into the host name.")
        raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")

    def _of(self, request: Request) -> OSSBucket:
        if request.bucket not in self._buckets:
            raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        return self._buckets[request.bucket]


def _environ_of(account: Account) -> dict[str, str]:
    environ = {"OSS_ACCESS_KEY_ID": account.access_key, "OSS_ACCESS_KEY_SECRET": account.secret}
    return {**environ, "OSS_SESSION_TOKEN": account.token} if account.token else environ
