"""What `status` says of the ranks of this node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptstore.ops import status
from ckptstore.ops.open import RunTiers
from ckptstore.repo.local import LocalTier


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
