"""What `status` says of the ranks of this node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from ckptstore.blob.base import ObjectInfo
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.cli.verbs import status_
from ckptstore.errors import TransientError
from ckptstore.ops import status
from ckptstore.ops.open import Place, RunTiers
from ckptstore.repo.local import LocalTier
from ckptstore.testing.checkpoints import write_checkpoint


def slot(
    index: int, *generations: tuple[str, str, bool], run: str = "bert", is_attached: bool = True
) -> dict[str, Any]:
    found = [dict(zip(("state", "save_id", "is_on_disk"), each, strict=True)) for each in generations]
    return {"run": run, "slot": index, "is_attached": is_attached, "generations": found}


def test_each_rank_has_in_memory_what_it_has_sealed_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = LocalTier(tmp_path)
    tier.create()
    saves = [{"save_id": "a", "step": 7, "ranks_missing": [1]}, {"save_id": "b", "step": 6, "ranks_missing": []}]
    agent = {
        "slots": [
            slot(1, ("filling", "a", False), ("sealed", "b", False)),
            slot(0, ("sealed", "a", False), ("sealed", "b", True)),
            slot(2, ("sealed", "b", False), is_attached=False),
            slot(3, ("free", "b", True), is_attached=False),
            slot(0, run="other"),
        ],
        "runs": {"bert": {"saves": saves, "ranks_attached": [0, 1]}},
    }
    monkeypatch.setattr(status, "_agent", lambda tiers: agent)
    ranks = status.status(RunTiers("bert", tier, ())).ranks
    assert [(rank.slot, rank.is_attached, rank.staging) for rank in ranks] == [
        (0, True, (7,)),
        (1, True, (6,)),
        (2, False, (6,)),
    ]


def test_a_remote_out_of_reach_does_not_keep_the_local_tier_from_telling(tmp_path: Path) -> None:
    class Away(MemoryBlobStore):
        def list(self, prefix: str, *_: Any, **__: Any) -> Iterator[ObjectInfo]:
            self._gone()

        def get(self, *_: Any, **__: Any) -> bytes:
            self._gone()

        def _gone(self) -> NoReturn:
            raise TransientError("http://s3 can't be reached", reason="unreachable")

    tier = LocalTier(tmp_path / "ckpt")
    write_checkpoint(tier, {"w": np.zeros(4, dtype="float32")}, run="bert", step=7, save_id="0123456789ab-1")
    place = Place(tier, {"s3": Away("away")})
    run = status_._run(place, None)
    rows = {row.survives: row for row in status.status(place.tiers(run)).safety}
    assert rows["power cut (local)"].step == 7
    machine = rows["loss of the machine (s3)"]
    assert (machine.step, machine.unknown) == (None, "http://s3 can't be reached")
    assert status_._row(machine) == ["loss of the machine (s3)", "unknown", "http://s3 can't be reached"]
    assert machine.to_json()["unknown"] is not None
    with pytest.raises(TransientError):
        status_._run(Place(None, {"s3": Away("away")}), None)
