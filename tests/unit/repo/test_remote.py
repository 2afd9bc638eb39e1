"""Names, documents and the commit in an object store."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ConflictError,
    FormatError,
    IntegrityError,
    NoStoreError,
    NotFoundError,
    TransientError,
)
from ckptstore.format.manifest import Frame, RemoteShard, canonical, root_of
from ckptstore.repo import remote as remote_module
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import check_remote_shard
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import new_save_id, write_checkpoint
from ckptstore.testing.watched import Request, WatchedBlobStore

CONFIG = StoreConfig()
STATE = {"weight": np.arange(12_000, dtype="float32").reshape(120, 100), "steps": np.array(7, dtype="int64")}


@pytest.fixture
def blob() -> BlobStore:
    return open_blob_store(f"mem://{new_nonce()}", retry=False)


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


def committed(tier: LocalTier, blob: BlobStore, **options: object) -> tuple[RemoteTier, RemoteSave]:
    """A tier with one more committed save."""
    remote = RemoteTier(blob, "default", "r")
    root = push(tier, write_checkpoint(tier, STATE, **options), "default", remote, config=CONFIG).committed  # type: ignore[arg-type]
    assert root is not None
    return remote, RemoteSave.of(root.summary)


@given(st.integers(1, 10**9), st.integers(0, 10**13), st.integers(1, 10**8))
def test_name_comes_back_when_parsed(timeline: int, step: int, counter: int) -> None:
    save = RemoteSave(timeline, step, f"0123456789ab-{counter}")
    assert RemoteSave.parse(save.name) == save


@pytest.mark.parametrize(
    "name",
    [
        "latest.json",
        "1-000000000001-0123456789ab-1.json",
        "00000001-000000000001-0123456789AB-1.json",
        "000000001-000000000001-0123456789ab-1.json",
        "00000001-000000000001-0123456789ab-1.json.tmp",
        "00000001-000000000001-0123456789ab-1.json\n",
        "00000001-00000000000١-0123456789ab-1.json",
    ],
)
def test_name_is_foreign_when_this_store_would_not_have_written_it(name: str) -> None:
    assert RemoteSave.parse(name) is None


def test_saves_are_in_order_and_foreign_objects_ignored_when_listed(blob: BlobStore, tier: LocalTier) -> None:
    remote, nine = committed(tier, blob, step=9)
    _, ten = committed(tier, blob, step=10)
    _, branch = committed(tier, blob, step=2, timeline=2)
    blob.put("runs/default/commits/readme.txt", b"hello")
    blob.put("runs/default-2/commits/" + ten.name, b"{}")
    assert remote.saves() == [nine, ten, branch]
    assert remote_module.runs(blob) == ["default"]
    assert [remote.summary(s).step for s in remote.saves()] == [9, 10, 2]


def test_runs_are_listed_without_their_contents_when_asked(blob: BlobStore, tier: LocalTier) -> None:
    for run in ("b.1", "a"):
        RemoteTier(blob, run, "r").claim_timeline(1, b"{}")
    blob.put("names/not/ours", b"")
    watched = WatchedBlobStore(blob)
    assert remote_module.runs(watched) == ["a", "b.1"]
    assert [request.key for request in watched.requests] == ["names/"]


def test_nothing_is_written_when_the_store_is_of_a_newer_version(blob: BlobStore, tier: LocalTier) -> None:
    blob.put("ckptstore.json", canonical({"format": "ckptstore", "version": 2}))
    remote = RemoteTier(blob, "default", "r")
    with pytest.raises(FormatError, match="upgrade"):
        push(tier, write_checkpoint(tier, STATE), "default", remote, config=CONFIG)
    with pytest.raises(FormatError):
        remote.exists()
    with pytest.raises(FormatError):
        remote.claim_timeline(1, b"x")
    assert [info.key for info in blob.list()] == ["ckptstore.json"]


@pytest.mark.parametrize(
    "marker",
    [
        b"",
        b"{}",
        b"{}x",
        b'{"format":"ckptstore"',
        b'{"format":"ckptstore"}',
        b"[1]",
        b'{"format":"other","version":1}',
    ],
)
def test_store_is_refused_when_its_marker_is_damaged(blob: BlobStore, marker: bytes) -> None:
    blob.put("ckptstore.json", marker)
    with pytest.raises(FormatError):
        RemoteTier(blob, "default", "r").create()


def test_store_exists_when_something_was_written(blob: BlobStore) -> None:
    remote = RemoteTier(blob, "default", "r")
    assert not remote.exists()
    assert remote.saves() == []
    remote.create()
    assert remote.exists()


def test_missing_bucket_is_no_empty_store_when_asked() -> None:
    def gone(request: Request) -> None:
        raise NoStoreError("the bucket is missing", bucket="b")

    remote = RemoteTier(WatchedBlobStore(open_blob_store(f"mem://{new_nonce()}"), before=gone), "default", "r")
    for ask in (remote.exists, remote.saves, remote.create):
        with pytest.raises(NoStoreError):
            ask()


def test_run_name_is_refused_when_it_could_become_a_path(blob: BlobStore) -> None:
    with pytest.raises(ConfigError):
        RemoteTier(blob, "../other", "r")


def test_root_manifest_is_refused_when_it_was_swapped_with_another(blob: BlobStore, tier: LocalTier) -> None:
    remote, one = committed(tier, blob, step=1)
    _, two = committed(tier, blob, step=2)
    blob.put(f"runs/default/{two.key}", blob.get(f"runs/default/{one.key}"))
    blob.put(f"runs/default/summaries/{two.name}", blob.get(f"runs/default/summaries/{one.name}"))
    with pytest.raises(FormatError, match="is about save"):
        remote.root_manifest(two)
    with pytest.raises(FormatError, match="is about save"):
        remote.summary(two)


def test_summary_comes_from_the_root_manifest_when_its_object_is_gone(blob: BlobStore, tier: LocalTier) -> None:
    remote, save = committed(tier, blob)
    blob.delete([f"runs/default/summaries/{save.name}"])
    assert remote.summary(save).save_id == save.save_id
    blob.delete([f"runs/default/{save.key}"])
    with pytest.raises(CheckpointNotFoundError):
        remote.summary(save)


def test_shard_manifest_is_refused_when_it_is_not_the_committed_one(blob: BlobStore, tier: LocalTier) -> None:
    remote, save = committed(tier, blob)
    [ref] = remote.root_manifest(save).shards
    key = f"runs/default/shards/{save.save_id}/shard-00000.json"
    good = remote.remote_shard(save.save_id, ref)
    piece = good.shard.pieces[0].model_copy(update={"digests": ("0" * 32,) * len(good.shard.pieces[0].digests)})
    forged = good.shard.model_copy(update={"pieces": (piece, *good.shard.pieces[1:])})
    blob.put(key, good.model_copy(update={"shard": forged}).encode())
    with pytest.raises(IntegrityError, match="not the committed one"):
        remote.remote_shard(save.save_id, ref)
    blob.delete([key])
    with pytest.raises(NotFoundError):
        remote.remote_shard(save.save_id, ref)


def _twice(frame: Frame) -> Frame:
    return frame.model_copy(update={"size_bytes": 2 * frame.size_bytes})


def _tampered(good: RemoteShard) -> dict[str, RemoteShard]:
    frame = good.frames[0]

    def with_frame(**update: object) -> RemoteShard:
        return good.model_copy(update={"frames": (frame.model_copy(update=update), *good.frames[1:])})

    return {
        "pack outside its table": with_frame(pack=99),
        "frame far larger than its chunk": with_frame(length=1 << 40),
        "chunk of another size": with_frame(size_bytes=3),
        "chunk of impossible size": with_frame(size_bytes=1 << 40),
        "base of a base": with_frame(base=frame.model_copy(update={"base": frame})),
        "delta without a base": with_frame(codec="delta"),
        "full frame with a base": with_frame(base=frame),
        "delta on a base of another size": with_frame(codec="delta", base=frame.model_copy(update={"size_bytes": 8})),
        "derived from a master of its own size": with_frame(codec="derived", base=frame),
        "derived from a derived one": with_frame(
            codec="derived", base=_twice(frame).model_copy(update={"codec": "derived", "base": _twice(_twice(frame))})
        ),
        "delta on a derived one": with_frame(
            codec="delta", base=frame.model_copy(update={"codec": "derived", "base": _twice(frame)})
        ),
        "unknown codec": with_frame(codec="lzma"),
        "path as pack": good.model_copy(update={"packs": ("../../etc/passwd",)}),
        "frame outside its table": good.model_copy(update={"chunks": ((10**6,), *good.chunks[1:])}),
        "negative index": good.model_copy(update={"chunks": (tuple(-1 for _ in good.chunks[0]), *good.chunks[1:])}),
        "chunks missing": good.model_copy(update={"chunks": ((), *good.chunks[1:])}),
    }


@pytest.mark.parametrize("kind", range(16))
def test_remote_shard_is_refused_when_its_frames_are_impossible(blob: BlobStore, tier: LocalTier, kind: int) -> None:
    remote, save = committed(tier, blob)
    good = remote.find_shard(save.save_id, 0)
    assert good is not None
    check_remote_shard(good)
    assert len(_tampered(good)) == 16
    bad = list(_tampered(good).values())[kind]
    with pytest.raises(FormatError):
        check_remote_shard(bad)
    blob.put(f"runs/default/shards/{save.save_id}/shard-00000.json", bad.encode())
    with pytest.raises(FormatError):
        remote.find_shard(save.save_id, 0)


def test_timeline_is_claimed_once_when_several_try(blob: BlobStore) -> None:
    remote, other = (RemoteTier(blob, "default", name) for name in "ab")
    assert remote.claim_timeline(3, b"job one")
    assert remote.claim_timeline(3, b"job one"), "the answer to the first request may have been lost"
    assert not other.claim_timeline(3, b"job two")
    assert other.claim_timeline(4, b"job two")
    blob.put("runs/default/timelines/5.json", b"")
    assert other.timelines() == [3, 4]


def test_pins_are_a_set_when_set_twice(blob: BlobStore) -> None:
    remote, save_id = RemoteTier(blob, "default", "r"), new_save_id()
    remote.pin(save_id)
    remote.pin(save_id)
    blob.put("runs/default/pins/notes", b"")
    assert remote.pins() == {save_id}
    remote.unpin(save_id)
    remote.unpin(save_id)
    assert remote.pins() == set()
    with pytest.raises(ConfigError):
        remote.pin("../x")


def test_commit_is_a_conflict_when_another_root_has_the_name(blob: BlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, STATE)
    shards = tier.shard_manifests_present(path)
    stopped = RemoteTier(WatchedBlobStore(blob, before=lambda r: _stop_at(r, "/commits/")), "default", "r")
    with pytest.raises(TransientError):
        push(tier, path, "default", stopped, config=CONFIG)
    root = root_of(shards)
    other = root.model_copy(update={"summary": root.summary.model_copy(update={"epoch": 99})})
    blob.put(f"runs/default/{RemoteSave.of(root.summary).key}", other.encode())
    remote = RemoteTier(blob, "default", "r")
    with pytest.raises(ConflictError):
        remote.try_commit(root.summary.save_id)
    assert remote.root_manifest(RemoteSave.of(root.summary)) == other


def test_shard_manifest_of_an_earlier_attempt_counts_when_its_frames_differ(blob: BlobStore, tier: LocalTier) -> None:
    remote, save = committed(tier, blob)
    first = remote.find_shard(save.save_id, 0)
    assert first is not None
    again = first.model_copy(update={"stored_bytes": first.stored_bytes + 1})
    assert remote.put_shard(again) == first
    shard = first.shard.model_copy(update={"skeleton_digest": "0" * 32})
    with pytest.raises(ConflictError):
        remote.put_shard(first.model_copy(update={"shard": shard}))


def test_lost_answer_to_the_commit_is_success_when_tried_again(blob: BlobStore, tier: LocalTier) -> None:
    lost: list[str] = []

    def lose(request: Request) -> None:
        if request.op == "put" and request.key not in lost:
            lost.append(request.key)
            raise TransientError("the answer was lost", reason="cut_off")

    remote = RemoteTier(WatchedBlobStore(blob, after=lose), "default", "r")
    path = write_checkpoint(tier, STATE, world_size=2)
    result = None
    for _ in range(40):
        try:
            result = push(tier, path, "default", remote, config=CONFIG)
            break
        except TransientError:
            continue
    assert result is not None
    assert result.committed is not None
    assert [s.save_id for s in remote.saves()] == [result.committed.summary.save_id]
    assert len(lost) >= 8, "marker, name, intent, packs, shards, summary, root"
    assert not list(blob.list("runs/default/intents/"))


def test_root_is_written_once_when_committers_race(blob: BlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, STATE, world_size=4)
    remote = RemoteTier(blob, "default", "r")
    barrier = threading.Barrier(4)

    def meet(request: Request) -> None:
        if request.op == "put" and "/commits/" in request.key:
            barrier.wait(10)

    remotes = [RemoteTier(WatchedBlobStore(blob, before=meet), "default", "r") for _ in range(4)]
    save_id = tier.shard_manifests_present(path)[0].save_id
    stopped = RemoteTier(
        WatchedBlobStore(blob, before=lambda r: _stop_at(r, f"shards/{save_id}/shard-00003")), "default", "r"
    )
    with pytest.raises(TransientError):
        push(tier, path, "default", stopped, config=CONFIG)
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda r=r: results.append(push(tier, path, "default", r, config=CONFIG).committed))
        for r in remotes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 4
    assert all(root == results[0] for root in results)
    assert len(remote.saves()) == 1


def _stop_at(request: Request, part: str) -> None:
    if request.op == "put" and part in request.key:
        raise TransientError("stopped here", reason="unreachable")
