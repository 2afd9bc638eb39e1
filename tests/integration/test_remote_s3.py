"""The remote half against a real S3 server: round trip, deduplication, resume, damage, several ranks."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.blob.address import parse_address
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, CredentialsError, IntegrityError, NoStoreError
from ckptstore.format.manifest import RootManifest
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier, runs
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import Array, new_save_id, write_checkpoint
from ckptstore.testing.s3_server import SeaweedServer
from ckptstore.testing.watched import WatchedBlobStore

CONFIG = StoreConfig(pack_bytes=2 << 20)
State = dict[str, Array]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def blob(server: SeaweedServer) -> Iterator[BlobStore]:
    store = open_blob_store(server.url(f"bucket-prefix/{new_nonce()}"), environ=server.environ)
    yield store
    store.close()


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


def state_of(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    state: State = {f"layer{n}.weight": rng.normal(size=(300, 500)).astype("float32") for n in range(10)}
    return state | {"half": rng.integers(0, 2**16, size=(64, 9), dtype="uint16"), "step": np.array(3, dtype="int64")}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def written(tier: LocalTier, state: State, **options: object) -> Path:
    return write_checkpoint(tier, state, dtypes={"half": "bfloat16"}, chunk_elements=1 << 15, **options)  # type: ignore[arg-type]


def read_all(reader: CheckpointReader) -> dict[str, bytes]:
    values = {}
    for fqn in reader.tensors:
        parts = []
        for rank, index, _ in sorted(reader.pieces(fqn), key=lambda item: item[2].offsets):
            for chunk in reader.chunks(rank, index):
                out = bytearray(chunk.size_bytes)
                reader.read_chunk(rank, index, chunk.index, memoryview(out))
                parts.append(bytes(out))
        values[fqn] = b"".join(parts)
    return values


def test_machine_is_rebuilt_byte_for_byte_when_its_disk_is_gone(blob: BlobStore, tier: LocalTier) -> None:
    remote, state = RemoteTier(blob, "default", "s3"), state_of()
    path = written(tier, state, world_size=2, extras={"epoch": 4})
    assert push(tier, path, "default", remote, config=CONFIG).committed is not None
    original = contents(path)
    shutil.rmtree(tier.root)
    tier.create()
    fresh = RemoteTier(blob, "default", "s3")
    assert runs(blob) == ["default"]
    [save] = fresh.saves()
    assert contents(pull(fresh, save, tier)) == original
    record = Catalog.read(tier, [fresh], "default").resolve("latest")
    with CheckpointReader(record, tier, [fresh]) as reader:
        assert read_all(reader) == {name: array.tobytes() for name, array in state.items()}
        assert set(reader.bytes_by_source) == {"local"}


def test_about_the_parameter_is_sent_when_one_changed(blob: BlobStore, tier: LocalTier) -> None:
    state = state_of()
    first = push(tier, written(tier, state, step=1), "default", RemoteTier(blob, "default", "s3"), config=CONFIG)
    state["layer4.weight"] = state_of(1)["layer4.weight"]
    watched = WatchedBlobStore(blob)
    path = written(tier, state, step=2)
    push(tier, path, "default", RemoteTier(watched, "default", "s3"), config=CONFIG)
    changed = state["layer4.weight"].nbytes
    assert 0.5 * changed < watched.sent_bytes("put", "/packs/") <= changed
    assert watched.sent_bytes("put") < changed + 64 * 1024
    assert first.sent_bytes > 8 * changed * 0.8


def test_packs_are_not_sent_twice_when_a_cancelled_push_goes_on(blob: BlobStore, tier: LocalTier) -> None:
    watched = WatchedBlobStore(blob)
    path = written(tier, state_of(), world_size=2)
    asked = iter(range(10**6))
    first = push(
        tier,
        path,
        "default",
        RemoteTier(watched, "default", "s3"),
        config=CONFIG,
        cancelled=lambda: next(asked) > 40,
    )
    assert first.is_cancelled
    assert first.sent_bytes > 0
    remote = RemoteTier(watched, "default", "s3")
    assert remote.saves() == []
    second = push(tier, path, "default", remote, config=CONFIG)
    assert second.committed is not None
    packs = [request.key for request in watched.requests if request.op == "put" and "/packs/" in request.key]
    assert len(packs) == len(set(packs)) == len(list(blob.list("runs/default/packs/")))
    assert [info.key for info in blob.list("runs/default/intents/")] == []


@pytest.mark.parametrize("damage", ["local", "both", "pack gone", "pack cut"])
def test_good_bytes_or_an_error_that_names_the_parameter_when_damaged(
    blob: BlobStore, tier: LocalTier, damage: str
) -> None:
    remote, state = RemoteTier(blob, "default", "s3"), state_of()
    path = written(tier, state, world_size=2)
    push(tier, path, "default", remote, config=CONFIG)
    original = (path / "__1_0.distcp").read_bytes()
    data = bytearray(original)
    shard = tier.shard_manifest(path, 1)
    piece = next(p for p in shard.pieces if p.fqn == "layer7.weight")
    data[piece.start + 1000] ^= 1
    (path / "__1_0.distcp").write_bytes(data)
    document = remote.find_shard(shard.save_id, 1)
    assert document is not None
    frame = document.frames[document.chunks[shard.pieces.index(piece)][0]]
    key = f"runs/default/{document.packs[frame.pack]}"
    pack = bytearray(blob.get(key))
    if damage == "both":
        pack[frame.offset + frame.length // 2] ^= 1
        blob.put(key, pack)
    elif damage == "pack gone":
        blob.delete([key])
    elif damage == "pack cut":
        blob.put(key, pack[: frame.offset + frame.length // 2])
    record = Catalog.read(tier, [remote], "default").resolve("latest")
    with CheckpointReader(record, tier, [remote]) as reader:
        if damage == "local":
            assert read_all(reader) == {name: array.tobytes() for name, array in state.items()}
            assert reader.repaired == ("__1_0.distcp",)
            assert (path / "__1_0.distcp").read_bytes() == original
        else:
            with pytest.raises(IntegrityError, match=r"layer7\.weight \(rank 1"):
                read_all(reader)


def test_last_one_commits_when_two_nodes_push_at_once(blob: BlobStore, tmp_path: Path) -> None:
    state, save_id = state_of(), new_save_id()
    tiers = [LocalTier(tmp_path / f"node{n}") for n in range(2)]
    paths = [written(tiers[n], state, world_size=2, ranks=[n], save_id=save_id) for n in range(2)]
    results: list[RootManifest | CkptError | None] = []

    def node(n: int) -> None:
        try:
            remote = RemoteTier(blob, "default", "s3")
            results.append(push(tiers[n], paths[n], "default", remote, config=CONFIG).committed)
        except CkptError as error:
            results.append(error)

    threads = [threading.Thread(target=node, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    roots = [root for root in results if isinstance(root, RootManifest)]
    assert len(results) == 2
    assert roots, results
    assert all(root == roots[0] for root in roots)
    assert not [result for result in results if isinstance(result, CkptError)]
    remote = RemoteTier(blob, "default", "s3")
    [save] = remote.saves()
    assert remote.root_manifest(save) == roots[0]
    target = LocalTier(tmp_path / "fresh")
    target.create()
    for part in range(2):
        path = pull(remote, save, target, part=(part, 2))
    for rank in range(2):
        name = f"__{rank}_0.distcp"
        assert (path / name).read_bytes() == (paths[rank] / name).read_bytes()
    assert (path / "manifest.json").exists()


def test_missing_bucket_and_bad_credentials_stop_at_once(server: SeaweedServer, tier: LocalTier) -> None:
    path = written(tier, {"x": np.ones(5, dtype="float32")})
    nowhere = server.url().replace(f"s3://{server.bucket}", "s3://no-such-bucket-here")
    with pytest.raises(NoStoreError):
        push(
            tier,
            path,
            "default",
            RemoteTier(open_blob_store(nowhere, environ=server.environ), "default", "s3"),
            config=CONFIG,
        )
    with pytest.raises(NoStoreError):
        RemoteTier(open_blob_store(nowhere, environ=server.environ), "default", "s3").saves()
    environ = dict(server.environ) | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(CredentialsError):
        RemoteTier(open_blob_store(server.url("x"), environ=environ), "default", "s3").saves()


def test_nothing_is_overwritten_when_the_bucket_is_locked(server: SeaweedServer, tier: LocalTier) -> None:
    """Object lock with a default retention: every document and pack has one version, whatever happened on its way."""
    store = S3BlobStore(parse_address(server.url().replace(server.bucket, "locked")), environ=dict(server.environ))
    with store._connection.request("prepare", "") as client:
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
        client.put_object_lock_configuration(
            Bucket="locked",
            ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule},  # type: ignore[typeddict-item]
        )
    remote = RemoteTier(store, "default", "s3")
    paths = [written(tier, state_of(step), step=step) for step in (1, 2)]
    for path in (paths[0], paths[0], paths[1]):  # the second time it is only looked over
        assert push(tier, path, "default", remote, config=CONFIG).committed is not None
    remote.claim_timeline(1, b"{}")
    with store._connection.request("look", "") as client:
        listed = client.list_object_versions(Bucket="locked")["Versions"]
        again = {one["Key"].split("/")[2] for one in listed if not one["IsLatest"] and one["Key"].startswith("runs/")}
        assert again <= {"intents", "news"}
        assert client.head_object(Bucket="locked", Key=listed[0]["Key"])["ObjectLockMode"] == "COMPLIANCE"
    fresh = LocalTier(tier.root.parent / "fresh")
    fresh.create()
    assert contents(pull(remote, remote.saves()[1], fresh)) == contents(paths[1])
    store.close()
