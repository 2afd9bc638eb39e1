"""The store: objects below one prefix of a bucket."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from ckptstore.blob.address import Address
from ckptstore.blob.base import Attempts, BlobStore, Buffer, Capabilities, ObjectInfo, Trait, once
from ckptstore.blob.keys import check_key, check_prefix, is_key
from ckptstore.blob.multipart import MAX_PART_BYTES, MAX_PARTS, Part, parts_of, send_parts
from ckptstore.blob.ranges import exact_range, past_the_end
from ckptstore.blob.s3.connection import S3Connection
from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
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
        "addressing",
        "profile",
        "requester_pays",
        "storage_class",
        "sse",
        "kms_key",
        "checksum",
        "conditional_put",
    }
)
_MIB = 1 << 20
#: A pack of the usual 64 MiB, and the frame that closed it, go in one request: packs are sent side by side anyway.
_SINGLE_PUT_BYTES = 80 * _MIB
_DELETE_BATCH = 1000
#: Alibaba's S3 endpoint has no If-None-Match.
_UNCONDITIONAL = (".aliyuncs.com",)


class S3BlobStore(BlobStore):
    """A prefix of a bucket.

    Args:
        address: The URL, taken apart.
        environ: Where ``AWS_*`` is looked up; None: the process's environment and boto3's default chain.
        attempts: How the single requests of multi-request operations are made.
        single_put_bytes: Larger bodies are sent in parts.
        part_bytes: Least size of a part.
        read_timeout_s: Longest silence of the server.
    """

    scheme = "s3"

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
        self._connection = S3Connection(address, self._bucket, environ, read_timeout_s)
        self._request = self._connection.request
        self._attempts = attempts
        self._single_put_bytes = single_put_bytes
        self._part_bytes = part_bytes
        self._pays: dict[str, Any] = {"RequestPayer": "requester"} if address.flag("requester_pays") else {}
        self._at_rest = _at_rest(address)
        self.capabilities = Capabilities(
            conditional_put=address.flag("conditional_put", not self._connection.host.endswith(_UNCONDITIONAL)),
            max_object_bytes=min(5 * 1024**4, MAX_PARTS * MAX_PART_BYTES),
        )
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def from_address(
        cls, address: Address, *, environ: Mapping[str, str] | None = None, attempts: Attempts = once
    ) -> S3BlobStore:
        """Open ``s3://bucket[/prefix][?..]``."""
        return cls(address, environ=environ, attempts=attempts)

    # -- objects -----------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        name = self._prefix + check_key(key)
        condition: dict[str, Any] = {}
        if if_absent and self.capabilities.conditional_put:
            condition = {"IfNoneMatch": "*"}
        body = memoryview(data).cast("B")
        is_large = len(body) > self._single_put_bytes
        # A large body's condition is checked by its last request: ask first, before all the others.
        if if_absent and (is_large or not condition) and self.head(key) is not None:
            raise CheckpointExistsError(f"{self.url}: {key} exists already", key=key, bucket=self._bucket)
        if is_large:
            self._put_in_parts(key, name, body, condition)
        else:
            payload: Any = data if isinstance(data, bytes | bytearray) else bytes(body)
            with self._request(f"write {key}", key) as client:
                answer = client.put_object(
                    Bucket=self._bucket,
                    Key=name,
                    Body=payload,
                    **self._at_rest,
                    **self._pays,
                    **condition,
                    **self._connection.guard(client, payload),
                )
                _genuine(answer, self.url)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        name = self._prefix + check_key(key)
        what = f"{self.url}: {key}"
        if length == 0:
            exact_range(self._size(key), start, 0, what=what)
            return b""
        wanted: dict[str, Any] = dict(self._pays)
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-" if length is None else f"bytes={start}-{start + length - 1}"
        try:
            with self._request(f"read {key}", key) as client:
                answer = client.get_object(Bucket=self._bucket, Key=name, **wanted)
                with contextlib.closing(answer["Body"]) as body:
                    _genuine(answer, self.url)
                    size_bytes = answer["ContentLength"]
                    if "Range" in wanted and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                        raise StorageError(f"{what}: the server ignores ranges", hint="use a server that honours them")
                    if length is not None and size_bytes != length:
                        raise past_the_end(what, start, length, start + size_bytes)
                    if length is None and max_bytes is not None and size_bytes > max_bytes:
                        raise IntegrityError(
                            f"{what} has {size_bytes} bytes or more, over the limit of {max_bytes}", key=key
                        )
                    content = body.read()
        except StorageError as error:
            if error.context.get("code") != "InvalidRange" and error.context.get("status") != 416:
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
        name = self._prefix + check_key(key)
        try:
            with self._request(f"look at {key}", key) as client:
                answer = _genuine(client.head_object(Bucket=self._bucket, Key=name, **self._pays), self.url)
        except NoStoreError:
            raise
        except NotFoundError:
            self._require_bucket()
            return None
        except (CredentialsError, StorageError) as error:
            if isinstance(error, TransientError) or error.context.get("code") not in ("400", "403"):
                raise
            self._reason_of_refusal(key, name)
            raise
        return ObjectInfo(key, answer["ContentLength"], answer["LastModified"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        where: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix), **self._pays}

        def page() -> Any:
            with self._request(f"list {prefix or 'the prefix'}", prefix) as client:
                return _whole(client.list_objects_v2(**where), where.get("ContinuationToken"), self.url)

        while True:
            answer = self._attempts("list", page)
            for entry in answer.get("Contents", ()):
                key = entry["Key"][len(self._prefix) :]
                if entry["Key"].startswith(where["Prefix"]) and is_key(key):
                    yield ObjectInfo(key, entry["Size"], entry["LastModified"])
            if not answer["IsTruncated"]:
                return
            where["ContinuationToken"] = answer["NextContinuationToken"]

    def delete(self, keys: Sequence[str]) -> None:
        names = [self._prefix + check_key(key) for key in keys]
        for first in range(0, len(names), _DELETE_BATCH):
            batch = names[first : first + _DELETE_BATCH]
            self._attempts("delete", lambda batch=batch: self._delete_batch(batch))  # type: ignore[misc]

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        where: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix), **self._pays}
        aborted = 0
        while True:
            with self._request("list unfinished uploads", prefix) as client:
                answer = client.list_multipart_uploads(**where)
            for upload in answer.get("Uploads", ()):
                if upload["Key"].startswith(where["Prefix"]) and upload["Initiated"] < older_than:
                    self._abort(upload["Key"], upload["UploadId"])
                    aborted += 1
            if not answer.get("IsTruncated"):
                return aborted
            where["KeyMarker"] = answer["NextKeyMarker"]
            where["UploadIdMarker"] = answer.get("NextUploadIdMarker", "")

    def deletion_rules(self) -> builtins.list[str]:
        with self._request("read the lifecycle rules", "") as client:
            try:
                answer = client.get_bucket_lifecycle_configuration(Bucket=self._bucket)
            except client.exceptions.ClientError as error:
                if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration":
                    return []
                raise
        return [told for rule in answer.get("Rules", ()) if (told := _deletes(rule, self._prefix)) is not None]

    def traits(self, key: str) -> builtins.list[Trait]:
        from ckptstore.blob.s3.traits import traits

        return traits(self._connection, self._prefix + check_key(key), self._pays)

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool:
            pool.shutdown()
        self._connection.close()

    def make_bucket(self) -> None:
        """Create the bucket, for servers of one's own. One that is there already is fine."""
        with self._request("create the bucket", "") as client:
            mine = (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists)
            with contextlib.suppress(*mine):
                client.create_bucket(Bucket=self._bucket)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _put_in_parts(self, key: str, name: str, body: memoryview, condition: Mapping[str, Any]) -> None:
        what = f"write {key}"

        def begin() -> str:
            with self._request(what, key) as client:
                answer = client.create_multipart_upload(
                    Bucket=self._bucket, Key=name, **self._at_rest, **self._pays, **self._connection.declared()
                )
                return str(_genuine(answer, self.url, "UploadId")["UploadId"])

        def send(part: Part) -> dict[str, Any]:
            payload = bytes(body[part.start : part.stop])

            def request() -> dict[str, Any]:
                with self._request(what, key) as client:
                    guard = self._connection.guard(client, payload)
                    answer = client.upload_part(
                        Bucket=self._bucket,
                        Key=name,
                        UploadId=upload,
                        PartNumber=part.number,
                        Body=payload,
                        **self._pays,
                        **guard,
                    )
                    crc = {name: value for name, value in guard.items() if name == "ChecksumCRC32"}
                    return {"PartNumber": part.number, "ETag": _genuine(answer, self.url)["ETag"], **crc}

            return self._attempts("put", request)

        upload = self._attempts("put", begin)
        try:
            sent = send_parts(parts_of(len(body), self._part_bytes), send, self._part_pool())
            self._complete(key, name, upload, sent, len(body), condition)
        except BaseException as error:
            with contextlib.suppress(CkptError):  # the failure itself matters more; gc finds what stays behind
                self._abort(name, upload)
            if isinstance(error, StorageError) and error.context.get("code") == "NoSuchUpload":
                raise TransientError(
                    f"could not write {key}: its upload was aborted by somebody", reason="cut_off", key=key
                ) from error  # another one can succeed
            raise

    def _complete(
        self, key: str, name: str, upload: str, parts: Sequence[Any], size_bytes: int, condition: Mapping[str, Any]
    ) -> None:
        """Join the parts. If an answer was lost, the object itself says whether it was ours that was joined."""
        is_uncertain = False

        def request() -> None:
            nonlocal is_uncertain
            try:
                with self._request(f"write {key}", key) as client:
                    answer = client.complete_multipart_upload(
                        Bucket=self._bucket,
                        Key=name,
                        UploadId=upload,
                        MultipartUpload={"Parts": parts},
                        **self._pays,
                        **condition,
                    )
                    _genuine(answer, self.url)
            except StorageError as error:
                if is_uncertain and self._is_joined(name, [part["ETag"] for part in parts], size_bytes):
                    return
                is_uncertain = is_uncertain or isinstance(error, TransientError)
                raise

        self._attempts("put", request)

    def _is_joined(self, name: str, etags: Sequence[str], size_bytes: int) -> bool:
        try:
            joined = hashlib.md5(b"".join(bytes.fromhex(tag.strip('"')) for tag in etags), usedforsecurity=False)
            with self._request("look at the upload", name) as client:
                found = client.head_object(Bucket=self._bucket, Key=name, **self._pays)
        except (CkptError, ValueError):
            return False
        return found["ContentLength"] == size_bytes and found["ETag"].strip('"') == f"{joined.hexdigest()}-{len(etags)}"

    def _abort(self, name: str, upload: str) -> None:
        def request() -> None:
            with self._request("abort an upload", name) as client, contextlib.suppress(client.exceptions.NoSuchUpload):
                client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload, **self._pays)

        self._attempts("abort", request)

    def _part_pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, thread_name_prefix="ckptstore-s3-part")
            return self._pool

    # -- requests ----------------------------------------------------------------------------------------------------

    def _delete_batch(self, names: Sequence[str]) -> None:
        with self._request(f"delete {len(names)} objects", names[0]) as client:
            answer = client.delete_objects(
                Bucket=self._bucket, Delete={"Objects": [{"Key": name} for name in names]}, **self._pays
            )
        unsaid = set(names) - {deleted.get("Key", "") for deleted in answer.get("Deleted", ())}
        for failed in answer.get("Errors", ()):
            name = failed.get("Key", names[0])
            unsaid.discard(name)
            if failed.get("Code") != "NoSuchKey":
                raise self._connection.refusal(
                    f"delete {name}", name, failed.get("Code", ""), 200, failed.get("Message", "")
                ).error()
        if unsaid:
            raise TransientError(
                f"{self.url}: the answer says nothing of {len(unsaid)} of {len(names)} objects to be deleted",
                reason="damaged",
                bucket=self._bucket,
            )

    def _size(self, key: str) -> int:
        info = self.head(key)
        if info is None:
            raise NotFoundError(f"there is no object {key} in {self.url}", key=key, bucket=self._bucket)
        return info.size_bytes

    def _require_bucket(self) -> None:
        """A HEAD that finds nothing doesn't say whether the object or the bucket is missing."""
        if self._connection.has_succeeded:
            return
        try:
            with self._request("look at the bucket", "") as client:
                client.head_bucket(Bucket=self._bucket)
        except NotFoundError:
            raise self._connection.refusal("look at the bucket", "", "NoSuchBucket", 404, "").error() from None
        except CredentialsError:
            pass  # it exists; ListBucket isn't needed for reading one object

    def _reason_of_refusal(self, key: str, name: str) -> None:
        """A HEAD's refusal has no body and so no reason; GET the first byte, whose refusal has one."""
        with self._request(f"look at {key}", key) as client:
            client.get_object(Bucket=self._bucket, Key=name, Range="bytes=0-0", **self._pays)["Body"].close()


def _genuine(answer: Any, url: str, mark: str = "ETag") -> Any:
    """The answer, if it is an object store's; what a proxy or a portal in between says with status 200 is not."""
    if not answer.get(mark):
        raise TransientError(f"{url}: the answer does not come from an object store", reason="damaged", url=url)
    return answer


def _whole(answer: Any, token: str | None, url: str) -> Any:
    """The answer, if it is a listing at all, and all of it: a body that isn't one parses as an empty listing."""
    entries = answer.get("Contents", ())
    if "IsTruncated" not in answer or answer.get("KeyCount", len(entries)) != len(entries):
        raise TransientError(f"{url}: the answer is not a whole listing", reason="damaged", url=url)
    if answer["IsTruncated"] and answer.get("NextContinuationToken") in (None, "", token):
        raise TransientError(f"{url}: the listing is cut off", reason="cut_off", url=url)
    return answer


def _at_rest(address: Address) -> dict[str, Any]:
    """The put parameters that say how an object is kept."""
    kept: dict[str, Any] = {}
    if storage_class := address.params.get("storage_class"):
        kept["StorageClass"] = storage_class
    encryption, kms_key = address.params.get("sse"), address.params.get("kms_key")
    if encryption is not None:
        kept["ServerSideEncryption"] = address.choice("sse", ("AES256", "aws:kms", "aws:kms:dsse"), "AES256")
    if kms_key is not None:
        if not (encryption or "").startswith("aws:kms"):
            raise address.refuse("has kms_key without sse=aws:kms", hint="add sse=aws:kms, or take kms_key out")
        kept["SSEKMSKeyId"] = kms_key
    return kept


#: Storage classes that have to be thawed before they can be read.
_FROZEN = frozenset({"GLACIER", "DEEP_ARCHIVE"})


def _deletes(rule: Mapping[str, Any], prefix: str) -> str | None:
    """What a lifecycle rule does to objects below ``prefix``, if it takes them away."""
    where = rule.get("Filter", {})
    start = where.get("Prefix") or where.get("And", {}).get("Prefix") or rule.get("Prefix") or ""
    if rule.get("Status") != "Enabled" or not (start.startswith(prefix) or prefix.startswith(start)):
        return None
    name = f"rule {rule.get('ID') or start!r}"
    if "Days" in rule.get("Expiration", {}) or "Date" in rule.get("Expiration", {}):
        return f"{name} deletes objects by age"
    if any(move.get("StorageClass") in _FROZEN for move in rule.get("Transitions", ())):
        return f"{name} freezes objects by age"
    return None
