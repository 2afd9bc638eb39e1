"""Alibaba OSS's protocol on loopback, in memory, checked as strictly as the real service checks it.

There is no OSS server to install, so this one stands in: signatures (V4 and V1), dates, temporary credentials,
Content-MD5, virtual-hosted addressing, and the rules of multipart uploads and listings are enforced; what it doesn't
know it refuses with 501 rather than pretend. It serves requests sent to it directly
(``http://127.0.0.1:PORT/bucket/key``, the form that OSS's SDK uses for addresses) and, as an HTTP proxy, those for
``http://bucket.oss-REGION.aliyuncs.com/key``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.testing.oss_signature import Account, Refused, Request, check_signature

_MIN_PART_BYTES = 100 * 1024
_MAX_PARTS = 10_000
_PAGE = 1000
#: Query parameters that mean nothing to the server beyond the operation they belong to.
_LIST_PARAMS = {
    "list-type",
    "prefix",
    "delimiter",
    "continuation-token",
    "start-after",
    "fetch-owner",
    "max-keys",
    "encoding-type",
}
_UPLOADS_PARAMS = {"uploads", "prefix", "delimiter", "key-marker", "upload-id-marker", "max-uploads", "encoding-type"}


@dataclass(frozen=True)
class StoredObject:
    """One object, with the headers it was put with."""

    body: bytes
    etag: str
    modified: datetime
    headers: Mapping[str, str]

    @property
    def crc64(self) -> int:
        """As the service computes it."""
        from fastcrc import crc64

        return int(crc64.xz(self.body))


@dataclass
class _Upload:
    key: str
    begun: datetime
    headers: Mapping[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class _Bucket:
    objects: dict[str, StoredObject] = field(default_factory=dict)
    uploads: dict[str, _Upload] = field(default_factory=dict)


@dataclass(frozen=True)
class _Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


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
        self._buckets = {bucket: _Bucket()}
        self._main = Account(f"LTAI{secrets.token_hex(8)}", secrets.token_hex(15))
        self._accounts = {self._main.access_key: self._main}
        self._http = _HTTPServer(("127.0.0.1", 0), _handler_for(self))
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
            damaged = _DamagedObject(bytes([old.body[0] ^ 1]) + old.body[1:], old.etag, old.modified, old.headers)
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

    def answer(self, request: Request) -> _Answer:
        """Do what a request asks.

        Raises:
            Refused: the error that the service would answer.
        """
        check_signature(request, self._accounts, self.region, self.clock.now())
        if "content-md5" in request.headers and request.headers["content-md5"] != _md5_base64(request.body):
            raise Refused(400, "InvalidDigest", "The Content-MD5 you specified was invalid.")
        if not request.bucket:
            raise Refused(501, "NotImplemented", "Only buckets and objects are served here.")
        if request.key:
            return self._object(request)
        return self._whole_bucket(request)

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

    def _of(self, request: Request) -> _Bucket:
        if request.bucket not in self._buckets:
            raise Refused(404, "NoSuchBucket", "The specified bucket does not exist.")
        return self._buckets[request.bucket]

    def _whole_bucket(self, request: Request) -> _Answer:
        asked = set(request.query)
        if request.method == "PUT" and not asked:
            self._buckets.setdefault(request.bucket, _Bucket())
            return _Answer()
        bucket = self._of(request)
        if request.method == "GET" and request.query.get("list-type") == "2" and asked <= _LIST_PARAMS:
            return self._list(bucket, request)
        if request.method == "GET" and "uploads" in asked and asked <= _UPLOADS_PARAMS:
            return self._list_uploads(bucket, request)
        if request.method == "GET" and asked == {"lifecycle"}:
            if self.lifecycle is None:
                raise Refused(404, "NoSuchLifecycle", "The bucket has no lifecycle configuration.")
            return _Answer(200, self.lifecycle.encode())
        if request.method == "POST" and "delete" in asked and asked <= {"delete", "encoding-type"}:
            return self._delete_many(bucket, request)
        raise Refused(501, "NotImplemented", f"{request.method} {sorted(asked)} of a bucket is not served here.")

    def _object(self, request: Request) -> _Answer:
        bucket = self._of(request)
        operations: dict[tuple[str, frozenset[str]], Callable[[_Bucket, Request], _Answer]] = {
            ("PUT", frozenset()): self._put,
            ("GET", frozenset()): self._get,
            ("HEAD", frozenset()): self._get,
            ("DELETE", frozenset()): self._delete,
            ("POST", frozenset({"uploads"})): self._begin,
            ("PUT", frozenset({"uploadId", "partNumber"})): self._put_part,
            ("POST", frozenset({"uploadId"})): self._complete,
            ("DELETE", frozenset({"uploadId"})): self._abort,
        }
        operation = operations.get((request.method, frozenset(request.query)))
        if operation is None:
            raise Refused(501, "NotImplemented", f"{request.method} {sorted(request.query)} is not served here.")
        return operation(bucket, request)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _put(self, bucket: _Bucket, request: Request) -> _Answer:
        return self._store(bucket, request, request.body, hashlib.md5(request.body, usedforsecurity=False).hexdigest())

    def _store(self, bucket: _Bucket, request: Request, body: bytes, etag: str) -> _Answer:
        _refuse_overwrite(bucket, request)
        stored = StoredObject(body, etag.upper(), self.clock.now(), dict(request.headers))
        bucket.objects[request.key] = stored
        return _Answer(headers={"ETag": f'"{stored.etag}"', "x-oss-hash-crc64ecma": str(stored.crc64)})

    def _get(self, bucket: _Bucket, request: Request) -> _Answer:
        stored = bucket.objects.get(request.key)
        if stored is None:
            raise Refused(404, "NoSuchKey", "The specified key does not exist.")
        headers = {
            "ETag": f'"{stored.etag}"',
            "Last-Modified": format_datetime(stored.modified, usegmt=True),
            "x-oss-object-type": "Normal",
            "x-oss-hash-crc64ecma": str(stored.crc64),
            "Content-Type": stored.headers.get("content-type", "application/octet-stream"),
            "Accept-Ranges": "bytes",
        }
        wanted = request.headers.get("range")
        found = _range_of(wanted, len(stored.body)) if wanted else None
        if wanted and found is None and request.headers.get("x-oss-range-behavior") == "standard":
            raise Refused(416, "InvalidRange", "The requested range cannot be satisfied.")
        if found is None:  # the service's own habit: an impossible range means the whole object
            return _Answer(200, stored.body, headers)
        first, last = found
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.body)}"
        return _Answer(206, stored.body[first : last + 1], headers)

    def _delete(self, bucket: _Bucket, request: Request) -> _Answer:
        bucket.objects.pop(request.key, None)
        return _Answer(204)

    def _delete_many(self, bucket: _Bucket, request: Request) -> _Answer:
        if "content-md5" not in request.headers:
            raise Refused(400, "MissingArgument", "Missing Some Required Arguments.")
        keys = [element.findtext("Key", "") for element in _parsed(request.body).findall("Object")]
        if not 0 < len(keys) <= _PAGE:
            raise Refused(400, "MalformedXML", "The XML you provided was not well-formed.")
        for key in keys:
            bucket.objects.pop(key, None)
        deleted = "".join(f"<Deleted><Key>{quote(key)}</Key></Deleted>" for key in keys)
        return _xml(f"<DeleteResult><EncodingType>url</EncodingType>{deleted}</DeleteResult>")

    def _list(self, bucket: _Bucket, request: Request) -> _Answer:
        query = request.query
        size = _number(query.get("max-keys") or "100", 1, _PAGE)
        if query.get("delimiter"):
            raise Refused(501, "NotImplemented", "Delimiters are not served here.")
        after = max(_decoded(query.get("continuation-token", "")), query.get("start-after", ""))
        prefix = query.get("prefix", "")
        keys = sorted(key for key in bucket.objects if key.startswith(prefix) and key > after)
        page, more = keys[:size], keys[size:]
        entries = "".join(_entry(key, bucket.objects[key]) for key in page)
        token = f"<NextContinuationToken>{_encoded(page[-1])}</NextContinuationToken>" if more else ""
        return _xml(
            f"<ListBucketResult><Name>{request.bucket}</Name><Prefix>{quote(prefix)}</Prefix>"
            f"<EncodingType>url</EncodingType><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{entries}</ListBucketResult>"
        )

    # -- uploads in parts --------------------------------------------------------------------------------------------

    def _begin(self, bucket: _Bucket, request: Request) -> _Answer:
        _refuse_overwrite(bucket, request)
        upload = secrets.token_hex(16).upper()
        bucket.uploads[upload] = _Upload(request.key, self.clock.now(), dict(request.headers))
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )

    def _put_part(self, bucket: _Bucket, request: Request) -> _Answer:
        upload = _upload_of(bucket, request)
        number = _number(request.query["partNumber"], 1, _MAX_PARTS)
        upload.parts[number] = request.body
        part = StoredObject(request.body, _md5_hex(request.body), self.clock.now(), {})
        return _Answer(headers={"ETag": f'"{part.etag}"', "x-oss-hash-crc64ecma": str(part.crc64)})

    def _complete(self, bucket: _Bucket, request: Request) -> _Answer:
        upload = _upload_of(bucket, request)
        listed = [
            (int(part.findtext("PartNumber", "0")), part.findtext("ETag", "").strip('"'))
            for part in _parsed(request.body).findall("Part")
        ]
        numbers = [number for number, _ in listed]
        if numbers != sorted(set(numbers)):
            raise Refused(400, "InvalidPartOrder", "The list of parts was not in ascending order.")
        for number, etag in listed:
            if number not in upload.parts or _md5_hex(upload.parts[number]) != etag.upper():
                raise Refused(400, "InvalidPart", "One or more of the specified parts could not be found.")
        if not listed or any(len(upload.parts[number]) < _MIN_PART_BYTES for number in numbers[:-1]):
            raise Refused(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size.")
        body = b"".join(upload.parts[number] for number in numbers)
        etag = f"{_md5_hex(''.join(etag for _, etag in listed).encode())}-{len(listed)}"
        answer = self._store(bucket, request, body, etag)
        del bucket.uploads[request.query["uploadId"]]
        result = f"<CompleteMultipartUploadResult><Key>{escape(request.key)}</Key></CompleteMultipartUploadResult>"
        return _Answer(200, result.encode(), {**answer.headers, "Content-Type": "application/xml"})

    def _abort(self, bucket: _Bucket, request: Request) -> _Answer:
        _upload_of(bucket, request)
        del bucket.uploads[request.query["uploadId"]]
        return _Answer(204)

    def _list_uploads(self, bucket: _Bucket, request: Request) -> _Answer:
        query = request.query
        size = _number(query.get("max-uploads") or str(_PAGE), 1, _PAGE)
        after = (query.get("key-marker", ""), query.get("upload-id-marker", ""))
        found = sorted((upload.key, name) for name, upload in bucket.uploads.items())
        found = [item for item in found if item[0].startswith(query.get("prefix", "")) and item > after]
        page, more = found[:size], found[size:]
        entries = "".join(
            f"<Upload><Key>{quote(key)}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{_iso(bucket.uploads[name].begun)}</Initiated></Upload>"
            for key, name in page
        )
        last_key, last_name = page[-1] if more else ("", "")
        return _xml(
            f"<ListMultipartUploadsResult><EncodingType>url</EncodingType><NextKeyMarker>{quote(last_key)}</NextKeyMarker>"
            f"<NextUploadIdMarker>{last_name}</NextUploadIdMarker>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{entries}</ListMultipartUploadsResult>"
        )


class _DamagedObject(StoredObject):
    """An object whose recorded CRC is that of what it was."""

    crc_was: int

    @property
    def crc64(self) -> int:
        return self.crc_was


def _environ_of(account: Account) -> dict[str, str]:
    environ = {"OSS_ACCESS_KEY_ID": account.access_key, "OSS_ACCESS_KEY_SECRET": account.secret}
    return {**environ, "OSS_SESSION_TOKEN": account.token} if account.token else environ


def _refuse_overwrite(bucket: _Bucket, request: Request) -> None:
    if request.headers.get("x-oss-forbid-overwrite") == "true" and request.key in bucket.objects:
        raise Refused(409, "FileAlreadyExists", "The object you specified already exists and can not be overwritten.")


def _upload_of(bucket: _Bucket, request: Request) -> _Upload:
    upload = bucket.uploads.get(request.query["uploadId"])
    if upload is None or upload.key != request.key:
        raise Refused(404, "NoSuchUpload", "The specified upload does not exist.")
    return upload


def _range_of(text: str, size: int) -> tuple[int, int] | None:
    unit, _, wanted = text.partition("=")
    first, dash, last = wanted.partition("-")
    if unit != "bytes" or not dash or not first.isdecimal() or (last and not last.isdecimal()):
        return None
    if int(first) >= size or (last and int(last) < int(first)):
        return None
    return int(first), min(int(last), size - 1) if last else size - 1


def _number(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise Refused(400, "InvalidArgument", f"{text} is not between {least} and {most}.")
    return int(text)


def _parsed(body: bytes) -> ET.Element:
    try:
        return ET.fromstring(body)  # noqa: S314 - a test server, whose client is the test
    except ET.ParseError:
        raise Refused(400, "MalformedXML", "The XML you provided was not well-formed.") from None


def _entry(key: str, stored: StoredObject) -> str:
    return (
        f"<Contents><Key>{quote(key)}</Key><LastModified>{_iso(stored.modified)}</LastModified>"
        f"<ETag>&quot;{stored.etag}&quot;</ETag><Type>Normal</Type><Size>{len(stored.body)}</Size>"
        "<StorageClass>Standard</StorageClass></Contents>"
    )


def _xml(text: str) -> _Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    return _Answer(200, body, {"Content-Type": "application/xml"})


def _iso(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _encoded(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


def _decoded(token: str) -> str:
    try:
        return base64.b64decode(token, validate=True).decode()
    except ValueError:
        raise Refused(400, "InvalidArgument", "The continuation token is not valid.") from None


def _md5_hex(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest().upper()


def _md5_base64(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close the connections that clients keep open."""
        for connection in [*self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error."""


def _handler_for(server: OSSServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_: object) -> None:
            pass

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            headers = {name.lower(): value for name, value in self.headers.items()}
            target = urlsplit(self.path)
            path = unquote(target.path)
            request_id = secrets.token_hex(12).upper()
            try:
                if "transfer-encoding" in headers:
                    raise Refused(501, "NotImplemented", "A header you provided implies functionality not served here.")
                bucket, key = server.bucket_and_key(target.netloc or headers.get("host", ""), path)
                query = dict(parse_qsl(target.query, keep_blank_values=True))
                with server.lock:
                    server.seen.append((self.command, self.path))
                    answer = server.answer(Request(self.command, bucket, key, query, headers, body))
            except Refused as refused:
                xml = (
                    f"<Error><Code>{refused.code}</Code><Message>{escape(refused.message)}</Message>"
                    f"<RequestId>{request_id}</RequestId></Error>"
                ).encode()
                told = {"x-oss-err": base64.b64encode(xml).decode()} if self.command == "HEAD" else {}
                answer = _Answer(refused.status, xml, {"Content-Type": "application/xml", **told})
            self._send(answer, request_id)

        def _send(self, answer: _Answer, request_id: str) -> None:
            self.send_response_only(answer.status)
            headers = {
                "Server": "AliyunOSS",
                "Date": format_datetime(server.clock.now(), usegmt=True),
                "x-oss-request-id": request_id,
                "Content-Length": str(len(answer.body)),
                **answer.headers,
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            self.wfile.flush()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815 - the names that http.server looks for

    return Handler
