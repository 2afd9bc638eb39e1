"""One bucket of the stand-in for OSS: its objects, uploads in parts and listings, as strict as the service."""

from __future__ import annotations

import base64
import hashlib
import secrets
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote
from xml.sax.saxutils import escape

from ckptstore.clock import Clock
from ckptstore.testing.oss_signature import Refused, Request

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
class Upload:
    key: str
    begun: datetime
    headers: Mapping[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class OSSBucket:
    """What one bucket holds and how it answers. Not thread-safe: the server asks one at a time."""

    def __init__(self, clock: Clock) -> None:
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, Upload] = {}
        self._clock = clock

    def of_bucket(self, request: Request) -> Answer:
        """Do what a request about the bucket as a whole asks."""
        asked = set(request.query)
        if request.method == "GET" and request.query.get("list-type") == "2" and asked <= _LIST_PARAMS:
            return self._list(request)
        if request.method == "GET" and "uploads" in asked and asked <= _UPLOADS_PARAMS:
            return self._list_uploads(request)
        if request.method == "POST" and "delete" in asked and asked <= {"delete", "encoding-type"}:
            return self._delete_many(request)
        raise Refused(501, "NotImplemented", f"{request.method} {sorted(asked)} of a bucket is not served here.")

    def of_object(self, request: Request) -> Answer:
        """Do what a request about one object asks."""
        operations: dict[tuple[str, frozenset[str]], Callable[[Request], Answer]] = {
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
        return operation(request)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _put(self, request: Request) -> Answer:
        return self._store(request, request.body, hashlib.md5(request.body, usedforsecurity=False).hexdigest())

    def _store(self, request: Request, body: bytes, etag: str) -> Answer:
        self._refuse_overwrite(request)
        stored = StoredObject(body, etag.upper(), self._clock.now(), dict(request.headers))
        self.objects[request.key] = stored
        return Answer(headers={"ETag": f'"{stored.etag}"', "x-oss-hash-crc64ecma": str(stored.crc64)})

    def _get(self, request: Request) -> Answer:
        stored = self.objects.get(request.key)
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
            return Answer(200, stored.body, headers)
        first, last = found
        headers["Content-Range"] = f"bytes {first}-{last}/{len(stored.body)}"
        return Answer(206, stored.body[first : last + 1], headers)

    def _delete(self, request: Request) -> Answer:
        self.objects.pop(request.key, None)
        return Answer(204)

    def _delete_many(self, request: Request) -> Answer:
        if "content-md5" not in request.headers:
            raise Refused(400, "MissingArgument", "Missing Some Required Arguments.")
        keys = [element.findtext("Key", "") for element in _parsed(request.body).findall("Object")]
        if not 0 < len(keys) <= _PAGE:
            raise Refused(400, "MalformedXML", "The XML you provided was not well-formed.")
        for key in keys:
            self.objects.pop(key, None)
        deleted = "".join(f"<Deleted><Key>{quote(key)}</Key></Deleted>" for key in keys)
        return _xml(f"<DeleteResult><EncodingType>url</EncodingType>{deleted}</DeleteResult>")

    def _list(self, request: Request) -> Answer:
        query = request.query
        size = _number(query.get("max-keys") or "100", 1, _PAGE)
        if query.get("delimiter"):
            raise Refused(501, "NotImplemented", "Delimiters are not served here.")
        after = max(_decoded(query.get("continuation-token", "")), query.get("start-after", ""))
        prefix = query.get("prefix", "")
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page, more = keys[:size], keys[size:]
        entries = "".join(_entry(key, self.objects[key]) for key in page)
        token = f"<NextContinuationToken>{_encoded(page[-1])}</NextContinuationToken>" if more else ""
        return _xml(
            f"<ListBucketResult><Name>{request.bucket}</Name><Prefix>{quote(prefix)}</Prefix>"
            f"<EncodingType>url</EncodingType><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{entries}</ListBucketResult>"
        )

    # -- uploads in parts --------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> Answer:
        self._refuse_overwrite(request)
        upload = secrets.token_hex(16).upper()
        self.uploads[upload] = Upload(request.key, self._clock.now(), dict(request.headers))
        return _xml(
            f"<InitiateMultipartUploadResult><Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        )

    def _put_part(self, request: Request) -> Answer:
        upload = self._upload_of(request)
        number = _number(request.query["partNumber"], 1, _MAX_PARTS)
        upload.parts[number] = request.body
        part = StoredObject(request.body, _md5_hex(request.body), self._clock.now(), {})
        return Answer(headers={"ETag": f'"{part.etag}"', "x-oss-hash-crc64ecma": str(part.crc64)})

    def _complete(self, request: Request) -> Answer:
        upload = self._upload_of(request)
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
        answer = self._store(request, body, etag)
        del self.uploads[request.query["uploadId"]]
        result = f"<CompleteMultipartUploadResult><Key>{escape(request.key)}</Key></CompleteMultipartUploadResult>"
        return Answer(200, result.encode(), {**answer.headers, "Content-Type": "application/xml"})

    def _abort(self, request: Request) -> Answer:
        self._upload_of(request)
        del self.uploads[request.query["uploadId"]]
        return Answer(204)

    def _list_uploads(self, request: Request) -> Answer:
        query = request.query
        size = _number(query.get("max-uploads") or str(_PAGE), 1, _PAGE)
        after = (query.get("key-marker", ""), query.get("upload-id-marker", ""))
        found = sorted((upload.key, name) for name, upload in self.uploads.items())
        found = [item for item in found if item[0].startswith(query.get("prefix", "")) and item > after]
        page, more = found[:size], found[size:]
        entries = "".join(
            f"<Upload><Key>{quote(key)}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{_iso(self.uploads[name].begun)}</Initiated></Upload>"
            for key, name in page
        )
        last_key, last_name = page[-1] if more else ("", "")
        return _xml(
            f"<ListMultipartUploadsResult><EncodingType>url</EncodingType><NextKeyMarker>{quote(last_key)}</NextKeyMarker>"
            f"<NextUploadIdMarker>{last_name}</NextUploadIdMarker>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{entries}</ListMultipartUploadsResult>"
        )

    # -- rules --------------------------------------------------------------------------------------------------------

    def _refuse_overwrite(self, request: Request) -> None:
        if request.headers.get("x-oss-forbid-overwrite") == "true" and request.key in self.objects:
            raise Refused(409, "FileAlreadyExists", "The object you specified already exists.")

    def _upload_of(self, request: Request) -> Upload:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key:
            raise Refused(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload


class DamagedObject(StoredObject):
    """An object whose recorded CRC is that of what it was."""

    crc_was: int

    @property
    def crc64(self) -> int:
        return self.crc_was


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


def _xml(text: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
    return Answer(200, body, {"Content-Type": "application/xml"})


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


def md5_base64(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
