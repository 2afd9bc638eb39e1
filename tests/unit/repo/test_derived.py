"""Derived chunks: bf16 weights that are their fp32 masters rounded cost nothing, and come back from wherever."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ckptstore import codec
from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import IntegrityError
from ckptstore.format.manifest import RemoteShard
from ckptstore.ops.open import RunTiers
from ckptstore.ops.verify import verify
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.fetch import pull
from ckptstore.repo.frames import Failures, RemoteChunks, Wanted
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import chunks_of
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.testing.checkpoints import Array, write_checkpoint
from ckptstore.testing.watched import WatchedBlobStore

CONFIG = StoreConfig(pack_bytes=1 << 20, upload_concurrency=2)
LAYERS = 6
SHAPE = (128, 160)
State = dict[str, Array]


def rounded(master: Array) -> Array:
    return np.frombuffer(codec.rounded(master.tobytes()), "<u2").reshape(master.shape)


def mixed_state(seed: int = 0) -> State:
    """As mixed-precision AdamW has it: weights in bf16; masters and moments in fp32, under names of their own."""
    rng = np.random.default_rng(seed)
    state: State = {}
    for n in range(LAYERS):
        master = rng.normal(size=SHAPE, scale=0.02).astype("float32")
        state[f"model.layers.{n}.weight"] = rounded(master)
        state[f"optim.state.{n}.exp_avg"] = rng.normal(size=SHAPE, scale=1e-4).astype("float32")
        state[f"optim.state.{n}.master"] = master
    return state


def stepped(state: State, share: float = 1e-4) -> State:
    """A few optimizer steps later."""
    rng = np.random.default_rng(77)
    later = {n: (a * (1 + share * rng.normal(size=a.shape))).astype(a.dtype) for n, a in state.items()}
    for n in range(LAYERS):
        later[f"model.layers.{n}.weight"] = rounded(later[f"optim.state.{n}.master"])
    return later


def weights(state: State) -> State:
    return {name: array for name, array in state.items() if name.startswith("model.")}


@pytest.fixture
def blob() -> WatchedBlobStore:
    return WatchedBlobStore(open_blob_store(f"mem://{new_nonce()}", retry=False))


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


def write(tier: LocalTier, state: State, step: int, **options: object) -> Path:
    dtypes = {name: "bfloat16" for name, array in state.items() if array.dtype == np.uint16}
    return write_checkpoint(tier, state, step=step, dtypes=dtypes, **options)  # type: ignore[arg-type]


def send(blob: WatchedBlobStore, tier: LocalTier, path: Path) -> PushResult:
    return push(tier, path, "default", RemoteTier(blob, "default", "r"), config=CONFIG)


def shard_of(blob: WatchedBlobStore, path: Path) -> RemoteShard:
    document = RemoteTier(blob, "default", "r").find_shard(path.name.split("-", 2)[2], 0)
    assert document is not None
    return document


def codecs_of(document: RemoteShard, part: str) -> set[str]:
    pieces = enumerate(document.shard.pieces)
    return {document.frames[i].codec for n, p in pieces if part in p.fqn for i in document.chunks[n]}


def assert_equal(one: Path, other: Path) -> None:
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in other.iterdir())
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name


def test_weights_cost_nothing_when_they_are_their_masters_rounded(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = mixed_state()
    path = write(tier, state, 1)
    result = send(blob, tier, path)
    document = shard_of(blob, path)
    assert codecs_of(document, "weight") == {"derived"}
    assert "derived" not in codecs_of(document, "master") | codecs_of(document, "exp_avg")
    plain, stored = result.bytes_by_codec["derived"]
    assert plain == sum(a.nbytes for a in weights(state).values())
    assert stored < 0.005 * plain
    for frame in document.frames:
        if frame.codec == "derived":
            assert frame.base is not None
            assert frame.base.size_bytes == 2 * frame.size_bytes
    assert_equal(pull(RemoteTier(blob, "default", "r"), document.shard.save_id, fresh(tier)), path)


def test_every_rank_finds_its_masters_when_both_are_sharded_alike(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """As FSDP shards them: each rank's shard holds the same rows of a weight and of its master, uneven ones too."""
    state = mixed_state()
    path = write(tier, state, 1, world_size=3)
    result = send(blob, tier, path)
    plain, _ = result.bytes_by_codec["derived"]
    assert plain >= 0.99 * sum(a.nbytes for a in weights(state).values())


def fresh(tier: LocalTier) -> LocalTier:
    made = LocalTier(tier.root.with_name(f"fresh{new_nonce()}"))
    made.create()
    return made


def test_weights_rest_on_deltas_of_their_masters_when_training_went_on(blob: WatchedBlobStore, tier: LocalTier) -> None:
    first, state = mixed_state(), stepped(mixed_state())
    send(blob, tier, write(tier, first, 1))
    path = write(tier, state, 2)
    send(blob, tier, path)
    document = shard_of(blob, path)
    assert codecs_of(document, "master") == {"delta"}
    assert codecs_of(document, "weight") == {"derived"}
    for frame in document.frames:
        if frame.codec == "derived":
            assert frame.base is not None
            assert frame.base.codec == "delta"
            assert frame.base.base is not None
            assert frame.base.base.base is None
    remote = RemoteTier(blob, "default", "r")
    assert_equal(pull(remote, document.shard.save_id, fresh(tier)), path)
    tiers = RunTiers("default", None, (remote,))
    checked = verify(tiers, None, everything=True, read_data=True)
    assert not checked.findings
    third = write(tier, state, 3)
    assert send(blob, tier, third).sent_bytes == 0, "unchanged derived chunks are referenced as any other"
    assert_equal(pull(remote, shard_of(blob, third).shard.save_id, fresh(tier)), third)


def test_weights_are_sent_when_one_of_them_is_not_its_master_rounded(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = mixed_state()
    odd = state["model.layers.2.weight"].copy()
    odd[100, 3] ^= 1
    state["model.layers.2.weight"] = odd
    path = write(tier, state, 1, chunk_elements=4096)
    send(blob, tier, path)
    document = shard_of(blob, path)
    number = next(n for n, p in enumerate(document.shard.pieces) if p.fqn == "model.layers.2.weight")
    codecs = [document.frames[i].codec for i in document.chunks[number]]
    at = (100 * SHAPE[1] + 3) // 4096
    assert [n for n, name in enumerate(codecs) if name != "derived"] == [at]
    assert_equal(pull(RemoteTier(blob, "default", "r"), document.shard.save_id, fresh(tier)), path)


def test_masters_are_found_by_value_when_names_say_nothing(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """Swapped names, a moment of zeros, norms of ones: values decide, and constants are tried by name."""
    rng = np.random.default_rng(3)
    masters = [rng.normal(size=SHAPE).astype("float32") for _ in range(3)]
    ones = np.ones(1024, dtype="float32")
    state: State = {f"a.{n}": rounded(masters[n]) for n in range(3)}
    state |= {f"z.{2 - n}": masters[n] for n in range(3)}
    state |= {"norm.weight": rounded(ones), "flat": ones, "zero": np.zeros(SHAPE, "float32")}
    path = write(tier, state, 1)
    send(blob, tier, path)
    assert codecs_of(shard_of(blob, path), "a.") == {"derived"}
    assert codecs_of(shard_of(blob, path), "norm.weight") == {"derived"}


def test_zeros_of_several_dtypes_never_rest_on_each_other_wrongly(blob: WatchedBlobStore, tier: LocalTier) -> None:
    """An fp32 chunk of zeros has the bytes of a larger bf16 one, which is derived: it must not be taken for it."""
    zeros: State = {
        "a.big": np.zeros(8192, "uint16"),
        "b.master": np.zeros(8192, "float32"),
        "c.master": np.zeros(4096, "float32"),
        "d.small": np.zeros(4096, "uint16"),
        "e.bytes": np.zeros(16384, "uint8"),
    }
    for step in (1, 2):
        path = write(tier, zeros, step, chunk_elements=1 << 14)
        send(blob, tier, path)
        document = shard_of(blob, path)
        assert codecs_of(document, "master") & {"derived"} == set()
        assert_equal(pull(RemoteTier(blob, "default", "r"), document.shard.save_id, fresh(tier)), path)


def test_a_restore_reads_no_master_twice_when_its_copy_lies_behind_it(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write(tier, mixed_state(), 1)
    stored = send(blob, tier, path).stored_bytes
    blob.requests.clear()
    pull(RemoteTier(blob, "default", "r"), shard_of(blob, path).shard.save_id, fresh(tier))
    assert blob.sent_bytes("get", "/packs/") < 1.02 * stored


def test_only_masters_are_read_when_only_weights_are_wanted(blob: WatchedBlobStore, tier: LocalTier) -> None:
    state = stepped(mixed_state())
    for step, one in ((1, mixed_state()), (2, state)):
        path = write(tier, one, step, chunk_elements=1 << 15)
        send(blob, tier, path)
    shutil.rmtree(tier.root)
    remote = RemoteTier(blob, "default", "r")
    record = Catalog.read(None, [remote], "default").resolve(path.name.split("-", 2)[2])
    with CheckpointReader(record, None, [remote]) as reader:
        blob.requests.clear()
        for fqn, expected in weights(state).items():
            [(rank, index, piece)] = reader.pieces(fqn)
            out = bytearray(piece.size_bytes)
            for chunk in reader.chunks(rank, index):
                at = chunk.offset - piece.start
                reader.read_chunk(rank, index, chunk.index, memoryview(out)[at : at + chunk.size_bytes])
            assert bytes(out) == expected.tobytes()
    masters = sum(a.nbytes for n, a in state.items() if n.endswith("master"))
    assert blob.sent_bytes("get", "/packs/") < 2 * masters


def test_chunks_come_in_bulk_when_bases_are_damaged_or_whole(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write(tier, mixed_state(), 1)
    send(blob, tier, path)
    document = shard_of(blob, path)
    remote = RemoteTier(blob, "default", "r")
    [save] = remote.saves()
    [ref] = remote.root_manifest(save).shards
    wanted = [
        Wanted(ref, chunk, memoryview(bytearray(chunk.size_bytes)))
        for piece, row in zip(document.shard.pieces, chunks_of(document.shard), strict=True)
        for chunk in row
        if "weight" in piece.fqn
    ]
    assert RemoteChunks([remote], save.save_id).read_many(wanted) == ["r"] * len(wanted)
    frame = document.frames[document.chunks[wanted[0].chunk.piece][0]]
    assert frame.base is not None
    key = f"runs/default/{document.packs[frame.base.pack]}"
    data = bytearray(blob.get(key))
    data[frame.base.offset + frame.base.length // 2] ^= 1
    blob.put(key, data)
    sources = RemoteChunks([remote], save.save_id).read_many(wanted)
    assert sources == [None, *["r"] * (len(wanted) - 1)], "only the copy of the damaged master is lost"
    failures = Failures()
    assert RemoteChunks([remote], save.save_id).read(ref, wanted[0].chunk, wanted[0].out, failures) is None
    assert isinstance(failures.error("weight"), IntegrityError)


def test_nothing_is_derived_when_compression_is_off(blob: WatchedBlobStore, tier: LocalTier) -> None:
    path = write(tier, mixed_state(), 1)
    push(tier, path, "default", RemoteTier(blob, "default", "r"), config=StoreConfig(compress=False))
    assert {frame.codec for frame in shard_of(blob, path).frames} == {"raw"}
