"""The store: objects below one prefix of a bucket."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from ckptstore.blob.address import Address
from ckptstore.blob.base import Attempts, Buffer, Capabilities, ObjectInfo, Trait, once
from ckptstore.blob.bucket import PART_BYTES, SINGLE_PUT_BYTES, BucketStore, Reading
from ckptstore.blob.keys import check_key, check_prefix, is_key
from ckptstore.blob.s3.connection import S3Connection
from ckptstore.blob.s3.kept import KEPT, Kept
from ckptstore.errors import (
    CkptError,
    CredentialsError,
    NoStoreError,
    NotFoundError,
    StorageError,
    TransientError,
)

_PARAMS = KEPT | {"endpoint", "region", "addressing", "profile", "requester_pays", "checksum", "conditional_put"}
#: Alibaba's S3 endpoint has no If-None-Match.
_UNCONDITIONAL = (".aliyuncs.com",)


class S3BlobStore(BucketStore):
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
        single_put_bytes: int = SINGLE_PUT_BYTES,
        part_bytes: int = PART_BYTES,
        read_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(address, _PARAMS, attempts, single_put_bytes, part_bytes)
        self._connection = S3Connection(address, self._bucket, environ, read_timeout_s)
        self._request = self._connection.request
        self._pays: dict[str, Any] = {"RequestPayer": "requester"} if address.flag("requester_pays") else {}
        self._kept = Kept.of(address, environ)
        self.capabilities = Capabilities(
            conditional_put=address.flag("conditional_put", not self._connection.host.endswith(_UNCONDITIONAL))
        )

    @classmethod
    def from_address(
        cls, address: Address, *, environ: Mapping[str, str] | None = None, attempts: Attempts = once
    ) -> S3BlobStore:
        """Open ``s3://bucket[/prefix][?..]``."""
        return cls(address, environ=environ, attempts=attempts)

    # -- objects -----------------------------------------------------------------------------------------------------

    def head(self, key: str) -> ObjectInfo | None:
        name = self._prefix + check_key(key)
        try:
            with self._request(f"look at {key}", key) as client:
                found = client.head_object(Bucket=self._bucket, Key=name, **self._kept.for_customer, **self._pays)
                answer = _genuine(found, self.url)
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

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        where: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix), **self._pays}
        aborted = 0
        while True:
            with self._request("list unfinished uploads", prefix) as client:
                answer = client.list_multipart_uploads(**where)
            for upload in answer.get("Uploads", ()):
                if upload["Key"].startswith(where["Prefix"]) and upload["Initiated"] < older_than:
                    self._attempts("abort", lambda u=upload: self._abort(u["Key"], u["UploadId"]))  # type: ignore[misc]
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

        along = {**self._kept.at_rest, **self._kept.for_customer, **self._pays}
        return traits(self._connection, self._prefix + check_key(key), along)

    def make_bucket(self) -> None:
        """Create the bucket, for servers of one's own. One that is there already is fine."""
        with self._request("create the bucket", "") as client:
            mine = (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists)
            with contextlib.suppress(*mine):
                client.create_bucket(Bucket=self._bucket)

    # -- one request each --------------------------------------------------------------------------------------------

    def _put_whole(self, key: str, name: str, data: Buffer, is_conditional: bool) -> None:
        payload: Any = data if isinstance(data, bytes | bytearray) else bytes(data)
        with self._request(f"write {key}", key) as client:
            answer = client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=payload,
                **self._kept.at_rest,
                **self._kept.for_customer,
                **self._pays,
                **_condition(is_conditional),
                **self._connection.guard(client, payload),
            )
            _genuine(answer, self.url)

    @contextlib.contextmanager
    def _reading(self, key: str, name: str, byte_range: str | None) -> Iterator[Reading]:
        wanted: dict[str, Any] = {"Range": byte_range} if byte_range is not None else {}
        with self._request(f"read {key}", key) as client:
            answer = client.get_object(Bucket=self._bucket, Key=name, **wanted, **self._kept.for_customer, **self._pays)
            with contextlib.closing(answer["Body"]) as body:
                _genuine(answer, self.url)
                yield Reading(answer["ResponseMetadata"]["HTTPStatusCode"], answer["ContentLength"], body.read)

    def _begin(self, key: str, name: str, is_conditional: bool) -> str:
        del is_conditional  # what joins the parts says so
        with self._request(f"write {key}", key) as client:
            answer = client.create_multipart_upload(
                Bucket=self._bucket,
                Key=name,
                **self._kept.at_rest,
                **self._kept.for_customer,
                **self._pays,
                **self._connection.declared(),
            )
            return str(_genuine(answer, self.url, "UploadId")["UploadId"])

    def _send(self, key: str, name: str, upload: str, number: int, payload: bytes) -> dict[str, Any]:
        with self._request(f"write {key}", key) as client:
            guard = self._connection.guard(client, payload)
            answer = client.upload_part(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload,
                PartNumber=number,
                Body=payload,
                **self._kept.for_customer,
                **self._pays,
                **guard,
            )
            crc = {name: value for name, value in guard.items() if name == "ChecksumCRC32"}
            return {"PartNumber": number, "ETag": _genuine(answer, self.url)["ETag"], **crc}

    def _join(
        self, key: str, name: str, upload: str, sent: Sequence[Any], body: memoryview, is_conditional: bool
    ) -> None:
        with self._request(f"write {key}", key) as client:
            answer = client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=name,
                UploadId=upload,
                MultipartUpload={"Parts": list(sent)},
                **self._pays,
                **_condition(is_conditional),
            )
            _genuine(answer, self.url)

    def _is_joined(self, key: str, name: str, sent: Sequence[Any], body: memoryview) -> bool:
        try:
            etags = [part["ETag"].strip('"') for part in sent]
            joined = hashlib.md5(b"".join(map(bytes.fromhex, etags)), usedforsecurity=False)
            with self._request(f"look at {key}", key) as client:
                found = client.head_object(Bucket=self._bucket, Key=name, **self._kept.for_customer, **self._pays)
        except (CkptError, ValueError):
            return False
        return found["ContentLength"] == len(body) and found["ETag"].strip('"') == f"{joined.hexdigest()}-{len(sent)}"

    def _abort(self, name: str, upload: str) -> None:
        with self._request("abort an upload", name) as client, contextlib.suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload, **self._pays)

    def _disconnect(self) -> None:
        self._connection.close()

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
            wanted: dict[str, Any] = {**self._kept.for_customer, **self._pays}
            client.get_object(Bucket=self._bucket, Key=name, Range="bytes=0-0", **wanted)["Body"].close()


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


def _condition(is_conditional: bool) -> dict[str, Any]:
    return {"IfNoneMatch": "*"} if is_conditional else {}


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
