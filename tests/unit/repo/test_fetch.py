"""pull: a local checkpoint made of remote bytes, equal to the original."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    IntegrityError,
    NoSpaceError,
    NoStoreError,
    TransientError,
)
from ckptstore.format.manifest import RemoteShard
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import PlacedFrame, ranges
from ckptstore.repo.progress import Progress
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.record import Record
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import Array, write_checkpoint
from ckptstore.testing.watched import Request, WatchedBlobStore

CONFIG = StoreConfig(pack_bytes=1 << 20)
State = dict[str, Array]


def state_of(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    state: State = {f"layer{n}.weight": rng.normal(size=(200, 300)).astype("float32") for n in range(5)}
    state["half"] = rng.integers(0, 2**16, size=(64, 9), dtype="uint16")
    state["zeros"] = np.zeros((40, 500), dtype="float32")
    state["tied"] = state["layer0.weight"]
    state["none"] = np.zeros((0, 3), dtype="int64")
    state["step"] = np.array(12, dtype="int64")
    return state


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


@pytest.fixture
def fresh(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "fresh")
    tier.create()
    return tier


def remote_at(url: str | None = None, name: str = "r") -> tuple[RemoteTier, WatchedBlobStore]:
    blob = WatchedBlobStore(open_blob_store(url or f"mem://{new_nonce()}", retry=False))
    return RemoteTier(blob, "default", name), blob


def saved(tier: LocalTier, *remotes: RemoteTier, seed: int = 0, step: int = 5, world_size: int = 3) -> Path:
    path = write_checkpoint(
        tier,
        state_of(seed),
        step=step,
        world_size=world_size,
        dtypes={"half": "bfloat16"},
        extras={"epoch": 3, "note": "text"},
    )
    for remote in remotes:
        assert push(tier, path, "default", remote, config=CONFIG).committed is not None
    return path


@pytest.mark.parametrize("scheme", ["mem", "file"])
def test_every_file_is_byte_equal_when_pulled(tier: LocalTier, fresh: LocalTier, tmp_path: Path, scheme: str) -> None:
    remote, _ = remote_at(f"mem://{new_nonce()}" if scheme == "mem" else f"file://{tmp_path}/bucket")
    if scheme == "file":
        (tmp_path / "bucket").mkdir()
    original = contents(saved(tier, remote))
    [save] = remote.saves()
    pulled = pull(remote, save, fresh)
    assert contents(pulled) == original
    assert set(original) >= {".metadata", "summary.json", "manifest.json", "__2_0.distcp", "shard-00002.json"}
    [local] = fresh.saves("default")
    assert (local.state, local.damaged, local.path) == ("complete", None, pulled)
    assert not list(pulled.parent.glob(".staging-*"))


def test_every_file_is_byte_equal_when_deltas_are_pulled(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    state = state_of()
    for step in (1, 2):
        path = write_checkpoint(tier, state, step=step)
        push(tier, path, "default", remote, config=CONFIG)
        state = {
            name: (array * np.float32(1 + 1e-5)).astype(array.dtype) if array.dtype == np.float32 else array
            for name, array in state.items()
        }
    save = remote.saves()[-1]
    document = remote.find_shard(save.save_id, 0)
    assert document is not None
    assert sum(frame.base is not None for frame in document.frames) > 10
    blob.requests.clear()
    assert contents(pull(remote, save, fresh)) == contents(path)
    assert sum("/packs/" in r.key for r in blob.requests) <= 8, "neighbouring frames share a request"


def test_nothing_is_asked_of_the_remote_when_the_checkpoint_is_here(tier: LocalTier) -> None:
    remote, blob = remote_at()
    path = saved(tier, remote)
    [save] = remote.saves()
    blob.requests.clear()
    assert pull(remote, save, tier) == path
    assert blob.requests == []


def test_save_is_not_found_when_no_remote_has_it(fresh: LocalTier) -> None:
    remote, _ = remote_at()
    with pytest.raises(CheckpointNotFoundError):
        pull(remote, RemoteSave(1, 5, "0123456789ab-1"), fresh)
    assert fresh.saves("default") == []


def test_store_is_needed_when_pulling(tier: LocalTier, tmp_path: Path) -> None:
    remote, _ = remote_at()
    saved(tier, remote)
    with pytest.raises(NoStoreError):
        pull(remote, remote.saves()[0], LocalTier(tmp_path / "nowhere"))


@pytest.mark.parametrize("part", [(1, 1), (-1, 2), (0, 0)])
def test_part_is_refused_when_it_makes_no_sense(fresh: LocalTier, part: tuple[int, int]) -> None:
    remote, _ = remote_at()
    with pytest.raises(ConfigError):
        pull(remote, RemoteSave(1, 5, "0123456789ab-1"), fresh, part=part)


def test_verified_chunks_are_kept_when_a_broken_pull_goes_on(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    original = contents(saved(tier, remote))
    [save] = remote.saves()
    blob.requests.clear()
    count = 0

    def fail(request: Request) -> None:
        nonlocal count
        count += "/packs/" in request.key
        if count > 3:
            raise TransientError("the network is gone", reason="unreachable")

    blob.before = fail
    with pytest.raises(TransientError):
        pull(remote, save, fresh, concurrency=1)
    assert fresh.saves("default") == [], "a part of a save is not a save"
    blob.before = None
    fetched = sum("/packs/" in r.key for r in blob.requests if r.op == "get")
    blob.requests.clear()
    assert contents(pull(remote, save, fresh)) == original
    everything = sum(file for file in (len(data) for name, data in original.items() if name.endswith(".distcp")))
    assert fetched >= 3
    assert blob.sent_bytes("get", "/packs/") < 0.9 * everything


def test_chunks_are_fetched_again_when_a_broken_pull_left_damage(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    original = contents(saved(tier, remote))
    [save] = remote.saves()

    def fail(request: Request) -> None:
        if "shard-00002" in request.key:
            raise TransientError("the network is gone", reason="unreachable")

    blob.before = fail
    with pytest.raises(TransientError):
        pull(remote, save, fresh)
    [staging] = fresh.root.glob("default/.staging-*")
    file = staging / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[:] = bytes(len(data) // 2) + data[len(data) // 2 :] + b"behind the end"
    file.write_bytes(data)
    for name in ("manifest.json", "shard-00000.json", ".manifest.json.0123456789ab.tmp"):
        (staging / name).write_bytes(b"{")
    blob.before = None
    assert contents(pull(remote, save, fresh)) == original


def test_parts_make_a_whole_when_pulled_into_one_tier(tier: LocalTier, fresh: LocalTier) -> None:
    remote, _ = remote_at()
    original = contents(saved(tier, remote, world_size=4))
    [save] = remote.saves()
    first = pull(remote, save, fresh, part=(1, 2))
    assert sorted(contents(first)) == ["__1_0.distcp", "__3_0.distcp", "shard-00001.json", "shard-00003.json"]
    [local] = fresh.saves("default")
    assert local.state == "prepared"
    assert pull(remote, save, fresh, part=(1, 2)) == first
    assert contents(pull(remote, save, fresh, part=(0, 2))) == original


def test_parts_make_a_whole_when_pulled_at_once(tier: LocalTier, fresh: LocalTier) -> None:
    remote, _ = remote_at()
    original = contents(saved(tier, remote, world_size=4))
    [save] = remote.saves()
    errors: list[BaseException] = []

    def one(part: int) -> None:
        try:
            pull(remote, save, fresh, part=(part, 3))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(part % 3,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    [local] = fresh.saves("default")
    assert contents(local.path) == original


def test_missing_shards_are_added_when_this_node_has_its_own(tier: LocalTier, tmp_path: Path) -> None:
    nodes = [LocalTier(tmp_path / f"node{n}") for n in range(2)]
    remote, _ = remote_at()
    whole = saved(tier, world_size=2)
    original = contents(whole)
    [at_home] = tier.saves("default")
    for rank, node in enumerate(nodes):
        node.create()
        target = node.root / "default" / whole.name
        target.mkdir(parents=True)
        for name in (f"__{rank}_0.distcp", f"shard-0000{rank}.json"):
            shutil.copy(whole / name, target / name)
        push(node, target, "default", remote, config=CONFIG)
    [save] = remote.saves()
    assert save.save_id == at_home.save_id
    assert contents(pull(remote, save, nodes[0])) == original
    # a part that was completed on its node, as after the word that all are prepared
    for name in ("manifest.json", "summary.json"):
        (nodes[1].root / "default" / whole.name / name).write_bytes(original[name])
    assert contents(pull(remote, save, nodes[1])) == original


@pytest.mark.parametrize("damage", ["flipped", "gone", "cut", "shard gone", "root gone", "unreachable"])
def test_the_other_remote_helps_when_the_first_is_damaged(tier: LocalTier, fresh: LocalTier, damage: str) -> None:
    (first, blob), (second, _) = remote_at(name="first"), remote_at(name="second")
    original = contents(saved(tier, first, second))
    [save] = first.saves()
    packs = [info.key for info in blob.list("runs/default/packs/")]
    if damage == "flipped":
        for key in packs:
            data = bytearray(blob.get(key))
            data[len(data) // 2] ^= 1
            blob.put(key, bytes(data))
    elif damage == "gone":
        blob.delete(packs)
    elif damage == "cut":
        data = bytearray(blob.get(packs[0]))
        blob.put(packs[0], bytes(data[: len(data) // 2]))
    elif damage == "shard gone":
        blob.delete([f"runs/default/shards/{save.save_id}/shard-00001.json"])
    elif damage == "root gone":
        blob.delete([f"runs/default/{save.key}"])
    else:

        def refuse(request: Request) -> None:
            raise TransientError("unreachable", reason="unreachable")

        blob.before = refuse
    assert contents(pull([first, second], save, fresh)) == original


def test_parameter_is_named_when_no_remote_has_it_whole(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    saved(tier, remote)
    [save] = remote.saves()
    document = remote.find_shard(save.save_id, 1)
    assert isinstance(document, RemoteShard)
    number = [piece.fqn for piece in document.shard.pieces].index("layer3.weight")
    frame = document.frames[document.chunks[number][0]]
    key = f"runs/default/{document.packs[frame.pack]}"
    data = bytearray(blob.get(key))
    data[frame.offset + frame.length // 2] ^= 4
    blob.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=r"layer3\.weight \(rank 1, step 5\)"):
        pull(remote, save, fresh)
    assert fresh.saves("default") == []


def test_everything_is_made_whole_when_a_damaged_checkpoint_is_reverified(tier: LocalTier) -> None:
    remote, blob = remote_at()
    path = saved(tier, remote)
    original = contents(path)
    flipped = bytearray(original["__0_0.distcp"])
    piece = tier.shard_manifest(path, 0).pieces[1]
    flipped[piece.start + 10] ^= 1  # a payload byte
    flipped[5] ^= 1  # an envelope byte
    (path / "__0_0.distcp").write_bytes(flipped)
    (path / "__1_0.distcp").unlink()
    (path / "__2_0.distcp").write_bytes(original["__2_0.distcp"][:5000] + b"tail")
    (path / "shard-00001.json").write_bytes(b"{}")
    (path / "manifest.json").write_bytes(original["manifest.json"].replace(b'"epoch":null', b'"epoch":1234'))
    (path / "summary.json").unlink()
    (path / ".metadata").write_bytes(b"")
    [save] = remote.saves()
    assert pull(remote, save, tier, reverify=True) == path
    assert contents(path) == original
    blob.requests.clear()
    pull(remote, save.save_id, tier, reverify=True)
    assert not [request for request in blob.requests if "/packs/" in request.key]


def test_ranks_without_tensors_are_byte_equal_when_pulled(tier: LocalTier, fresh: LocalTier) -> None:
    remote, _ = remote_at()
    path = write_checkpoint(tier, {"step": np.array(1.5, dtype="float64")}, world_size=3)
    push(tier, path, "default", remote, config=CONFIG)
    assert contents(pull(remote, remote.saves()[0], fresh)) == contents(path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_disk_is_cleaned_up_and_the_errno_named_when_it_is_full(tier: LocalTier, tmp_path: Path) -> None:
    remote, blob = remote_at()
    original = contents(saved(tier, remote))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        target = LocalTier(small)
        target.create()
        [save] = remote.saves()
        blob.requests.clear()
        with pytest.raises(NoSpaceError, match="ENOSPC"):
            pull(remote, save, target)
        assert not list(small.rglob("*.distcp"))
        assert target.saves("default") == []
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        assert contents(pull(remote, save, target)) == original
    finally:
        subprocess.run(["umount", small], check=True)


def test_parameter_is_named_when_packs_were_swapped(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    raw = StoreConfig(compress=False)  # frames of equal sizes, each of them perfect
    for seed in (0, 1):
        path = write_checkpoint(tier, {"w": state_of(seed)["layer0.weight"]}, step=seed)
        push(tier, path, "default", remote, config=raw)
    one, two = (info.key for info in blob.list("runs/default/packs/"))
    first, second = blob.get(one), blob.get(two)
    blob.put(one, second)
    blob.put(two, first)
    for save in remote.saves():
        with pytest.raises(IntegrityError, match=rf"w \(rank 0, step {save.step}\)"):
            pull(remote, save, fresh)
        record = Record(summary=remote.summary(save), remote={"r": save})
        with CheckpointReader(record, None, [remote]) as reader, pytest.raises(IntegrityError, match="w "):
            reader.read_chunk(0, 0, 0, memoryview(bytearray(reader.chunks(0, 0)[0].size_bytes)))


def test_progress_ends_at_its_total_when_pulled(tier: LocalTier, fresh: LocalTier) -> None:
    remote, blob = remote_at()
    saved(tier, remote)
    seen: list[Progress] = []
    blob.requests.clear()
    pull(remote, remote.saves()[0], fresh, progress=seen.append)
    assert seen[-1].stage == "done"
    assert seen[-1].plain_done == seen[-1].plain_total == sum(array.nbytes for array in state_of().values())
    assert seen[-1].sent_bytes == blob.sent_bytes("get", "/packs/")


def frame(pack: str, offset: int, length: int, size: int = 0) -> PlacedFrame:
    return PlacedFrame(pack, offset, length, "raw", size or length, f"{offset:064x}")


def test_neighbours_share_a_request_when_they_fit() -> None:
    found = list(ranges([frame("b", 0, 10), frame("a", 10, 5), frame("a", 0, 10), frame("a", 900, 5)], max_bytes=1000))
    assert [(r.pack, r.start, r.length, len(r.frames)) for r in found] == [("a", 0, 905, 3), ("b", 0, 10, 1)]


def test_requests_are_cut_when_they_would_grow_too_large() -> None:
    frames = [frame("a", at, 400) for at in range(0, 4000, 400)]
    assert [r.length for r in ranges(frames, max_bytes=1000)] == [800] * 5
    assert [r.length for r in ranges([frame("a", 0, 10), frame("a", 1 << 20, 10)], max_bytes=1 << 24)] == [10, 10]
    plain = [frame("a", at, 10, size=900) for at in range(0, 60, 10)]
    assert [len(r.frames) for r in ranges(plain, max_bytes=1000)] == [2, 2, 2]
