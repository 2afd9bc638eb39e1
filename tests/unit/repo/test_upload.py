"""push: what is sent, what is referenced, what happens when it is cut short."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CredentialsError, IncompleteCheckpointError, IntegrityError, TransientError
from ckptstore.format.manifest import Parent, RemoteShard
from ckptstore.repo import known
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.progress import Progress
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.testing.checkpoints import Array, new_save_id, write_checkpoint
from ckptstore.testing.watched import Request, WatchedBlobStore

CONFIG = StoreConfig(pack_bytes=1 << 20, upload_concurrency=2)
State = dict[str, Array]


def random_state(seed: int = 0, layers: int = 10) -> State:
    """About 2.5 MB that doesn't compress away."""
    rng = np.random.default_rng(seed)
    return {f"layer{n}.weight": rng.normal(size=(256, 256)).astype("float32") for n in range(layers)}


@pytest.fixture
def blob() -> WatchedBlobStore:
    return WatchedBlobStore(open_blob_store(f"mem://{new_nonce()}", retry=False))


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


def push_to(blob: BlobStore, tier: LocalTier, path: Path, **options: object) -> PushResult:
    """As a fresh process would."""
    return push(tier, path, "default", RemoteTier(blob, "default", "r"), config=CONFIG, **options)  # type: ignore[arg-type]


def shard_of(blob: BlobStore, path: Path, rank: int = 0) -> RemoteShard:
    document = RemoteTier(blob, "default", "r").find_shard(path.name.split("-", 2)[2], rank)
    assert document is not None
    return document


def test_only_the_changed_parameter_is_sent_when_one_changed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = random_state()
    first = push_to(blob, tier, write_checkpoint(tier, state, step=1))
    assert first.sent_bytes == first.stored_bytes == blob.sent_bytes("put", "/packs/")
    assert 0.7 * first.plain_bytes < first.sent_bytes < first.plain_bytes
    state["layer3.weight"] = random_state(9)["layer3.weight"]
    blob.requests.clear()
    second = push_to(blob, tier, write_checkpoint(tier, state, step=2))
    changed = state["layer3.weight"].nbytes
    assert 0 < second.sent_bytes <= changed
    assert second.sent_bytes == blob.sent_bytes("put", "/packs/")
    assert second.reused_bytes == second.plain_bytes - changed


def test_nothing_is_sent_when_nothing_changed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    push_to(blob, tier, write_checkpoint(tier, random_state(), step=1))
    second = push_to(blob, tier, write_checkpoint(tier, random_state(), step=2))
    assert (second.sent_bytes, second.stored_bytes) == (0, 0)
    assert second.committed is not None


def test_few_requests_are_made_when_nothing_changed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    remote = RemoteTier(blob, "default", "r")
    for step in (1, 2):
        push(tier, write_checkpoint(tier, random_state(), step=step), "default", remote, config=CONFIG)
    blob.requests.clear()
    push(tier, write_checkpoint(tier, random_state(), step=3), "default", remote, config=CONFIG)
    assert not [request.key for request in blob.requests if request.op == "list"]
    assert sum(request.op == "head" for request in blob.requests) <= 4  # one per pack that is referenced
    assert len(blob.requests) <= 18


def test_one_listing_is_made_when_a_save_has_parts_elsewhere(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """Only of this save's shard manifests; and none by those whose part is not the last."""
    other = LocalTier(tier.root.parent / "other")
    remotes = [RemoteTier(blob, "default", "r") for _ in range(2)]
    for step in (1, 2, 3):
        path = write_checkpoint(tier, random_state(step, layers=2), step=step, world_size=2)
        save_id = path.name.split("-", 2)[2]
        twin = shutil.copytree(path, other.root / "default" / path.name)
        for folder, rank in ((path, 1), (twin, 0)):
            (folder / f"shard-{rank:05d}.json").unlink()
            (folder / "manifest.json").unlink()
        blob.requests.clear()
        assert push(tier, path, "default", remotes[0], config=CONFIG).committed is None
        assert push(other, twin, "default", remotes[1], config=CONFIG).committed is not None
    assert [r.key for r in blob.requests if r.op == "list"] == [f"runs/default/shards/{save_id}/"] * 2


def test_a_base_is_looked_for_anew_when_what_was_remembered_is_gone(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """Another process deletes a save, and adds one; this one finds out without being told."""
    remote = RemoteTier(blob, "default", "r")
    push(tier, write_checkpoint(tier, random_state(), step=1), "default", remote, config=CONFIG)
    elsewhere = RemoteTier(blob, "default", "r")
    elsewhere.delete(elsewhere.saves()[0])
    second = push(tier, write_checkpoint(tier, random_state(), step=2), "default", remote, config=CONFIG)
    assert second.sent_bytes > 0, "what is gone is not relied on"
    assert [save.step for save in remote.known_saves()] == [2]


def test_chunks_of_an_older_save_are_referenced_when_they_come_back(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """An average restarted, a model set back: the newest two saves don't hold it, an older one does."""
    for step in range(1, 7):
        push_to(blob, tier, write_checkpoint(tier, random_state(step, layers=2), step=step))
    back = push_to(blob, tier, write_checkpoint(tier, random_state(2, layers=2), step=7))
    assert back.sent_bytes == 0
    assert back.reused_bytes == back.plain_bytes


def test_older_saves_are_asked_about_once_when_one_process_pushes_many(blob: WatchedBlobStore, tier: LocalTier) -> None:
    for step in range(1, 7):
        push_to(blob, tier, write_checkpoint(tier, random_state(step, layers=2), step=step))
    remote = RemoteTier(blob, "default", "r")
    for step in (7, 8, 9):
        blob.requests.clear()
        push(tier, write_checkpoint(tier, random_state(step, layers=2), step=step), "default", remote, config=CONFIG)
    gets = [request.key for request in blob.requests if request.op == "get"]
    assert len(gets) == 4, gets  # this save's commit, those of the newest two, and news of gc


def test_no_more_of_the_older_saves_is_remembered_than_the_bound(
    blob: WatchedBlobStore, tier: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 7):
        path = write_checkpoint(tier, random_state(step, layers=2), step=step)
        push_to(blob, tier, path)
    monkeypatch.setattr(known, "OLDER_CHUNKS", 2 * len(shard_of(blob, path).frames))
    near = push_to(blob, tier, write_checkpoint(tier, random_state(4, layers=2), step=7))
    far = push_to(blob, tier, write_checkpoint(tier, random_state(1, layers=2), step=8))
    assert near.sent_bytes == 0
    assert far.sent_bytes > 0


def test_little_of_an_older_save_is_sent_again_when_it_comes_back(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """One small tensor must not keep a whole pack of an old save for good."""
    small = {"small": random_state(20, layers=1)["layer0.weight"][:32]}
    for step in range(1, 5):
        state = random_state(step, layers=3) | (small if step == 1 else {})
        push_to(blob, tier, write_checkpoint(tier, state, step=step))
    path = write_checkpoint(tier, random_state(5, layers=3) | small, step=5)
    push_to(blob, tier, path)
    assert {pack_owner(pack) for pack in shard_of(blob, path).packs} == {path.name.split("-", 2)[2]}


def test_equal_chunks_are_sent_once_when_they_repeat_in_a_save(blob: WatchedBlobStore, tier: LocalTier) -> None:
    one = random_state(layers=1)["layer0.weight"]
    result = push_to(blob, tier, write_checkpoint(tier, {f"copy{n}": one for n in range(6)}, world_size=2))
    assert result.sent_bytes <= one.nbytes


def test_chunks_are_found_when_the_world_size_changed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    push_to(blob, tier, write_checkpoint(tier, random_state(), step=1, world_size=4, chunk_elements=1024))
    result = push_to(blob, tier, write_checkpoint(tier, random_state(), step=2, world_size=2, chunk_elements=1024))
    assert result.sent_bytes == 0


def test_small_changes_are_sent_as_deltas_of_depth_one_when_the_base_is_local(
    blob: WatchedBlobStore, tier: LocalTier
) -> None:
    state = random_state()
    paths = []
    sizes = []
    for step in range(1, 5):
        paths.append(write_checkpoint(tier, state, step=step))
        sizes.append(push_to(blob, tier, paths[-1]).sent_bytes)
        state = {name: (array * np.float32(1 + 1e-5)).astype("float32") for name, array in state.items()}
    assert all(size < 0.7 * sizes[0] for size in sizes[1:])
    full = paths[0].name.split("-", 2)[2]
    for path in paths[1:]:
        document = shard_of(blob, path)
        assert {frame.codec for frame in document.frames} == {"delta"}
        for frame in document.frames:
            assert frame.base is not None
            assert frame.base.base is None
            assert pack_owner(document.packs[frame.base.pack]) == full


def test_chunks_are_sent_whole_when_the_base_left_the_disk(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = random_state()
    first = write_checkpoint(tier, state, step=1)
    push_to(blob, tier, first)
    shutil.rmtree(first)
    second = write_checkpoint(tier, {n: a * np.float32(1 + 1e-5) for n, a in state.items()}, step=2)
    push_to(blob, tier, second)
    assert all(frame.base is None for frame in shard_of(blob, second).frames)


def test_chunks_are_sent_whole_when_the_local_base_is_damaged(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = random_state(layers=1)
    first = write_checkpoint(tier, state, step=1)
    push_to(blob, tier, first)
    flip_bytes(first / "__0_0.distcp", tier.shard_manifest(first, 0).pieces[0].start)
    second = write_checkpoint(tier, {n: a * np.float32(1 + 1e-5) for n, a in state.items()}, step=2)
    push_to(blob, tier, second)
    codecs = [frame.codec for frame in shard_of(blob, second).frames]
    assert codecs.count("delta") == len(codecs) - 1


def flip_bytes(file: Path, *offsets: int) -> None:
    data = bytearray(file.read_bytes())
    for offset in offsets:
        data[offset] ^= 0x10
    file.write_bytes(data)


def test_damaged_local_bytes_are_never_uploaded_when_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state())
    piece = tier.shard_manifest(path, 0).pieces[7]
    flip_bytes(path / "__0_0.distcp", piece.start + 5)
    with pytest.raises(IntegrityError, match=r"layer7\.weight") as caught:
        push_to(blob, tier, path)
    assert caught.value.context["rank"] == 0
    remote = RemoteTier(blob, "default", "r")
    assert remote.saves() == []
    assert not list(blob.list("runs/default/shards/"))


def test_short_local_file_is_damage_when_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state(layers=2), world_size=2)
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert push_to(blob, tier, path).committed is None, "a part that isn't whole isn't here"
    (path / "__0_0.distcp").unlink()
    with pytest.raises(IncompleteCheckpointError):
        push_to(blob, tier, path)


def stop_after(count: int) -> Callable[[], bool]:
    left = [count]

    def asked() -> bool:
        left[0] -= 1
        return left[0] < 0

    return asked


def test_nothing_is_sent_twice_when_a_cancelled_push_goes_on(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state())
    cancelled = push_to(blob, tier, path, cancelled=stop_after(100))
    assert cancelled.is_cancelled
    assert cancelled.committed is None
    first = blob.sent_bytes("put", "/packs/")
    assert 0 < first == cancelled.sent_bytes
    assert RemoteTier(blob, "default", "r").saves() == []
    second = push_to(blob, tier, path)
    assert second.committed is not None
    assert second.sent_bytes == second.stored_bytes - first
    packs = [r.key for r in blob.requests if r.op == "put" and "/packs/" in r.key]
    assert len(packs) == len(set(packs))


def test_push_goes_on_when_the_store_failed_at_any_request(tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state(layers=5), world_size=2)
    count = planned = 0

    def fail(request: Request) -> None:
        nonlocal count
        count += 1
        if count == planned:
            raise TransientError("unreachable", reason="unreachable")

    while planned < 100:
        count, planned = 0, planned + 1
        inner = open_blob_store(f"mem://{new_nonce()}", retry=False)
        try:
            push_to(WatchedBlobStore(inner, before=fail), tier, path)
        except TransientError:
            pass
        else:
            break
        watched = WatchedBlobStore(inner)
        root = push_to(watched, tier, path).committed
        assert root is not None
        assert [s.save_id for s in RemoteTier(inner, "default", "r").saves()] == [root.summary.save_id]
        assert not list(inner.list("runs/default/intents/"))
    assert planned > 10


def test_nothing_is_visible_before_the_commit_when_requests_are_watched(
    blob: WatchedBlobStore, tier: LocalTier
) -> None:
    order: list[str] = []
    blob.after = lambda request: order.append(request.key) if request.op in ("put", "delete") else None
    push_to(blob, tier, write_checkpoint(tier, random_state(), world_size=2))
    kinds = [key.split("/")[2] if key.startswith("runs/") else key.split("/")[0] for key in order]
    first = {kind: kinds.index(kind) for kind in kinds}
    last = {kind: len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds}
    assert first["intents"] < first["packs"]
    assert last["packs"] < last["shards"] < first["summaries"] < first["commits"]
    assert kinds[-1] == "intents", "the intent goes last"


def test_whoever_is_last_commits_when_two_nodes_push(blob: WatchedBlobStore, tmp_path: Path) -> None:
    tiers = [LocalTier(tmp_path / f"node{n}") for n in range(2)]
    save_id, state = new_save_id(), random_state()
    paths = [
        write_checkpoint(tiers[rank], state, world_size=2, ranks=[rank], save_id=save_id, extras={"epoch": 3})
        for rank in range(2)
    ]
    assert push_to(blob, tiers[1], paths[1]).committed is None
    assert RemoteTier(blob, "default", "r").saves() == []
    assert list(blob.list("runs/default/intents/"))
    root = push_to(blob, tiers[0], paths[0]).committed
    assert root is not None
    assert [ref.node for ref in root.shards] == [0, 1]
    assert not list(blob.list("runs/default/intents/"))
    again = push_to(blob, tiers[1], paths[1])
    assert (again.committed, again.sent_bytes) == (root, 0)
    other = open_blob_store(f"mem://{new_nonce()}", retry=False)
    for n in (0, 1):
        push_to(other, tiers[n], paths[n])
    [save] = RemoteTier(other, "default", "r").saves()
    key = f"runs/default/{save.key}"
    assert other.get(key) == blob.get(key), "the root is a pure function of the shards"


def test_remote_that_holds_another_save_of_this_name_is_refused(blob: WatchedBlobStore, tier: LocalTier) -> None:
    save_id = new_save_id()
    push_to(blob, tier, write_checkpoint(tier, random_state(1), save_id=save_id))
    other = LocalTier(tier.root.with_name("other"))
    blob.requests.clear()
    with pytest.raises(IntegrityError, match="rank 0"):
        push_to(blob, other, write_checkpoint(other, random_state(2), save_id=save_id))
    assert not blob.sent_bytes("put", "/packs/")


def test_lost_packs_do_not_spread_when_the_next_save_is_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    push_to(blob, tier, write_checkpoint(tier, random_state(), step=1))
    lost = sorted(info.key for info in blob.list("runs/default/packs/"))[0]
    blob.inner.delete([lost])
    second = write_checkpoint(tier, random_state(), step=2)
    result = push_to(blob, tier, second)
    assert result.sent_bytes > 0
    document = shard_of(blob, second)
    assert lost.removeprefix("runs/default/") not in document.packs
    sizes = {info.key.removeprefix("runs/default/"): info.size_bytes for info in blob.list("runs/default/packs/")}
    assert all(f.offset + f.length <= sizes[document.packs[f.pack]] for f in document.frames)


def test_pack_that_the_server_cut_off_is_sent_again_when_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state())
    push_to(blob, tier, path, cancelled=stop_after(100))
    [cut, *_] = blob.list("runs/default/packs/")
    data = blob.get(cut.key)
    blob.delete([cut.key])
    blob.put(cut.key, data[:-1])
    assert push_to(blob, tier, path).committed is not None
    assert blob.get(cut.key) == data


def test_damaged_remote_saves_are_passed_over_when_looking_for_known_chunks(
    blob: WatchedBlobStore, tier: LocalTier
) -> None:
    first = write_checkpoint(tier, random_state(), step=1)
    push_to(blob, tier, first)
    key = f"runs/default/shards/{first.name.split('-', 2)[2]}/shard-00000.json"
    blob.delete([key])
    blob.put(key, b"{}")
    result = push_to(blob, tier, write_checkpoint(tier, random_state(), step=2))
    assert result.committed is not None
    assert result.reused_bytes == 0


def test_the_parent_is_known_when_a_timeline_branches_off(blob: WatchedBlobStore, tier: LocalTier) -> None:
    old = write_checkpoint(tier, random_state(0), step=1)
    push_to(blob, tier, old)
    for step in (2, 3, 4):
        push_to(blob, tier, write_checkpoint(tier, random_state(step), step=step))
    parent = Parent(save_id=old.name.split("-", 2)[2], timeline=1, step=1)
    branch = write_checkpoint(tier, random_state(0), step=2, timeline=2, parent=parent)
    assert push_to(blob, tier, branch).sent_bytes == 0


def test_few_requests_are_made_when_a_committed_save_is_whole(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state())
    first = push_to(blob, tier, path)
    blob.requests.clear()
    again = push_to(blob, tier, path)
    assert (again.committed, again.sent_bytes, again.stored_bytes) == (first.committed, 0, first.stored_bytes)
    packs = len(list(blob.inner.list("runs/default/packs/")))
    assert len(blob.requests) <= packs + 6
    assert not blob.sent_bytes("put", "runs/")


@pytest.mark.parametrize("damage", ["pack gone", "pack cut", "shard gone", "shard damaged", "pack flipped"])
def test_committed_save_is_repaired_when_pushed_again(blob: WatchedBlobStore, tier: LocalTier, damage: str) -> None:
    path = write_checkpoint(tier, random_state(), world_size=2)
    root = push_to(blob, tier, path).committed
    assert root is not None
    save_id = root.summary.save_id
    key = f"runs/default/shards/{save_id}/shard-00001.json"
    pack = f"runs/default/{shard_of(blob, path, 1).packs[0]}"
    distrust: set[str] = set()
    if damage == "pack gone":
        blob.delete([pack])
    elif damage == "pack cut":
        blob.put(pack, blob.get(pack)[:-1])
    elif damage == "shard gone":
        blob.delete([key])
    elif damage == "shard damaged":
        blob.put(key, blob.get(key)[:-1])
    else:
        data = bytearray(blob.get(pack))
        data[len(data) // 2] ^= 1
        blob.put(pack, data)
        distrust = {pack.removeprefix("runs/default/")}
    blob.requests.clear()
    assert push_to(blob, tier, path, distrust=distrust).committed == root
    assert not [r.key for r in blob.requests if r.op == "put" and "/packs/" in r.key and "/00000-" in r.key]
    assert not list(blob.list("runs/default/intents/"))
    fresh = LocalTier(tier.root.with_name("fresh"))
    fresh.create()
    remote = RemoteTier(blob, "default", "r")
    pulled = pull(remote, save_id, fresh)
    for file in path.iterdir():
        assert (pulled / file.name).read_bytes() == file.read_bytes()


def test_stale_attempt_is_not_trusted_when_its_packs_are_gone(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state(), world_size=2)

    def stop(request: Request) -> None:
        if request.op == "put" and "shard-00001" in request.key:
            raise TransientError("unreachable", reason="unreachable")

    blob.before = stop
    with pytest.raises(TransientError):
        push_to(blob, tier, path)
    blob.before = None
    blob.delete([info.key for info in blob.list("runs/default/packs/")])
    assert push_to(blob, tier, path).committed is not None
    fresh = LocalTier(tier.root.with_name("fresh"))
    fresh.create()
    remote = RemoteTier(blob, "default", "r")
    assert pull(remote, remote.saves()[0], fresh).name == path.name


def test_push_commits_without_the_right_to_delete(blob: WatchedBlobStore, tier: LocalTier) -> None:
    def refuse(request: Request) -> None:
        if request.op == "delete":
            raise CredentialsError("no right to delete")

    blob.before = refuse
    assert push_to(blob, tier, write_checkpoint(tier, random_state(layers=1))).committed is not None


def test_packs_are_raw_when_compression_is_off(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write_checkpoint(tier, random_state(layers=2))
    remote = RemoteTier(blob, "default", "r")
    push(tier, path, "default", remote, config=StoreConfig(compress=False))
    assert {frame.codec for frame in shard_of(blob, path).frames} == {"raw"}


def test_progress_ends_at_its_total_when_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    seen: list[Progress] = []
    path = write_checkpoint(tier, random_state(), world_size=2)
    result = push_to(blob, tier, path, progress=seen.append)
    assert seen[-1] == Progress(result.plain_bytes, result.plain_bytes, result.sent_bytes, "done")
    assert [p.plain_done for p in seen] == sorted(p.plain_done for p in seen)


def test_empty_and_scalar_tensors_are_committed_when_pushed(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state: State = {"none": np.zeros((0, 3), dtype="float32"), "one": np.array(2.5, dtype="float64")}
    assert push_to(blob, tier, write_checkpoint(tier, state, world_size=2)).committed is not None
    only_empty: State = {"none": np.zeros((0, 3), dtype="float32")}
    path = write_checkpoint(tier, only_empty, step=2)
    root = push_to(blob, tier, path).committed
    assert root is not None
    assert RemoteSave.of(root.summary).step == 2


def test_memory_stays_bounded_when_the_store_is_slow(blob: WatchedBlobStore, tier: LocalTier) -> None:
    open_gate = threading.Event()
    waiting = threading.Semaphore(0)
    inside: list[int] = [0, 0]
    lock = threading.Lock()

    def enter(request: Request) -> None:
        if request.op == "put" and "/packs/" in request.key:
            with lock:
                inside[0] += 1
                inside[1] = max(inside)
            waiting.release()
            assert open_gate.wait(60)

    def leave(request: Request) -> None:
        if request.op == "put" and "/packs/" in request.key:
            with lock:
                inside[0] -= 1

    blob.before, blob.after = enter, leave
    path = write_checkpoint(tier, random_state(layers=32))
    seen: list[Progress] = []
    thread = threading.Thread(target=push_to, args=(blob, tier, path), kwargs={"progress": seen.append})
    thread.start()
    for _ in range(CONFIG.upload_concurrency):
        assert waiting.acquire(timeout=60)
    count = -1
    while count != len(seen):  # until it makes no progress any more
        count = len(seen)
        time.sleep(0.5)
    packed = seen[-1].plain_done
    open_gate.set()
    thread.join(60)
    assert inside[1] == CONFIG.upload_concurrency
    assert packed < 1.5 * CONFIG.pack_bytes * (CONFIG.upload_concurrency + 1)
    assert seen[-1].stage == "done"
    assert packed < 0.7 * seen[-1].plain_total
