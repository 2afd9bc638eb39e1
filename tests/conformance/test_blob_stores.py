"""Every blob store keeps the one contract."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.blob.address import parse_address
from ckptstore.blob.oss import OSSBlobStore
from ckptstore.blob.retry import Retrier, RetryingBlobStore
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.testing.blob_store_tests import BlobStoreTests, BucketStoreTests
from ckptstore.testing.oss_server import OSSServer
from ckptstore.testing.s3_server import SeaweedServer

MIB = 1024**2


class TestLocalBlobStore(BucketStoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[BlobStore]:
        store = open_blob_store(f"file://{tmp_path}/store", retry=False)
        yield store
        store.close()

    @pytest.fixture
    def store_without_bucket(self, tmp_path: Path) -> BlobStore:
        return open_blob_store(f"file://{tmp_path}/not-mounted/store")


class TestMemoryBlobStore(BlobStoreTests):
    @pytest.fixture
    def store(self) -> BlobStore:
        return open_blob_store(f"mem://{uuid.uuid4().hex}", retry=False)


class TestRetryingBlobStore(BlobStoreTests):
    @pytest.fixture
    def store(self) -> BlobStore:
        return open_blob_store(f"mem://{uuid.uuid4().hex}/prefix")


def _s3(url: str, environ: dict[str, str]) -> S3BlobStore:
    return S3BlobStore(parse_address(url), environ=environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)


class TestS3BlobStoreOnSeaweed(BucketStoreTests):
    @pytest.fixture
    def store(self, seaweed: SeaweedServer) -> Iterator[BlobStore]:
        store = _s3(seaweed.url(f"t/{uuid.uuid4().hex}"), dict(seaweed.environ))
        yield store
        store.close()

    @pytest.fixture
    def store_without_bucket(self, seaweed: SeaweedServer) -> Iterator[BlobStore]:
        url = seaweed.url("prefix").replace("s3://ckptstore/", "s3://no-such-bucket/")
        store = _s3(url, dict(seaweed.environ))
        yield store
        store.close()


class TestS3BlobStoreOnMoto(BucketStoreTests):
    @pytest.fixture
    def store(self, moto_endpoint: str, moto_environ: dict[str, str]) -> Iterator[BlobStore]:
        store = _s3(f"s3://ckptstore/{uuid.uuid4().hex}?endpoint={moto_endpoint}", moto_environ)
        yield store
        store.close()

    @pytest.fixture
    def store_without_bucket(self, moto_endpoint: str, moto_environ: dict[str, str]) -> Iterator[BlobStore]:
        store = _s3(f"s3://no-such-bucket/p?endpoint={moto_endpoint}", moto_environ)
        yield store
        store.close()


class TestS3BlobStoreWithRetries(BlobStoreTests):
    @pytest.fixture
    def store(self, seaweed: SeaweedServer) -> Iterator[BlobStore]:
        attempts = Retrier()
        address = parse_address(seaweed.url(f"t/{uuid.uuid4().hex}"))
        inner = S3BlobStore(
            address, environ=seaweed.environ, attempts=attempts, single_put_bytes=5 * MIB, part_bytes=5 * MIB
        )
        store = RetryingBlobStore(inner, attempts)
        yield store
        store.close()


def test_abandoned_uploads_are_aborted_when_they_are_old(seaweed: SeaweedServer) -> None:
    store = _s3(seaweed.url("abandoned"), dict(seaweed.environ))
    client = store._connection._connected()
    for name in ("abandoned/runs/a/pack", "abandoned/runs/b/pack", "abandoned-not/pack"):
        client.create_multipart_upload(Bucket=seaweed.bucket, Key=name)
    now = datetime.now(timezone.utc)
    assert store.abort_uploads("runs/", now - timedelta(hours=1)) == 0
    assert store.abort_uploads("runs/a/", now + timedelta(minutes=1)) == 1
    assert store.abort_uploads("", now + timedelta(minutes=1)) == 1
    left = client.list_multipart_uploads(Bucket=seaweed.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["abandoned-not/pack"]
    store.close()


def _oss(url: str, environ: dict[str, str]) -> OSSBlobStore:
    return OSSBlobStore(parse_address(url), environ=environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)


class TestOSSBlobStore(BucketStoreTests):
    """With the bucket in the host name, as the service wants it."""

    @pytest.fixture
    def store(self, oss: OSSServer) -> Iterator[BlobStore]:
        store = _oss(oss.url(f"t/{uuid.uuid4().hex}"), oss.environ)
        yield store
        store.close()

    @pytest.fixture
    def store_without_bucket(self, oss: OSSServer) -> Iterator[BlobStore]:
        store = _oss(oss.url("prefix").replace("oss://ckptstore/", "oss://no-such-bucket/"), oss.environ)
        yield store
        store.close()


class TestOSSBlobStoreByAddressWithV1(BlobStoreTests):
    """By address, with signatures of the first version and temporary credentials."""

    num_many = 1_010

    @pytest.fixture
    def store(self, oss: OSSServer) -> Iterator[BlobStore]:
        url = oss.url_by_address(f"t/{uuid.uuid4().hex}") + "&auth=v1"
        store = _oss(url, oss.issue_token(600))
        yield store
        store.close()
