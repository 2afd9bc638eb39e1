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
    tags           team:nlp,project:x: tags of each object
    conditional_put  false: the bucket has versioning, which makes OSS ignore x-oss-forbid-overwrite

oss2 is imported by the first request, in :mod:`ckptstore.blob.oss_connection`. Its CRC, which holds the interpreter's
lock, is off; the server's is compared with one of our own.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlencode, urlsplit

from ckptstore.blob.address import Address
from ckptstore.blob.base import Attempts, Buffer, Capabilities, ObjectInfo, Trait, once, transport
from ckptstore.blob.bucket import PART_BYTES, SINGLE_PUT_BYTES, BucketStore, Reading, md5_base64
from ckptstore.blob.keys import check_key, check_prefix, is_key
from ckptstore.blob.oss_connection import OSSConnection, genuine
from ckptstore.blob.oss_traits import CHECKSUMS, addressing, deletes
from ckptstore.errors import CkptError, NoStoreError, NotFoundError, StorageError, TransientError

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
        "tags",
        "conditional_put",
    }
)
_PAGE = 1000


class OSSBlobStore(BucketStore):
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
        single_put_bytes: int = SINGLE_PUT_BYTES,
        part_bytes: int = PART_BYTES,
        read_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(address, _PARAMS, attempts, single_put_bytes, part_bytes)
        self._pays = {"x-oss-request-payer": "requester"} if address.flag("requester_pays") else {}
        self._at_rest = _at_rest(address)
        self._connection = OSSConnection(address, self._bucket, environ, read_timeout_s)
        self._request = self._connection.request
        self.capabilities = Capabilities(conditional_put=address.flag("conditional_put", True))

    @classmethod
    def from_address(
        cls, address: Address, *, environ: Mapping[str, str] | None = None, attempts: Attempts = once
    ) -> OSSBlobStore:
        """Open ``oss://bucket[/prefix][?..]``."""
        return cls(address, environ=environ, attempts=attempts)

    # -- objects -----------------------------------------------------------------------------------------------------

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
                    self._attempts("abort", lambda u=upload: self._abort(u.key, u.upload_id))  # type: ignore[misc]
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
        host = urlsplit(self._connection.endpoint).hostname or ""
        return [
            transport(self._connection.endpoint),
            addressing(host, self._bucket, is_cname=self._connection.is_cname),
            CHECKSUMS,
        ]

    # -- one request each --------------------------------------------------------------------------------------------

    def _put_whole(self, key: str, name: str, data: Buffer, is_conditional: bool) -> None:
        payload = data if isinstance(data, bytes) else bytes(data)
        headers = {**_TYPE, **self._at_rest, **self._pays, **_condition(is_conditional)}
        if is_conditional:  # what can't be written a second time is refused before it is stored, should it be damaged
            headers["Content-MD5"] = md5_base64(payload)
        with self._request(f"write {key}", key) as bucket:
            self._check(bucket.put_object(name, payload, headers=headers).crc, payload, key)

    @contextlib.contextmanager
    def _reading(self, key: str, name: str, byte_range: str | None) -> Iterator[Reading]:
        headers = dict(self._pays)
        if byte_range is not None:
            headers["Range"] = byte_range
            headers["x-oss-range-behavior"] = "standard"  # else a range past the end returns the whole object
        with self._request(f"read {key}", key) as bucket:
            answer = bucket.get_object(name, headers=headers)
            with contextlib.closing(answer.resp.response) as response:
                genuine(answer)

                def read() -> bytes:
                    content = bytes(response.raw.read())
                    if byte_range is None and answer.server_crc is not None:  # objects of OSS's early years have none
                        self._check(answer.server_crc, content, key)
                    return content

                yield Reading(answer.status, int(response.headers["Content-Length"]), read)

    def _begin(self, key: str, name: str, is_conditional: bool) -> str:
        headers = {**_TYPE, **self._at_rest, **self._pays, **_condition(is_conditional)}
        with self._request(f"write {key}", key) as bucket:
            return str(bucket.init_multipart_upload(name, headers=headers).upload_id)

    def _send(self, key: str, name: str, upload: str, number: int, payload: bytes) -> str:
        with self._request(f"write {key}", key) as bucket:
            answer = bucket.upload_part(name, upload, number, payload, headers=dict(self._pays))
            self._check(answer.crc, payload, key)
            return str(answer.etag)

    def _join(
        self, key: str, name: str, upload: str, sent: Sequence[Any], body: memoryview, is_conditional: bool
    ) -> None:
        from oss2.models import PartInfo

        parts = [PartInfo(index + 1, etag) for index, etag in enumerate(sent)]
        headers = {**self._pays, **_condition(is_conditional)}
        with self._request(f"write {key}", key) as bucket:
            answer = bucket.complete_multipart_upload(name, upload, parts, headers=headers)
            self._check(answer.crc, body, key)

    def _is_joined(self, key: str, name: str, sent: Sequence[Any], body: memoryview) -> bool:
        try:
            found = self._look(key, name)
        except CkptError:
            return False
        return found is not None and found.content_length == len(body) and found.server_crc == _crc64(body)

    def _abort(self, name: str, upload: str) -> None:
        try:
            with self._request("abort an upload", name) as bucket:
                bucket.abort_multipart_upload(name, upload, headers=dict(self._pays))
        except StorageError as error:
            if error.context.get("code") != "NoSuchUpload":
                raise

    def _disconnect(self) -> None:
        self._connection.close()

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
                return genuine(bucket.head_object(name, headers=dict(self._pays)))
        except NoStoreError:
            raise
        except NotFoundError as error:
            if not error.context.get("code") and not self._connection.has_succeeded:
                next(self.list("bucket-or-object-missing"), None)  # a bare 404 doesn't say which; a listing does
            return None

    def _check(self, theirs: int | None, payload: Buffer, key: str) -> None:
        """Compare the server's CRC64 with ours. None: what answered was no object store, whatever its status says."""
        if theirs != _crc64(payload):
            raise TransientError(
                f"{self.url}: {key} changed on its way (CRC64 differs)", reason="damaged", key=key, bucket=self._bucket
            )


_TYPE = {"Content-Type": "application/octet-stream"}


def _at_rest(address: Address) -> dict[str, str]:
    """The put headers that say how an object is kept."""
    kept = {}
    if storage_class := address.params.get("storage_class"):
        kept["x-oss-storage-class"] = storage_class
    if "tags" in address.params:
        kept["x-oss-tagging"] = urlencode(address.tags("tags"))
    if "sse" in address.params:
        kept["x-oss-server-side-encryption"] = address.choice("sse", ("AES256", "KMS"), "AES256")
    if kms_key := address.params.get("kms_key"):
        if address.params.get("sse") != "KMS":
            raise address.refuse("has kms_key without sse=KMS", hint="add sse=KMS, or take kms_key out")
        kept["x-oss-server-side-encryption-key-id"] = kms_key
    return kept


def _condition(is_conditional: bool) -> dict[str, str]:
    return {"x-oss-forbid-overwrite": "true"} if is_conditional else {}


def _crc64(payload: Buffer) -> int:
    from fastcrc import crc64

    return int(crc64.xz(payload))
