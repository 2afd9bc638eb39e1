"""Plans: every box once, balanced, the same on every rank; disagreements are refused by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptstore.dcp.binder import Binding, bind
from ckptstore.dcp.planner import Claim, Plan, plan, plan_of
from ckptstore.errors import StateError


def plans(bindings: list[Binding]) -> list[Plan]:
    everyone = [
        (
            [
                Claim(t.name, t.dtype, t.global_shape, t.offsets, t.shape, t.size_bytes, t.kind, t.is_empty)
                for t in b.tensors
            ],
            b.aliases,
        )
        for b in bindings
    ]
    return [plan_of(everyone, rank, b) for rank, b in enumerate(bindings)]


def replicas(world_size: int, **sizes: int) -> list[Binding]:
    return [bind({name: torch.zeros(n) for name, n in sizes.items()}) for _ in range(world_size)]


def test_one_process_writes_everything_in_the_order_of_the_state() -> None:
    made = plan(bind({"b": torch.zeros(2), "a": torch.zeros(3, 4), "empty": torch.zeros(0)}))
    assert [(p.fqn, p.shape) for p in made.pieces] == [("b", (2,)), ("a", (3, 4)), ("empty", (0,))]
    assert made.indexes == (0, 1, 2)
    assert made.replicas == ()
    assert made.world_bytes == 4 * 14


def test_a_replica_is_written_by_exactly_one_rank_and_loads_are_even() -> None:
    made = plans(replicas(3, a=100, b=90, c=80, d=50, e=30, f=10))
    written = [sum(p.size_bytes for p in each.pieces) for each in made]
    assert sorted(p.fqn for each in made for p in each.pieces) == ["a", "b", "c", "d", "e", "f"]
    assert max(written) - min(written) <= 4 * 40
    assert {each.key for each in made} == {made[0].key}
    assert [ranks for ranks, _ in made[0].replicas] == [(0, 1, 2)]


def test_buffers_are_the_lowest_ranks_even_when_others_have_less_to_write() -> None:
    made = plans([bind({"m": torch.nn.BatchNorm1d(8)}) for _ in range(2)])
    names = [{p.fqn for p in each.pieces} for each in made]
    assert {"m.running_mean", "m.running_var", "m.num_batches_tracked"} <= names[0]
    assert names[1] == {"m.weight", "m.bias"} - names[0]


def test_per_rank_values_are_written_by_their_own_rank() -> None:
    from ckptstore.dcp.markers import per_rank

    made = plans([bind({"x": per_rank(torch.zeros(2))}, rank=r) for r in range(2)])
    assert [[p.fqn for p in each.pieces] for each in made] == [["x@rank0"], ["x@rank1"]]


def shards(bindings: list[Binding], global_rows: int) -> list[Binding]:
    start = 0
    for binding in bindings:
        (bound,) = binding.tensors
        bound.global_shape, bound.offsets = (global_rows,), (start,)
        start += bound.shape[0]
    return bindings


def test_a_gap_between_shards_is_refused_by_key() -> None:
    with pytest.raises(StateError, match="5 elements of 'w', which has 6"):
        plans(shards([bind({"w": torch.zeros(3)}), bind({"w": torch.zeros(2)})], 6))


def test_a_tensor_that_differs_in_dtype_between_ranks_is_refused_by_key() -> None:
    with pytest.raises(StateError, match=r"'w'.*rank 0.*rank 1") as caught:
        plans([bind({"w": torch.zeros(3)}), bind({"w": torch.zeros(3, dtype=torch.int32)})])
    assert caught.value.context["ranks"] == [0, 1]


def test_names_tied_on_one_rank_only_are_refused() -> None:
    x = torch.zeros(3)
    with pytest.raises(StateError, match="'b' shares memory with 'a'"):
        plans([bind({"a": x, "b": x}), bind({"a": x, "b": x.clone()})])


@pytest.mark.parametrize("other", [{"a": torch.zeros(4)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3).int()}])
def test_the_key_of_a_plan_is_that_of_its_structure(other: Any) -> None:
    same = plan(bind({"a": torch.zeros(3)})).key == plan(bind({"a": torch.ones(3)})).key
    assert same
    assert plan(bind({"a": torch.zeros(3)})).key != plan(bind(other)).key
