"""Alibaba Cloud OSS: ``oss://bucket/prefix``.

Parameters of the URL, all optional::

    endpoint       http(s)://host[:port]; else $OSS_ENDPOINT, else https://oss-REGION.aliyuncs.com
    region         cn-hangzhou, ...; else $OSS_REGION, else as the endpoint's name says
    cname          true: the endpoint is a domain of one's own, bound to the bucket
    auth           v4 | v1: the version of the signature
    requester_pays true: this account pays for requests and transfer
    storage_class  Standard, IA, Archive, ...
    sse            AES256 | KMS: encryption at rest
    kms_key        id of the key, for sse=KMS
    conditional_put  false: the bucket has versioning, which makes OSS ignore x-oss-forbid-overwrite

Credentials are looked up for each request, so temporary ones can be replaced while an upload runs. oss2 is imported by
the first request. Its CRC, which holds the interpreter's lock, is off; the server's is compared with one of our own.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from ckptstore.blob.address import Address
from ckptstore.blob.base import Attempts, BlobStore, Buffer, Capabilities, ObjectInfo, Trait, once, transport
from ckptstore.blob.keys import check_key, check_prefix, is_key
from ckptstore.blob.multipart import MAX_PART_BYTES, MAX_PARTS, Part, parts_of, send_parts
from ckptstore.blob.oss_traits import CHECKSUMS, addressing, deletes
from ckptstore.blob.ranges import exact_range, past_the_end
from ckptstore.blob.refusals import Refusal
from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
    ConfigError,
    CredentialsError,
    IntegrityError,
    NoStoreError,
    NotFoundError,
    StorageError,
    TransientError,
)

_PARAMS = frozenset(
    {
        "endpoint",
        "region",
        "cname",
        "auth",
        "requester_pays",
        "storage_class",
        "sse",
        "kms_key",
        "conditional_put",
    }
)
_MIB = 1 << 20
#: A pack of the usual 64 MiB, and the frame that closed it, go in one request: packs are sent side by side anyway.
_SINGLE_PUT_BYTES = 80 * _MIB
_DELETE_BATCH = 1000
_PAGE = 1000
_CONNECT_TIMEOUT_S = 10.0
_PUBLIC_HOST = re.compile(r"(?:^|\.)oss-([a-z0-9-]+?)(?:-internal)?\.aliyuncs\.com$")


class OSSBlobStore(BlobStore):
    """A prefix of a bucket.

    Args:
        address: The URL, taken apart.
        environ: Where ``OSS_*`` and proxies are looked up; None: the process's environment.
        attempts: How the single requests of multi-request operations are made.
        single_put_bytes: Larger bodies are sent in parts.
        part_bytes: Least size of a part.
        read_timeout_s: Longest silence of the server.
    """

    scheme = "oss"

    def __init__(
        self,
        address: Address,
        *,
        environ: Mapping[str, str] | None = None,
        attempts: Attempts = once,
        single_put_bytes: int = _SINGLE_PUT_BYTES,
        part_bytes: int = 16 * _MIB,
        read_timeout_s: float = 60.0,
    ) -> None:
        self._bucket, self._prefix = address.bucket_and_prefix(_PARAMS)
        self.url = address.url
        self._environ = environ
        self._attempts = attempts
        self._single_put_bytes = single_put_bytes
        self._part_bytes = part_bytes
        self._read_timeout_s = read_timeout_s
        self._auth = address.choice("auth", ("v4", "v1"), "v4")
        self._is_cname = address.flag("cname")
        self._pays = {"x-oss-request-payer": "requester"} if address.flag("requester_pays") else {}
        self._at_rest = _at_rest(address)
        self._endpoint, self._region = _place(address, os.environ if environ is None else environ)
        self.capabilities = Capabilities(
            conditional_put=address.flag("conditional_put", True),
            max_object_bytes=MAX_PARTS * MAX_PART_BYTES,
        )
        if find_spec("oss2") is None or find_spec("fastcrc") is None:
            raise ConfigError("oss:// needs two more packages", hint="pip install 'ckptstore[oss]'", url=self.url)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._pool: ThreadPoolExecutor | None = None
        self._has_succeeded = False

    @classmethod
    def from_address(
        cls, address: Address, *, environ: Mapping[str, str] | None = None, attempts: Attempts = once
    ) -> OSSBlobStore:
        """Open ``oss://bucket[/prefix][?..]``."""
        return cls(address, environ=environ, attempts=attempts)

    # -- objects -----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        name = self._prefix + check_key(key)
        body = memoryview(data).cast("B")
        is_large = len(body) > self._single_put_bytes
        condition = {"x-oss-forbid-overwrite": "true"} if if_absent and self.capabilities.conditional_put else {}
        if if_absent and (is_large or not condition) and self.head(key) is not None:
            raise CheckpointExistsError(f"{self.url}: {key} exists already", key=key, bucket=self._bucket)
        if is_large:
            self._put_in_parts(key, name, body, condition)
            return
        payload = data if isinstance(data, bytes) else bytes(body)
        headers = {**_TYPE, **self._at_rest, **self._pays, **condition}
        if condition:  # what can't be written a second time is refused before it is stored, should it arrive damaged
            headers["Content-MD5"] = _md5_base64(payload)
        with self._request(f"write {key}", key) as bucket:
            self._check(bucket.put_object(name, payload, headers=headers).crc, payload, key)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        name = self._prefix + check_key(key)
        what = f"{self.url}: {key}"
        if length == 0:
            exact_range(self._size(key), start, 0, what=what)
            return b""
        headers = dict(self._pays)
        is_range = bool(start) or length is not None
        if is_range:
            headers["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
            headers["x-oss-range-behavior"] = "standard"  # else a range past the end returns the whole object
        try:
            with self._request(f"read {key}", key) as bucket:
                answer = bucket.get_object(name, headers=headers)
                with contextlib.closing(answer.resp.response) as response:
                    _genuine(answer)
                    size_bytes = int(response.headers["Content-Length"])
                    if is_range and answer.status != 206:
                        raise StorageError(f"{what}: the server ignores ranges", hint="use a server that honours them")
                    if length is not None and size_bytes != length:
                        raise past_the_end(what, start, length, start + size_bytes)
                    if length is None and max_bytes is not None and size_bytes > max_bytes:
                        raise IntegrityError(
                            f"{what} has {size_bytes} bytes or more, over the limit of {max_bytes}", key=key
                        )
                    content = bytes(response.raw.read())
                    if not is_range and answer.server_crc is not None:  # objects of OSS's early years have none
                        self._check(answer.server_crc, content, key)
        except StorageError as error:
            if error.context.get("status") != 416:
                raise
            first, last = exact_range(self._size(key), start, length, what=what)
            if first == last:
                return b""
            raise TransientError(
                f"{what} changed its size while it was read", reason="server_error", key=key
            ) from error
        if len(content) != size_bytes:
            raise TransientError(
                f"{what} was cut off after {len(content)} of {size_bytes} bytes", reason="cut_off", key=key
            )
        return content

    def head(self, key: str) -> ObjectInfo | None:
        found = self._look(key, self._prefix + check_key(key))
        if found is None:
            return None
        return ObjectInfo(key, found.content_length, datetime.fromtimestamp(found.last_modified, timezone.utc))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        full = self._prefix + check_prefix(prefix)
        token = ""

        def page() -> Any:
            with self._request(f"list {prefix or 'the prefix'}", prefix) as bucket:
                answer = bucket.list_objects_v2(
                    prefix=full, continuation_token=token, max_keys=_PAGE, headers=dict(self._pays)
                )
                if answer.is_truncated and answer.next_continuation_token in ("", token):
                    raise TransientError(f"{self.url}: the listing is cut off", reason="cut_off", url=self.url)
                return answer

        while True:
            answer = self._attempts("list", page)
            for entry in answer.object_list:
                key = entry.key[len(self._prefix) :]
                if entry.key.startswith(full) and is_key(key):
                    yield ObjectInfo(key, entry.size, datetime.fromtimestamp(entry.last_modified, timezone.utc))
            if not answer.is_truncated:
                return
            token = answer.next_continuation_token

    def delete(self, keys: Sequence[str]) -> None:
        names = [self._prefix + check_key(key) for key in keys]
        for first in range(0, len(names), _DELETE_BATCH):
            batch = names[first : first + _DELETE_BATCH]
            self._attempts("delete", lambda batch=batch: self._delete_batch(batch))  # type: ignore[misc]

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        full = self._prefix + check_prefix(prefix)
        key_marker = upload_marker = ""
        aborted = 0
        while True:
            with self._request("list unfinished uploads", prefix) as bucket:
                answer = bucket.list_multipart_uploads(
                    prefix=full, key_marker=key_marker, upload_id_marker=upload_marker, headers=dict(self._pays)
                )
            for upload in answer.upload_list:
                if upload.key.startswith(full) and upload.initiation_date < older_than.timestamp():
                    self._abort(upload.key, upload.upload_id)
                    aborted += 1
            if not answer.is_truncated:
                return aborted
            key_marker, upload_marker = answer.next_key_marker, answer.next_upload_id_marker

    def deletion_rules(self) -> builtins.list[str]:
        from oss2.exceptions import NoSuchLifecycle

        with self._request("read the lifecycle rules", "") as bucket:
            try:
                rules = bucket.get_bucket_lifecycle().rules
            except NoSuchLifecycle:
                return []
        return [told for rule in rules if (told := deletes(rule, self._prefix)) is not None]

    def traits(self, key: str) -> builtins.list[Trait]:
        del key
        host = urlsplit(self._endpoint).hostname or ""
        return [transport(self._endpoint), addressing(host, self._bucket, is_cname=self._is_cname), CHECKSUMS]

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()
        with self._lock:
            idle, self._idle = self._idle, []
        for bucket in idle:
            bucket.session.session.close()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _put_in_parts(self, key: str, name: str, body: memoryview, condition: Mapping[str, str]) -> None:
        headers = {**_TYPE, **self._at_rest, **self._pays, **condition}

        def begin() -> str:
            with self._request(f"write {key}", key) as bucket:
                return str(bucket.init_multipart_upload(name, headers=dict(headers)).upload_id)

        def send(part: Part) -> str:
            payload = bytes(body[part.start : part.stop])

            def request() -> str:
                with self._request(f"write {key}", key) as bucket:
                    answer = bucket.upload_part(name, upload, part.number, payload, headers=dict(self._pays))
                    self._check(answer.crc, payload, key)
                    return str(answer.etag)

            return self._attempts("put", request)

        upload = self._attempts("put", begin)
        try:
            etags = send_parts(parts_of(len(body), self._part_bytes), send, self._part_pool())
            self._complete(key, name, upload, etags, body, condition)
        except BaseException as error:
            with contextlib.suppress(CkptError):  # the failure itself matters more; gc finds what stays behind
                self._abort(name, upload)
            if isinstance(error, StorageError) and error.context.get("code") == "NoSuchUpload":
                raise TransientError(
                    f"could not write {key}: its upload was aborted by somebody", reason="cut_off", key=key
                ) from error  # another one can succeed
            raise

    def _complete(
        self, key: str, name: str, upload: str, etags: Sequence[str], body: memoryview, condition: Mapping[str, str]
    ) -> None:
        """Join the parts. If an answer was lost, the object itself says whether it was ours that was joined."""
        from oss2.models import PartInfo

        parts = [PartInfo(index + 1, etag) for index, etag in enumerate(etags)]
        is_uncertain = False

        def request() -> None:
            nonlocal is_uncertain
            try:
                with self._request(f"write {key}", key) as bucket:
                    answer = bucket.complete_multipart_upload(name, upload, parts, headers={**self._pays, **condition})
                    self._check(answer.crc, body, key)
            except StorageError as error:
                if is_uncertain and self._is_joined(key, name, body):
                    return
                is_uncertain = is_uncertain or isinstance(error, TransientError)
                raise

        self._attempts("put", request)

    def _is_joined(self, key: str, name: str, body: memoryview) -> bool:
        try:
            found = self._look(key, name)
        except CkptError:
            return False
        return found is not None and found.content_length == len(body) and found.server_crc == _crc64(body)

    def _abort(self, name: str, upload: str) -> None:
        def request() -> None:
            try:
                with self._request("abort an upload", name) as bucket:
                    bucket.abort_multipart_upload(name, upload, headers=dict(self._pays))
            except StorageError as error:
                if error.context.get("code") != "NoSuchUpload":
                    raise

        self._attempts("abort", request)

    def _part_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, thread_name_prefix="ckptstore-oss-part")
            return self._pool

    # -- requests ----------------------------------------------------------------------------------------------------

    def make_bucket(self) -> None:
        """Create the bucket, for servers of one's own. One's own that is there already is fine."""
        with self._request("create the bucket", "") as bucket:
            bucket.create_bucket()

    def _delete_batch(self, names: Sequence[str]) -> None:
        with self._request(f"delete {len(names)} objects", names[0]) as bucket:
            deleted = bucket.batch_delete_objects([*names], headers=dict(self._pays)).deleted_keys
        unsaid = len(set(names) - set(deleted))
        if unsaid:
            raise TransientError(
                f"{self.url}: the server did not delete {unsaid} of {len(names)} objects",
                reason="server_error",
                bucket=self._bucket,
            )

    def _look(self, key: str, name: str) -> Any:
        try:
            with self._request(f"look at {key}", key) as bucket:
                return _genuine(bucket.head_object(name, headers=dict(self._pays)))
        except NoStoreError:
            raise
        except NotFoundError as error:
            if not error.context.get("code") and not self._has_succeeded:
                next(self.list("bucket-or-object-missing"), None)  # a bare 404 doesn't say which; a listing does
            return None

    def _size(self, key: str) -> int:
        info = self.head(key)
        if info is None:
            raise NotFoundError(f"there is no object {key} in {self.url}", key=key, bucket=self._bucket)
        return info.size_bytes

    def _check(self, theirs: int | None, payload: Buffer, key: str) -> None:
        """Compare the server's CRC64 with ours. None: what answered was no object store, whatever its status says."""
        if theirs != _crc64(payload):
            raise TransientError(
                f"{self.url}: {key} changed on its way (CRC64 differs)", reason="damaged", key=key, bucket=self._bucket
            )

    @contextlib.contextmanager
    def _request(self, what: str, key: str) -> Iterator[Any]:
        """An oss2.Bucket of this thread's own, whose errors, raised in the body of the ``with``, come out as ours."""
        with self._lock:
            bucket = self._idle.pop() if self._idle else None
        try:
            if bucket is None:
                bucket = self._connect()
            yield bucket
        except CkptError:
            raise
        except Exception as error:
            ours = self._translate(error, what, key)
            if ours is None:
                raise
            raise ours from error
        finally:
            if bucket is not None:
                for response in bucket.session.answers:  # oss2 doesn't read every answer to its end
                    response.close()
                bucket.session.answers.clear()
                with self._lock:
                    self._idle.append(bucket)
        self._has_succeeded = True

    def _connect(self) -> Any:
        import oss2

        logging.getLogger("oss2").setLevel(logging.WARNING)  # below that it logs signatures and session tokens
        make = oss2.ProviderAuthV4 if self._auth == "v4" else oss2.ProviderAuth
        environ = os.environ if self._environ is None else self._environ
        session = oss2.Session(pool_size=2)
        session.answers = []
        session.session.hooks["response"].append(lambda answer, **_: session.answers.append(answer))
        session.session.auth = _keep_headers
        is_loopback = urlsplit(self._endpoint).hostname in ("localhost", "127.0.0.1", "::1")
        if is_loopback or environ is not os.environ:
            session.session.trust_env = False  # neither its proxies nor its certificates, but those given
            session.session.verify = environ.get("REQUESTS_CA_BUNDLE") or True
        return oss2.Bucket(
            make(_Credentials(environ, oss2.credentials.Credentials, self._where())),
            self._endpoint,
            self._bucket,
            is_cname=self._is_cname,
            session=session,
            connect_timeout=(_CONNECT_TIMEOUT_S, self._read_timeout_s),
            app_name="ckptstore",
            enable_crc=False,
            region=self._region,
            proxies=None if is_loopback else _proxies(environ),
        )

    def _translate(self, error: Exception, what: str, key: str) -> CkptError | None:
        from xml.etree.ElementTree import ParseError

        import requests
        from oss2 import exceptions as oss
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        place = {**self._where(), "key": key}
        if isinstance(error, oss.ServerError):
            code = error.code
            if code == "InvalidAccessKeyId" and (os.environ if self._environ is None else self._environ).get(
                "OSS_SESSION_TOKEN"
            ):
                code = "SecurityTokenExpired"
            headers = {name.lower(): value for name, value in error.headers.items()}
            refusal = Refusal(what, code, error.status, error.message or "", self._bucket, self._endpoint, key, headers)
            return refusal.error()
        cause = error.exception if isinstance(error, oss.RequestError) else error
        if isinstance(cause, requests.exceptions.SSLError):
            return ConfigError(
                f"could not {what}: TLS with {self._endpoint} failed: {cause}",
                hint="set REQUESTS_CA_BUNDLE to the certificate of a private CA",
                **place,
            )
        if isinstance(cause, (requests.exceptions.ReadTimeout, ReadTimeoutError)):
            return TransientError(
                f"could not {what}: {self._endpoint} did not answer in time", reason="timeout", **place
            )
        if isinstance(cause, requests.exceptions.ConnectionError) and "Failed to establish" in str(cause):
            return TransientError(
                f"could not {what}: {self._endpoint} can't be reached",
                reason="unreachable",
                hint="is it running?",
                **place,
            )
        if isinstance(cause, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema, oss.ClientError)):
            return ConfigError(f"could not {what} in bucket {self._bucket}: {cause}", **place)
        if isinstance(cause, (requests.exceptions.RequestException, HTTPError, OSError)):
            return TransientError(
                f"could not {what}: the connection to {self._endpoint} broke ({type(cause).__name__})",
                reason="cut_off",
                **place,
            )
        if isinstance(cause, (ParseError, RuntimeError, KeyError, ValueError, AttributeError)):  # oss2's parsers
            return TransientError(
                f"could not {what}: the answer does not come from an object store ({cause})", reason="damaged", **place
            )
        return None

    def _where(self) -> dict[str, Any]:
        return {"bucket": self._bucket, "endpoint": self._endpoint}


class _Credentials:
    """An oss2 credentials provider that looks them up anew for each request."""

    def __init__(self, environ: Mapping[str, str], make: Callable[..., Any], place: Mapping[str, Any]) -> None:
        self._environ = environ
        self._make = make
        self._place = place

    def get_credentials(self) -> Any:
        key, secret = self._environ.get("OSS_ACCESS_KEY_ID"), self._environ.get("OSS_ACCESS_KEY_SECRET")
        if not key or not secret:
            raise CredentialsError(
                f"there are no credentials for bucket {self._place['bucket']} at {self._place['endpoint']}",
                hint="set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET (and OSS_SESSION_TOKEN for temporary ones)",
                **self._place,
            )
        return self._make(key.strip(), secret.strip(), self._environ.get("OSS_SESSION_TOKEN", "").strip())


_TYPE = {"Content-Type": "application/octet-stream"}


def _place(address: Address, environ: Mapping[str, str]) -> tuple[str, str]:
    """Endpoint and region, each from the URL, the environment, or the other."""
    endpoint = address.params.get("endpoint") or environ.get("OSS_ENDPOINT", "")
    region = (address.params.get("region") or environ.get("OSS_REGION", "")).removeprefix("oss-")
    if not endpoint:
        if not region:
            raise address.refuse("names no region", hint="add ?region=cn-hangzhou (for example), or set OSS_REGION")
        endpoint = f"https://oss-{region}.aliyuncs.com"
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise address.refuse("has an endpoint that is none", hint="write endpoint=https://HOST[:PORT]")
    found = _PUBLIC_HOST.search(parts.hostname)
    region = region or (found[1] if found else "")
    if not region:
        raise address.refuse(
            "names no region", hint="add region=cn-hangzhou (for example); requests are signed with it"
        )
    return endpoint, region


def _at_rest(address: Address) -> dict[str, str]:
    """The put headers that say how an object is kept."""
    kept = {}
    if storage_class := address.params.get("storage_class"):
        kept["x-oss-storage-class"] = storage_class
    if "sse" in address.params:
        kept["x-oss-server-side-encryption"] = address.choice("sse", ("AES256", "KMS"), "AES256")
    if kms_key := address.params.get("kms_key"):
        if address.params.get("sse") != "KMS":
            raise address.refuse("has kms_key without sse=KMS", hint="add sse=KMS, or take kms_key out")
        kept["x-oss-server-side-encryption-key-id"] = kms_key
    return kept


def _proxies(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Proxies of a given environment; for the process's own, requests knows better (no_proxy)."""
    if environ is os.environ:
        return None
    found = {
        scheme: environ.get(f"{scheme}_proxy") or environ.get(f"{scheme}_proxy".upper()) for scheme in ("http", "https")
    }
    return {scheme: proxy for scheme, proxy in found.items() if proxy} or None


def _genuine(answer: Any) -> Any:
    """The answer, if OSS gave it; what a proxy or a portal in between says with status 200 has no request id."""
    if not answer.request_id:
        raise ValueError("it has no x-oss-request-id")
    return answer


def _keep_headers(request: Any) -> Any:
    """An auth for requests that does nothing: without one it would let ~/.netrc replace the signature."""
    return request


def _crc64(payload: Buffer) -> int:
    from fastcrc import crc64

    return int(crc64.xz(payload))


def _md5_base64(payload: bytes) -> str:
    return base64.b64encode(hashlib.md5(payload, usedforsecurity=False).digest()).decode()
