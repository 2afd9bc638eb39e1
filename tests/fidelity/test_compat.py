"""Checkpoints of every format version there was open in this one, by every way, with the same values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import golden_state
import pytest
import torch
from ranks import run_ranks
from sameness import assert_same

from ckptstore import CheckpointStore, per_rank

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FIXTURE = Path(__file__).parents[1] / "compat" / "store_v1"


@pytest.fixture
def golden(tmp_path: Path) -> tuple[Path, str]:
    """A copy, so that a reader that writes can't hurt the original."""
    shutil.copytree(FIXTURE, tmp_path / "v1")
    return tmp_path / "v1" / "local", f"file://{tmp_path}/v1/bucket"


def _stores(golden: tuple[Path, str]) -> dict[str, CheckpointStore]:
    root, bucket = golden
    return {"local": CheckpointStore(root), "remote": CheckpointStore(None, remote=bucket)}


@pytest.mark.parametrize("where", ["local", "remote"])
def test_old_checkpoint_is_listed_as_it_was_saved(golden: tuple[Path, str], where: str) -> None:
    (info,) = _stores(golden)[where].checkpoints()
    assert (info.step, info.epoch, info.metrics, info.tags, info.world_size, info.pinned) == (
        golden_state.STEP, 7, {"loss": 0.25}, ("golden",), golden_state.WORLD_SIZE, True,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["local", "remote"])
def test_old_checkpoint_reads_as_it_was_saved(golden: tuple[Path, str], where: str) -> None:
    back = _stores(golden)[where].read()
    net = golden_state.model()
    assert_same(dict(net.state_dict()), back.pop("model"))
    adam, names = golden_state.optimizer(net), {id(p): name for name, p in net.named_parameters()}
    stored = back.pop("optimizer")
    assert stored["param_groups"][0]["lr"] == 0.125
    assert_same({names[id(p)]: entry for p, entry in adam.state.items()}, stored["state"])
    assert_same(golden_state.own(0), back.pop("own"))
    assert_same(golden_state.values(), back)
    assert back["tied"][0].data_ptr() == back["tied"][1].data_ptr()


@pytest.mark.parametrize("where", ["local", "remote"])
def test_old_checkpoint_loads_into_one_process(golden: tuple[Path, str], where: str) -> None:
    net = golden_state.model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    adam = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    target: dict[str, Any] = {"model": net, "optimizer": adam, "own": per_rank(None)}
    target |= dict.fromkeys(golden_state.values())
    _stores(golden)[where].load(target)
    wanted = golden_state.model()
    assert_same(dict(wanted.state_dict()), dict(net.state_dict()))
    assert_same(golden_state.optimizer(wanted).state_dict()["state"], adam.state_dict()["state"])
    assert_same(golden_state.own(0), target.pop("own").value)
    del target["model"], target["optimizer"]
    assert_same(golden_state.values(), target)


def test_old_checkpoint_loads_into_three_sharded_ranks(golden: tuple[Path, str]) -> None:
    wanted = {name: tensor.detach() for name, tensor in golden_state.model().named_parameters()}
    for rank, (parameters, own) in enumerate(run_ranks(3, golden_state.load_sharded, str(golden[0]))):
        assert_same(wanted, parameters)
        assert_same(golden_state.own(rank % 2), own)


def test_old_checkpoint_is_continued_when_training_goes_on(golden: tuple[Path, str]) -> None:
    root, bucket = golden
    with CheckpointStore(root, remote=bucket) as store:
        state = {"epoch": 0}
        store.load(state)
        assert state == {"epoch": 7}
        store.save({"epoch": 8}, golden_state.STEP + 1, wait="remote")
        assert [info.step for info in store.checkpoints()] == [golden_state.STEP, golden_state.STEP + 1]
