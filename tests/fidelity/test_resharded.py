"""Optimizers, targets that don't fit, and changes between saves, when the state is cut over ranks: local and remote.

The same cases as in ``test_optimizers``, ``test_strictness`` and ``test_consistency``, through the whole store.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from resharded_jobs import (
    OPTIMIZERS,
    change_between_saves,
    fitting,
    job,
    misfits,
    reshard_optimizers,
    seen,
    training,
)
from sameness import assert_same

from ckptstore import CheckpointStore, StoreConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUICK = StoreConfig(agent_idle_exit_seconds=5)


def test_optimizers_keep_every_moment_and_option_when_resharded_and_back(tmp_path: Path) -> None:
    root, bucket = str(tmp_path / "store"), f"file://{tmp_path}/bucket"
    saved = {name: job(name, 0, sharded=False) for name in OPTIMIZERS}
    with CheckpointStore(root, remote=bucket, config=QUICK) as store:
        store.save(saved, 1, wait="remote")
    assert run_ranks(2, reshard_optimizers, root, bucket, 2) == [[], []]
    assert run_ranks(3, reshard_optimizers, None, bucket, 0) == [[], [], []]

    for place, step in ((CheckpointStore(root), 2), (CheckpointStore(None, remote=bucket), 1)):
        back = {name: job(name, 1, sharded=False) for name in OPTIMIZERS}
        place.load(back, step)
        for name, one in back.items():
            assert_same(seen(saved[name]), seen(one), name)


def test_misfits_are_told_to_all_ranks_and_change_none_of_them(tmp_path: Path) -> None:
    root, bucket = str(tmp_path / "store"), f"file://{tmp_path}/bucket"
    with CheckpointStore(root, remote=bucket, config=QUICK) as store:
        saved = training(0, sharded=False)
        store.save(saved, 1, wait="remote")
    for local in (root, None):
        assert run_ranks(2, misfits, local, bucket) == [[], []]
    assert run_ranks(3, fitting, None, bucket, seen(saved)) == [[], [], []]


def test_each_sharded_checkpoint_is_the_copy_taken_at_its_call(tmp_path: Path) -> None:
    root, bucket = str(tmp_path / "store"), f"file://{tmp_path}/bucket"
    copies, others = run_ranks(2, change_between_saves, root, bucket)
    assert_same(copies, others)
    for place in (CheckpointStore(root), CheckpointStore(None, remote=bucket)):
        for step, wanted in enumerate(copies):
            back = place.read(step)
            for name, tensor in wanted["model"].items():
                assert_same(tensor, back["model"][name], f"{step}: {name}")
            assert back["opt"]["state"].keys() == wanted["moments"].keys()
            for name, entry in wanted["moments"].items():
                assert_same(entry, dict(sorted(back["opt"]["state"][name].items())), f"{step}: {name}")
