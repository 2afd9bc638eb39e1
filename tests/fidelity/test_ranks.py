"""State of several ranks: at other world sizes, replicas that differ, values that are each rank's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock_dcp
from fidelity_jobs import (
    RowScaled,
    ddp_buffers,
    differing,
    expected_own,
    fsdp1_resumed,
    load_sharded_wrappers,
    load_tables,
    own_values,
    pipeline,
    row_scaled,
    save_sharded_wrappers,
    save_tables,
    stage,
    two_tensor,
    wrappers,
)
from ranks import run_ranks
from sameness import assert_same

from ckptstore import CheckpointStore


def test_every_kind_of_value_comes_back_when_loaded_at_another_world_size(tmp_path: Path) -> None:
    root, bucket = str(tmp_path / "store"), f"file://{tmp_path}/bucket"
    assert run_ranks(2, save_tables, root, bucket) == ["saved"] * 2
    assert run_ranks(1, load_tables, root, bucket) == ["same"]
    assert run_ranks(3, load_tables, None, bucket) == ["same"] * 3


@pytest.mark.parametrize(
    ("what", "key"),
    [
        ("a parameter", "model.weight"),
        ("a moment", "opt.state.bias.exp_avg"),
        ("a hyperparameter", "opt.param_groups.0.lr"),
        ("a counter", "n.epoch"),
        ("sparse values", "s.values"),
        ("sparse pattern", "s.indices"),
        ("a quantizer", "q"),
        ("a random generator", "g"),
        ("a large array", "a"),
        ("a container", "c"),
        ("one bit of a nan", "b"),
        ("ties", "u"),
    ],
)
def test_key_and_ranks_are_named_and_nothing_is_saved_when_replicas_differ(tmp_path: Path, what: str, key: str) -> None:
    for (error, named, message), steps in run_ranks(2, differing, str(tmp_path / "store"), what):
        assert error == "StateError", message
        assert str(named).startswith(key), message
        assert "rank 1" in message or "rank 0" in message
        assert steps == []


def test_buffers_are_those_of_rank_0_when_ddp_ranks_differ(tmp_path: Path) -> None:
    (first, loaded), (second, also_loaded) = run_ranks(2, ddp_buffers, str(tmp_path / "store"))
    assert not torch.equal(first, second), "the test needs statistics that differ"
    assert torch.equal(loaded, first)
    assert torch.equal(also_loaded, first)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_rank_gets_the_values_of_its_number_modulo_the_saved_world(saved_by_three: str, world_size: int) -> None:
    results: list[Any] = run_ranks(world_size, own_values, saved_by_three, "load")
    for rank, (size, number, described) in enumerate(results):
        assert (size, number) == (world_size, rank % 3)
        assert described == expected_own(rank % 3)


@pytest.fixture(scope="module")
def saved_by_three(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("own") / "store")
    assert run_ranks(3, own_values, root, "save") == [None] * 3
    return root


def test_values_are_the_same_when_saved_and_loaded_by_differently_wrapped_models(tmp_path: Path) -> None:
    for problems in run_ranks(2, wrappers, str(tmp_path / "store"), timeout_s=170):
        assert problems == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrapper_tensors_inside_dtensors_are_resharded_part_by_part(tmp_path: Path) -> None:
    root = str(tmp_path / "store")
    for message, steps in run_ranks(3, save_sharded_wrappers, root):
        assert "'rows' of 'deep.odd'" in message
        assert "is not cut as the DTensor around it" in message
        assert steps == [1]
    assert run_ranks(2, load_sharded_wrappers, root) == [True, True], "in place"
    back = CheckpointStore(root).read()
    assert_same({"rows": row_scaled(), "two": two_tensor()}, back)
    plain: dict[str, Any] = {"rows": row_scaled(0), "two": two_tensor(0)}
    CheckpointStore(root).load(plain)
    assert type(plain["rows"]) is RowScaled
    assert_same({"rows": row_scaled(), "two": two_tensor()}, plain)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_training_goes_on_bit_for_bit_under_fsdp1(tmp_path: Path, use_orig_params: bool) -> None:
    results: list[Any] = run_ranks(3, fsdp1_resumed, str(tmp_path / "store"), use_orig_params)
    size = results[0][1]
    for attempt in (0, 1):
        read = sum(result[0][attempt] for result in results)
        if use_orig_params:
            assert read <= size * 1.5, "each rank reads its own part, and the counters"
        else:
            assert read > size * 2, "flat parameters: all of the optimizer's state on every rank"


STAGES = ((0, 1), (2, 3))


@pytest.fixture(scope="module")
def saved_by_stages(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("pipeline") / "store")
    assert run_ranks(2, pipeline, root, "save", STAGES) == [None, None]
    return root


class TestPipeline:
    """Ranks that have different layers under the same key: what is stored is the whole model."""

    @pytest.mark.parametrize(
        "stages", [STAGES, ((2, 3), (0, 1)), ((0,), (1, 2), (3,))], ids=["the same", "swapped", "three"]
    )
    def test_each_stage_gets_its_own_layers_back(
        self, saved_by_stages: str, stages: tuple[tuple[int, ...], ...]
    ) -> None:
        results = run_ranks(len(stages), pipeline, saved_by_stages, "load", stages)
        assert results == [(True, float(rank % 2)) for rank in range(len(stages))]

    def test_one_process_gets_the_whole_model(self, saved_by_stages: str) -> None:
        (layers, optimizer), (wanted, stepped) = stage((0, 1, 2, 3), 0.0), stage((0, 1, 2, 3), 1.0)
        CheckpointStore(saved_by_stages).load({"model": layers, "opt": optimizer})
        assert_same(dict(wanted.state_dict()), dict(layers.state_dict()))
        assert_same(stepped.state_dict(), optimizer.state_dict())
        back = CheckpointStore(saved_by_stages).read()
        assert list(back["model"]) == list(wanted.state_dict())
        assert back["opt"]["param_groups"][0]["params"] == [name for name, _ in wanted.named_parameters()]
        folder = next(Path(saved_by_stages).rglob(".metadata")).parent
        target = {"model": {name: torch.zeros_like(t) for name, t in wanted.state_dict().items()}}
        stock_dcp.load(target, checkpoint_id=folder, no_dist=True)
        assert_same(dict(wanted.state_dict()), target["model"])

    def test_layers_that_no_rank_has_are_unexpected(self, saved_by_stages: str) -> None:
        for unexpected in run_ranks(2, pipeline, saved_by_stages, "load", ((0, 1), (2,))):
            assert {name.rpartition(".")[0] for name in unexpected} >= {"model.3", "opt.state.3"}
            assert not [name for name in unexpected if ".2." in name or ".0." in name]

    def test_what_only_another_rank_has_elsewhere_is_refused_by_key(self, saved_by_stages: str) -> None:
        for message, steps in run_ranks(2, pipeline, saved_by_stages, "refused", STAGES):
            assert "deep.x" in message
            assert steps == [1]
