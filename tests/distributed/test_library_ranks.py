"""Lightning and transformers on two ranks: killed and resumed, they end as the library alone would have."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from library_jobs import LAST_STEP, lightning, transformers
from ranks import DEAD, run_ranks


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_lightning_resumes_to_its_own_uninterrupted_run(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("lightning.pytorch")
    alone = run_ranks(2, lightning, None, strategy, 0)
    assert all(isinstance(each, dict) and max(each) == LAST_STEP for each in alone), alone
    assert run_ranks(2, lightning, tmp_path, strategy, 7) == [DEAD, DEAD]
    resumed = run_ranks(2, lightning, tmp_path, strategy, 0)
    assert resumed == [{step: each[step] for step in range(7, LAST_STEP + 1)} for each in alone], (resumed, alone)


def test_transformers_resumes_to_its_own_uninterrupted_run_also_on_another_machine(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    alone = run_ranks(2, transformers, tmp_path / "alone", False, 0)
    assert isinstance(alone[0], dict), alone
    assert max(alone[0]) == LAST_STEP
    assert run_ranks(2, transformers, tmp_path, True, 7) == [DEAD, DEAD]
    shutil.rmtree(tmp_path / "scratch")
    resumed = run_ranks(2, transformers, tmp_path, True, 0)
    assert resumed[0] == {step: alone[0][step] for step in range(7, LAST_STEP + 1)}, (resumed, alone)
