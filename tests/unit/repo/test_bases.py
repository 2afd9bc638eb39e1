"""What a push takes differences against, when it takes a new base, and which packs it lets die."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptstore import codec
from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.format.manifest import RemoteShard
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.testing.checkpoints import Array, write_checkpoint
from ckptstore.testing.watched import WatchedBlobStore

CONFIG = StoreConfig(pack_bytes=1 << 20, upload_concurrency=2)
State = dict[str, Array]


class Run:
    """One training run that is pushed save by save."""

    def __init__(self, path: Path) -> None:
        self.tier = LocalTier(path / "local")
        self.blob = WatchedBlobStore(open_blob_store(f"mem://{new_nonce()}", retry=False))
        self.nonce = new_nonce()
        self.paths: list[Path] = []

    @property
    def remote(self) -> RemoteTier:
        return RemoteTier(self.blob, "default", "r")

    def save(self, state: State, chunk_elements: int = 4096) -> PushResult:
        step = len(self.paths) + 1
        save_id = f"{self.nonce}-{step}"
        path = write_checkpoint(self.tier, state, step=step, save_id=save_id, chunk_elements=chunk_elements)
        self.paths.append(path)
        return push(self.tier, path, "default", self.remote, config=CONFIG)

    def document(self, step: int) -> RemoteShard:
        found = self.remote.find_shard(f"{self.nonce}-{step}", 0)
        assert found is not None
        return found

    def owners(self, step: int) -> dict[str, int]:
        """fqn -> step of the save whose pack holds the (last) frame of its first chunk."""
        document = self.document(step)
        owned = {}
        for piece, row in zip(document.shard.pieces, document.chunks, strict=True):
            owner = pack_owner(document.packs[document.frames[row[0]].pack])
            assert owner is not None
            owned[piece.fqn] = int(owner.partition("-")[2])
        return owned

    def base_steps(self, step: int) -> set[int]:
        document = self.document(step)
        owners = {pack_owner(document.packs[f.base.pack]) for f in document.frames if f.base is not None}
        return {int((owner or "").partition("-")[2]) for owner in owners}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def drifting(jumps: tuple[int, ...] = ()) -> list[State]:
    """Weights on a random walk of small steps, and large ones before these saves."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(256, 256)).astype("float32")
    states: list[State] = []
    for step in range(1, 15):
        share = 1e-2 if step in jumps else 3e-5
        weights = (weights * (1 + share * rng.normal(size=weights.shape))).astype("float32")
        states.append({"w": weights.copy()})
    return states


def test_the_base_stays_as_long_as_the_mean_cost_of_a_save_falls(run: Run) -> None:
    sent = [run.save(state).stored_bytes for state in drifting()]
    assert [run.base_steps(step) for step in range(1, 15)] == [set(), *[{1}] * 13]
    assert sum(sent) < 0.55 * len(sent) * sent[0]


def test_a_new_base_is_taken_when_the_old_one_saves_too_little(run: Run) -> None:
    states = drifting(jumps=(6, 11))
    sent = [run.save(state).stored_bytes for state in states]
    bases = [run.base_steps(step) for step in range(1, len(states) + 1)]
    assert all(len(steps) <= 1 for steps in bases)
    rebased = [step for step, steps in enumerate(bases, start=1) if not steps]
    assert rebased == [1, 6, 11]
    full = [_size(state, None) for state in states]
    always_first = [full[0], *(min(f, _size(s, states[0])) for f, s in zip(full[1:], states[1:], strict=True))]
    assert sum(sent) < 0.9 * sum(always_first)
    assert max(sent) < 1.01 * max(full)


def _size(state: State, base: State | None) -> int:
    data, old = state["w"].tobytes(), base["w"].tobytes() if base is not None else None
    step = 4096 * 4
    return sum(
        len(codec.encode(data[i : i + step], dtype="float32", base=old[i : i + step] if old else None, row=256).frame)
        for i in range(0, len(data), step)
    )


def test_deltas_restore_when_the_save_of_their_base_was_deleted(run: Run) -> None:
    for state in drifting()[:3]:
        run.save(state)
    assert run.base_steps(3) == {1}
    first = run.remote.saves()[0]
    run.remote.delete(first)
    fresh = LocalTier(run.tier.root.with_name("fresh"))
    fresh.create()
    pulled = pull(run.remote, f"{run.nonce}-3", fresh)
    for file in run.paths[2].iterdir():
        assert (pulled / file.name).read_bytes() == file.read_bytes()


def test_what_never_changes_is_sent_twice_at_most_when_all_around_it_changes(run: Run) -> None:
    """One frozen tensor between trained ones: its first pack dies, its second holds nothing else and stays."""
    rng = np.random.default_rng(0)
    frozen = rng.normal(size=(64, 256)).astype("float32")

    def state() -> State:
        trained = {f"{n}": rng.normal(size=(256, 256)).astype("float32") for n in range(4)}
        return {"0": trained["0"], "1.frozen": frozen, **{f"{n}.w": trained[f"{n}"] for n in range(1, 4)}}

    owners = [run.owners(step)["1.frozen"] for step in range(1, 8) if run.save(state())]
    assert owners[0] == owners[1] == 1
    assert len(set(owners)) == 2, owners
    later = owners[-1]
    assert owners[later - 1 :] == [later] * (len(owners) - later + 1)
    document = run.document(7)
    kept = {document.packs[f.pack] for f in document.frames if pack_owner(document.packs[f.pack]) != f"{run.nonce}-7"}
    assert len(kept) == 1
    size = run.blob.head(f"runs/default/{kept.pop()}")
    assert size is not None
    assert size.size_bytes < 1.01 * frozen.nbytes, "old packs don't keep what nobody needs"


def test_frozen_layers_are_sent_once_when_they_lie_together(run: Run) -> None:
    rng = np.random.default_rng(0)
    frozen = {f"backbone.{n}": rng.normal(size=(256, 256)).astype("float32") for n in range(8)}
    first = run.save({**frozen, "head": rng.normal(size=(16, 256)).astype("float32")})
    for _ in range(5):
        later = run.save({**frozen, "head": rng.normal(size=(16, 256)).astype("float32")})
        assert later.stored_bytes < first.stored_bytes / 28
    assert set(run.owners(6).values()) == {1, 6}
