"""Tensors that overlap do so again, whole under their own names all the same; what is said of them is not trusted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_checkpoint import MemoryCheckpoint, save

from ckptstore.dcp.binder import Binder
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state
from ckptstore.errors import FormatError
from ckptstore.format import tree
from ckptstore.format.manifest import Json

BUFFER = torch.arange(24.0)
OVERLAPS: dict[str, list[torch.Tensor]] = {
    "ends": [BUFFER[:16], BUFFER[8:]],
    "inside": [BUFFER, BUFFER[3:7]],
    "another shape": [BUFFER, BUFFER.view(4, 6)],
    "transposed": [BUFFER.view(4, 6), BUFFER.view(4, 6).t()],
    "a column": [BUFFER.view(4, 6), BUFFER.view(4, 6)[:, 2]],
    "parameters in a flat buffer": [BUFFER, BUFFER[:12].view(3, 4), BUFFER[12:22].view(2, 5)],
    "a chain": [BUFFER[:10], BUFFER[8:18], BUFFER[16:]],
    "not at the start of the storage": [BUFFER[4:12], BUFFER[6:14]],
}
ALONE: dict[str, list[torch.Tensor]] = {
    "neighbours": [BUFFER[:12], BUFFER[12:]],
    "real and imaginary parts": [
        torch.view_as_complex(BUFFER.view(12, 2)).real,
        torch.view_as_complex(BUFFER.view(12, 2)).imag,
    ],
    "columns": [BUFFER.view(4, 6)[:, 0], BUFFER.view(4, 6)[:, 1]],
    "far apart in a large storage": [BUFFER[:2], BUFFER[::23]],
    "expanded": [BUFFER[:3], BUFFER[:3].expand(2, 3)],
    "another dtype": [BUFFER, BUFFER.view(torch.int32)],
    "per element twice": [BUFFER, BUFFER.as_strided((4, 3), (2, 1))],
    "clones": [BUFFER.clone(), BUFFER[:16].clone()],
    "empty": [BUFFER, BUFFER[3:3]],
}


def state_of(views: list[torch.Tensor]) -> dict[str, Any]:
    return {"t": {str(i): view for i, view in enumerate(views)}}


def ways(checkpoint: MemoryCheckpoint, count: int) -> list[dict[str, torch.Tensor]]:
    """Read, and loaded into a target without tensors."""
    target: dict[str, Any] = {"t": {str(i): None for i in range(count)}}
    load_into(target, checkpoint)
    return [read_state(checkpoint)["t"], target["t"]]


@pytest.mark.parametrize("name", OVERLAPS)
def test_overlapping_views_overlap_again(name: str) -> None:
    views = OVERLAPS[name]
    checkpoint = save(state_of(views), chunk_elements=5)
    for back in ways(checkpoint, len(views)):
        first = back["0"]
        for i, view in enumerate(views):
            again = back[str(i)]
            assert torch.equal(again, view)
            assert again.stride() == view.stride()
            assert again.data_ptr() - first.data_ptr() == view.data_ptr() - views[0].data_ptr()
            assert again.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        shared = (first.untyped_storage().nbytes(), sum(view.nbytes for view in views))
        assert shared[0] <= BUFFER.nbytes


@pytest.mark.parametrize("name", ALONE)
def test_others_have_memory_of_their_own(name: str) -> None:
    views = ALONE[name]
    checkpoint = save(state_of(views))
    assert "views" not in checkpoint.tree
    for back in ways(checkpoint, len(views)):
        for i, view in enumerate(views):
            assert torch.equal(back[str(i)], view)
        assert len({tensor.untyped_storage().data_ptr() for tensor in back.values() if tensor.numel()}) == len(
            [view for view in views if view.numel()]
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(1, 3), st.booleans()), min_size=2, max_size=6
    )
)
def test_any_views_of_one_storage_come_back_with_their_values(cuts: list[tuple[int, int, int, bool]]) -> None:
    buffer = torch.arange(64.0)
    views = []
    for start, count, step, folded in cuts:
        view = buffer[start : start + count * step : step]
        views.append(view.view(2, -1) if folded and step == 1 and count % 2 == 0 else view)
    for back in ways(save(state_of(views), chunk_elements=3), len(views)):
        for i, view in enumerate(views):
            assert torch.equal(back[str(i)], view)


def test_a_target_that_overlaps_is_filled_through_all_its_views() -> None:
    mine = torch.zeros(24)
    target = state_of([mine[:16], mine[8:]])
    load_into(target, save(state_of(OVERLAPS["ends"])))
    assert torch.equal(mine, BUFFER)


def test_overlaps_are_seen_again_when_they_change_between_saves() -> None:
    binder, flat = Binder(), torch.arange(12.0)
    a, b = torch.nn.Parameter(flat[:8]), torch.nn.Parameter(flat[4:])
    state = {"a": a, "b": b}
    assert tree.views(binder.bind(state).tree).keys() == {"a", "b"}
    assert tree.views(binder.bind(state).tree).keys() == {"a", "b"}
    b.data = torch.arange(8.0)
    assert tree.views(binder.bind(state).tree) == {}
    other = torch.arange(13.0)
    a.data, b.data = other[1:9], other[5:]
    binder.bind(state)
    state["c"] = torch.ones(1)
    assert tree.views(binder.bind(state).tree) == {"a": (0, 0, (1,)), "b": (0, 4, (1,))}


def test_how_it_is_written_down() -> None:
    """The form that checkpoints of this version have."""
    assert save({"a": BUFFER[:16], "b": BUFFER.view(4, 6)[1:]}).tree["views"] == {"a": [0, 0, 1], "b": [0, 6, 6, 1]}


def lying(change: Any) -> MemoryCheckpoint:
    checkpoint = save({"a": BUFFER[:16].clone(), "b": BUFFER[8:].clone()})
    checkpoint.tree = copy.deepcopy(checkpoint.tree) | {"views": change}
    return checkpoint


@pytest.mark.parametrize(
    "views",
    [
        pytest.param({"a": [0, 0, 1], "b": [0, 1 << 50, 1]}, id="far away"),
        pytest.param({"a": [0, 0, 1], "b": [0, 8, 1 << 50]}, id="a stride as wide as a disk"),
        pytest.param({"a": [0, 0, 1], "b": [0, 8, 0]}, id="one element for all"),
        pytest.param({"a": [0, 0, 1], "b": [0, 8, 1, 1]}, id="a dimension too many"),
        pytest.param({"a": [0, 0, 1], "nobody": [0, 8, 1]}, id="an unknown name"),
    ],
)
def test_a_lie_about_overlaps_costs_neither_memory_nor_values(views: Json) -> None:
    back = read_state(lying(views))
    assert torch.equal(back["a"], BUFFER[:16])
    assert torch.equal(back["b"], BUFFER[8:])
    assert sum(tensor.untyped_storage().nbytes() for tensor in back.values()) == 2 * 64


@pytest.mark.parametrize(
    "views", [[], {"a": 1}, {"a": [0]}, {"a": [0, -1, 1]}, {"a": [0, True, 1]}, {"a": [0, 1 << 70]}]
)
def test_damaged_words_about_overlaps_are_a_format_error(views: Any) -> None:
    with pytest.raises(FormatError, match=r"views|view 'a'"):
        read_state(lying(views))
