"""A state saved by one kind of job and loaded by another is the same state, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dcp_jobs import layout_job, load_job, save_job, tensor_parallel_job
from ranks import run_ranks


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("saved", "loads"),
    [
        pytest.param(("fsdp2", 2), [("plain", 1), ("fsdp2", 3), ("ddp", 2)], id="fsdp2 on 2"),
        pytest.param(("fsdp2", 3), [("fsdp2", 2)], id="fsdp2 on 3"),
        pytest.param(("plain", 1), [("fsdp2", 2)], id="one process"),
        pytest.param(("ddp", 2), [("fsdp2", 2), ("plain", 1)], id="ddp on 2"),
        pytest.param(("fsdp1", 2), [("plain", 1), ("fsdp1", 2)], id="fsdp1 on 2"),
        pytest.param(("hsdp", 4), [("plain", 1), ("fsdp2", 2)], id="hsdp on 2x2"),
    ],
)
def test_state_is_bit_equal_when_loaded_at_another_world_size(
    saved: tuple[str, int], loads: list[tuple[str, int]], tmp_path: Path
) -> None:
    mode, world_size = saved
    before = run_ranks(world_size, save_job, mode, tmp_path)
    assert sum(rank["written"] for rank in before) == before[0]["world_bytes"], "every byte is written exactly once"
    for target, ranks in loads:
        for rank, after in enumerate(run_ranks(ranks, load_job, target, tmp_path)):
            assert after["moved"] == []
            assert after["epoch"] == 7
            assert after["rng"] == rank % world_size
            for part in ("model", "moments", "groups", "schedule"):
                same(before[0][part], after[part], f"{saved} -> {target} x {ranks}, rank {rank}: {part}")


def test_replicas_are_spread_over_the_ranks_when_all_hold_everything(tmp_path: Path) -> None:
    written = [rank["written"] for rank in run_ranks(2, save_job, "ddp", tmp_path)]
    assert min(written) > 0.4 * sum(written)


def test_any_placement_loads_into_any_other_when_meshes_have_two_dimensions(tmp_path: Path) -> None:
    assert run_ranks(4, layout_job, tmp_path) == [{}, {}, {}, {}]


def test_state_is_bit_equal_when_fully_shard_and_tensor_parallelism_cut_the_same_dimension(tmp_path: Path) -> None:
    assert run_ranks(4, tensor_parallel_job, tmp_path) == [[True] * 8] * 4
