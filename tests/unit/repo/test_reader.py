"""The hybrid reader: every byte verified, from the nearest tier that has it whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import (
    CredentialsError,
    IncompleteCheckpointError,
    IntegrityError,
    LockedError,
    StorageError,
    TransientError,
)
from ckptstore.repo.holding import Hold, alone
from ckptstore.repo.local import LocalTier
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.record import Record
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import Array, write_checkpoint
from ckptstore.testing.watched import Request, WatchedBlobStore

State = dict[str, Array]
CONFIG = StoreConfig(pack_bytes=1 << 20)


def state_of(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    return {f"layer{n}.weight": rng.normal(size=(101, 130)).astype("float32") for n in range(4)} | {
        "step": np.array(12, dtype="int64"),
        "none": np.zeros((0, 3), dtype="int64"),
    }


class House:
    """A local tier and two remotes that hold the same save."""

    def __init__(self, root: Path, *, step: int = 5) -> None:
        self.tier = LocalTier(root)
        self.blobs = [WatchedBlobStore(open_blob_store(f"mem://{new_nonce()}", retry=False)) for _ in range(2)]
        self.remotes = [RemoteTier(blob, "default", name) for blob, name in zip(self.blobs, ("s3", "oss"), strict=True)]
        self.state = state_of()
        self.path = write_checkpoint(self.tier, self.state, step=step, world_size=2, extras={"epoch": 3})
        for remote in self.remotes:
            push(self.tier, self.path, "default", remote, config=CONFIG)
        for blob in self.blobs:
            blob.requests.clear()

    def open(self, *, local: bool = True, remotes: int = 2) -> CheckpointReader:
        found = self.tier.saves("default")[-1] if local and self.tier.saves("default") else None
        places = {r.name: r.saves()[-1] for r in self.remotes[:remotes]}
        first = self.remotes[0]
        summary = found.summary if found is not None and found.summary is not None else first.summary(first.saves()[-1])
        record = Record(summary=summary, local=found, remote=places)
        for blob in self.blobs:
            blob.requests.clear()
        return CheckpointReader(record, self.tier if local else None, self.remotes)

    def flip_local(self, fqn: str, rank: int = 0, at: int = 0) -> None:
        piece = next(p for p in self.tier.shard_manifest(self.path, rank).pieces if p.fqn == fqn)
        file = self.path / f"__{rank}_0.distcp"
        data = bytearray(file.read_bytes())
        data[piece.start + at] ^= 0x20
        file.write_bytes(data)

    def flip_remote(self, number: int, fqn: str, rank: int = 0) -> None:
        remote, blob = self.remotes[number], self.blobs[number]
        document = remote.find_shard(remote.saves()[-1].save_id, rank)
        assert document is not None
        index = next(i for i, piece in enumerate(document.shard.pieces) if piece.fqn == fqn)
        frame = document.frames[document.chunks[index][0]]
        key = f"runs/default/{document.packs[frame.pack]}"
        data = bytearray(blob.get(key))
        data[frame.offset + frame.length // 2] ^= 0x20
        blob.put(key, bytes(data))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "local")


def read(reader: CheckpointReader, fqn: str) -> bytes:
    """The whole tensor: its pieces are rows here, so their bytes follow each other."""
    parts = []
    for rank, index, piece in sorted(reader.pieces(fqn), key=lambda item: item[2].offsets):
        data = bytearray(piece.size_bytes)
        for chunk in reader.chunks(rank, index):
            start = chunk.offset - piece.start
            reader.read_chunk(rank, index, chunk.index, memoryview(data)[start : start + chunk.size_bytes])
        parts.append(bytes(data))
    return b"".join(parts)


def everything(reader: CheckpointReader) -> dict[str, bytes]:
    return {fqn: read(reader, fqn) for fqn in reader.tensors}


def expected(state: State) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


def test_values_come_from_the_local_disk_when_it_is_whole(house: House) -> None:
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert reader.bytes_by_source == {"local": sum(array.nbytes for array in house.state.values())}
        assert reader.repaired == ()
        assert reader.root.summary.step == 5
        assert sorted(reader.shards) == [0, 1]
        assert reader.tensors["layer0.weight"].shape == (101, 130)
        assert reader.tree is not None
        assert reader.per_rank(1) is None
    assert house.blobs[0].requests == house.blobs[1].requests == []


@pytest.mark.parametrize("remotes", [1, 2])
def test_values_come_from_the_first_remote_when_there_is_no_local_tier(house: House, remotes: int) -> None:
    with house.open(local=False, remotes=remotes) as reader:
        assert everything(reader) == expected(house.state)
        assert set(reader.bytes_by_source) == {"s3"}
    assert house.blobs[1].requests == []


def test_flipped_bit_is_replaced_and_repaired_when_a_remote_is_whole(house: House) -> None:
    original = (house.path / "__1_0.distcp").read_bytes()
    house.flip_local("layer2.weight", rank=1, at=9)
    assert (house.path / "__1_0.distcp").read_bytes() != original
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert reader.bytes_by_source["s3"] == 4096 * 4
        assert reader.repaired == ("__1_0.distcp",)
    assert (house.path / "__1_0.distcp").read_bytes() == original
    with house.open() as again:
        everything(again)
        assert set(again.bytes_by_source) == {"local"}


def test_next_remote_is_used_when_the_first_is_damaged_too(house: House) -> None:
    house.flip_local("layer0.weight")
    house.flip_remote(0, "layer0.weight")
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert reader.bytes_by_source["oss"] == 4096 * 4
        assert "s3" not in reader.bytes_by_source


def test_parameter_and_tiers_are_named_when_every_copy_is_damaged(house: House) -> None:
    house.flip_local("layer1.weight", rank=1)
    house.flip_remote(0, "layer1.weight", rank=1)
    house.flip_remote(1, "layer1.weight", rank=1)
    with house.open() as reader:
        with pytest.raises(IntegrityError, match=r"layer1\.weight \(rank 1, step 5\).*local: .*s3: .*oss: ") as caught:
            read(reader, "layer1.weight")
        assert caught.value.context["key"] == "layer1.weight"
        assert read(reader, "layer2.weight") == house.state["layer2.weight"].tobytes()


def test_parameter_is_named_when_there_is_no_other_tier(house: House) -> None:
    house.flip_local("layer1.weight")
    with house.open(remotes=0) as reader, pytest.raises(IntegrityError, match=r"layer1\.weight"):
        everything(reader)


def test_next_remote_is_used_when_the_first_is_unreachable(house: House) -> None:
    house.flip_local("layer0.weight")
    reader = house.open()

    def refuse(request: Request) -> None:
        raise TransientError("no route", reason="unreachable")

    house.blobs[0].before = refuse
    with reader:
        assert everything(reader) == expected(house.state)
        assert set(reader.bytes_by_source) == {"local", "oss"}


@pytest.mark.parametrize("error", [TransientError("no route", reason="unreachable"), CredentialsError("expired")])
def test_damage_is_not_claimed_when_a_remote_could_not_be_asked(house: House, error: StorageError) -> None:
    house.flip_local("layer0.weight")
    house.flip_remote(1, "layer0.weight")
    reader = house.open()

    def refuse(request: Request) -> None:
        raise error

    house.blobs[0].before = refuse
    with reader, pytest.raises(type(error)):
        everything(reader)


def test_remote_is_used_when_a_local_shard_file_is_missing_or_short(house: House) -> None:
    (house.path / "__0_0.distcp").unlink()
    file = house.path / "__1_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    cut = file.read_bytes()
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert {"local", "s3"} == set(reader.bytes_by_source)
        assert reader.repaired == (), "part of a file would look like the whole of it"
    assert file.read_bytes() == cut


def test_read_goes_on_when_the_local_file_is_a_symbolic_link(house: House, tmp_path: Path) -> None:
    file = house.path / "__0_0.distcp"
    shutil.move(file, tmp_path / "elsewhere")
    before = bytearray((tmp_path / "elsewhere").read_bytes())
    file.symlink_to(tmp_path / "elsewhere")
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert reader.bytes_by_source["s3"] > 0
    assert (tmp_path / "elsewhere").read_bytes() == before


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.json", "shard-00001.json", "summary.json"])
def test_manifests_come_from_the_remote_when_the_local_ones_are_damaged(house: House, name: str) -> None:
    data = bytearray((house.path / name).read_bytes())
    for at in range(len(data)):  # one digit somewhere: still JSON, no longer true
        if chr(data[at]).isdigit():
            data[at] = ord("1") if data[at] != ord("1") else ord("2")
            break
    (house.path / name).write_bytes(data)
    found = house.tier.saves("default")[0]
    first = house.remotes[0]
    record = Record(
        summary=first.summary(first.saves()[-1]),
        local=found,
        remote={remote.name: remote.saves()[-1] for remote in house.remotes},
    )
    with CheckpointReader(record, house.tier, house.remotes) as reader:
        assert everything(reader) == expected(house.state)
        assert set(reader.bytes_by_source) == {"local"}


def test_root_is_refused_when_it_does_not_follow_from_its_shards(house: House) -> None:
    file = house.path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b'"epoch":null', b'"epoch":77'))
    with pytest.raises(IntegrityError, match="does not follow from its shard manifests"):
        house.open(remotes=0)
    with house.open() as reader:
        assert reader.root.summary.epoch is None


def test_shard_of_another_save_is_refused_when_swapped_in(house: House) -> None:
    house.state = state_of(1)
    other = write_checkpoint(house.tier, house.state, step=6, world_size=2)
    shutil.copy(house.path / "shard-00001.json", other / "shard-00001.json")
    shutil.copy(house.path / "__1_0.distcp", other / "__1_0.distcp")
    found = house.tier.saves("default")[-1]
    assert found.summary is not None
    with pytest.raises(IntegrityError, match="rank 1"):
        CheckpointReader(Record(summary=found.summary, local=found), house.tier, [])


def test_parts_are_mixed_when_this_node_has_only_its_own(house: House) -> None:
    for name in ("__0_0.distcp", "shard-00000.json", "manifest.json", "summary.json", ".metadata"):
        (house.path / name).unlink()
    with house.open() as reader:
        assert everything(reader) == expected(house.state)
        assert reader.bytes_by_source["local"] > 0
        assert reader.bytes_by_source["s3"] > 0


def test_save_is_incomplete_when_other_nodes_have_the_rest_and_there_is_no_remote(house: House) -> None:
    for name in ("__1_0.distcp", "shard-00001.json"):
        (house.path / name).unlink()
    with pytest.raises(IncompleteCheckpointError, match="rank 1"):
        house.open(remotes=0)
    with house.open() as reader:
        assert everything(reader) == expected(house.state)


def test_deltas_are_read_when_only_the_remote_has_them(house: House) -> None:
    changed = {
        n: (a * np.float32(1 + 1e-5)).astype(a.dtype) if a.dtype == np.float32 else a for n, a in house.state.items()
    }
    path = write_checkpoint(house.tier, changed, step=6, world_size=2)
    for remote in house.remotes:
        push(house.tier, path, "default", remote, config=CONFIG)
    document = house.remotes[0].find_shard(path.name.split("-", 2)[2], 0)
    assert document is not None
    assert any(frame.base is not None for frame in document.frames)
    with house.open(local=False) as reader:
        assert everything(reader) == expected(changed)


def test_every_thread_gets_its_bytes_when_several_read(house: House) -> None:
    house.flip_local("layer0.weight")
    house.flip_local("layer3.weight", rank=1)
    results: list[dict[str, bytes]] = []
    with house.open() as reader:
        threads = [threading.Thread(target=lambda: results.append(everything(reader))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == [expected(house.state)] * 6


def test_descriptors_are_given_back_when_closed(house: House) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    with house.open() as reader:
        everything(reader)
        assert count() > before
    reader.close()
    assert count() <= before


def test_no_more_files_are_open_when_many_ranks_have_saved(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path)
    values = {"w": np.arange(300, dtype="float32").reshape(100, 3)}
    write_checkpoint(tier, values, world_size=100)
    (found,) = tier.saves("default")
    assert found.summary is not None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 30
    with CheckpointReader(Record(summary=found.summary, local=found, remote={}), tier, ()) as reader:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, limit[1]))
            assert everything(reader) == expected(values)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_the_local_copy_is_not_deleted_when_somebody_reads_it(house: House) -> None:
    save_id = house.path.name.split("-", 2)[2]
    with house.open(remotes=0) as reader, house.open(remotes=0) as other:
        with pytest.raises(LockedError, match="being read") as caught:
            house.tier.delete("default", save_id)
        assert caught.value.exit_code == 11
        other.close()
        with pytest.raises(LockedError):
            house.tier.delete("default", save_id)
        assert everything(reader) == expected(house.state)
    house.tier.delete("default", save_id)
    assert not house.tier.saves("default")


def test_nothing_stays_locked_when_a_reading_process_is_killed(house: House) -> None:
    save_id = house.path.name.split("-", 2)[2]
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        Hold(house.path)
        os.write(tell, b"!")
        signal.pause()
    assert os.read(ready, 1) == b"!"
    try:
        with pytest.raises(LockedError):
            house.tier.delete("default", save_id)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)
    house.tier.delete("default", save_id)


def test_a_copy_that_is_being_deleted_is_not_believed(house: House) -> None:
    with alone(house.path):
        held = Hold(house.path)
        assert held._fd is None
        held.release()
    with house.open(remotes=0) as reader:
        assert everything(reader) == expected(house.state)


def test_wrong_buffer_is_refused_when_reading(house: House) -> None:
    with house.open() as reader:
        rank, index, _ = reader.pieces("layer0.weight")[0]
        with pytest.raises(ValueError, match="bytes"):
            reader.read_chunk(rank, index, 0, memoryview(bytearray(3)))
        with pytest.raises(KeyError):
            reader.pieces("no such tensor")


def batch_of(reader: CheckpointReader) -> tuple[list[tuple[int, int, int, memoryview]], dict[str, list[bytearray]]]:
    """Everything there is, and the buffers it goes to, by tensor."""
    wanted = []
    buffers: dict[str, list[bytearray]] = {}
    for rank, shard in reader.shards.items():
        for index, piece in enumerate(shard.pieces):
            for chunk in reader.chunks(rank, index):
                data = bytearray(chunk.size_bytes)
                buffers.setdefault(piece.fqn, []).append(data)
                wanted.append((rank, index, chunk.index, memoryview(data)))
    return wanted, buffers


class TestBatches:
    """Many chunks at once: neighbours share a request, and every rule of a single read still holds."""

    def test_neighbouring_frames_share_a_request_when_they_come_from_a_remote(self, house: House) -> None:
        with house.open(local=False) as reader:
            house.blobs[0].requests.clear()
            wanted, buffers = batch_of(reader)
            assert set(reader.read_batch(wanted)) == {"s3"}
            for name, data in expected(house.state).items():
                assert b"".join(buffers.get(name, [])) == data
        packs = {request.key for request in house.blobs[0].requests if "/packs/" in request.key}
        gets = [request for request in house.blobs[0].requests if request.op == "get" and "/packs/" in request.key]
        assert len(wanted) > 4 * len(packs)
        assert len(gets) == len(packs), "one ranged GET per pack: all of its frames are neighbours"

    @pytest.mark.parametrize("others", [1, 2], ids=["one base each", "one base for two"])
    def test_deltas_are_decoded_where_they_go_when_their_bases_come_along(self, house: House, others: int) -> None:
        weights = np.random.default_rng(1).normal(size=(4, 1 << 14)).astype(np.float32)
        names = [f"w{i}" for i in range(others)]
        for step, shift in ((8, 0.0), (9, 1e-5)):
            state = {name: weights * np.float32(1 + shift * (i + 1)) for i, name in enumerate(names)}
            path = write_checkpoint(house.tier, state, step=step, world_size=1)
            push(house.tier, path, "default", house.remotes[0], config=CONFIG)
        document = house.remotes[0].find_shard(path.name.split("-", 2)[2], 0)
        assert document is not None
        bases = [document.frames[row[0]].base for row in document.chunks]
        assert len(bases) == others
        assert len(set(bases)) == 1
        assert None not in bases
        with house.open(local=False, remotes=1) as reader:
            wanted, buffers = batch_of(reader)
            assert set(reader.read_batch(wanted)) == {"s3"}
        assert {name: b"".join(parts) for name, parts in buffers.items()} == expected(state)

    def test_only_the_damaged_chunks_are_fetched_when_the_rest_is_local(self, house: House) -> None:
        house.flip_local("layer1.weight", rank=1)
        house.flip_local("layer3.weight", rank=0)
        with house.open() as reader:
            wanted, buffers = batch_of(reader)
            sources = reader.read_batch(wanted)
            assert (sources.count("s3"), sources.count("local")) == (2, len(wanted) - 2)
            for name, data in expected(house.state).items():
                assert b"".join(buffers.get(name, [])) == data
            assert reader.repaired == ("__0_0.distcp", "__1_0.distcp")

    def test_next_remote_gives_what_the_first_has_damaged_when_the_rest_is_whole(self, house: House) -> None:
        house.flip_remote(0, "layer2.weight")
        with house.open(local=False) as reader:
            wanted, buffers = batch_of(reader)
            sources = reader.read_batch(wanted)
            assert (sources.count("oss"), sources.count("s3")) == (1, len(wanted) - 1)
            assert b"".join(buffers["layer2.weight"]) == expected(house.state)["layer2.weight"]

    def test_a_remote_that_went_away_is_asked_once_when_another_has_the_bytes(self, house: House) -> None:
        def refuse(request: Request) -> None:
            if "/packs/" in request.key:
                raise TransientError("gone")

        with house.open(local=False) as reader:
            house.blobs[0].before = refuse
            house.blobs[0].requests.clear()
            wanted, _ = batch_of(reader)
            for one in wanted:
                assert reader.read_batch([one]) == ["oss"]
        assert len([r for r in house.blobs[0].requests if "/packs/" in r.key]) == 1

    def test_the_tensor_is_named_when_no_copy_of_one_chunk_is_good(self, house: House) -> None:
        for number in (0, 1):
            house.flip_remote(number, "layer0.weight", rank=1)
        with house.open(local=False) as reader:
            wanted, _ = batch_of(reader)
            with pytest.raises(IntegrityError, match=r"layer0\.weight"):
                reader.read_batch(wanted)
