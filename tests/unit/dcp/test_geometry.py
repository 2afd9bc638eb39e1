"""Box arithmetic against what NumPy does."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.dcp.geometry import boxes_of_run, is_run, overlap

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    at = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return at, tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, at, strict=True))


def part(array: Any, at: tuple[int, ...], extent: tuple[int, ...]) -> Any:
    return array[tuple(slice(a, a + e) for a, e in zip(at, extent, strict=True))]


@given(st.data(), shapes)
def test_the_boxes_of_a_run_are_its_elements_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = np.arange(prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, prod(shape) - 1))
    count = data.draw(st.integers(1, prod(shape) - start))
    found = [part(array, at, extent).reshape(-1) for at, extent in boxes_of_run(shape, start, count)]
    assert np.concatenate(found).tolist() == list(range(start, start + count))
    assert len(found) <= 2 * len(shape) + 1


@given(st.data(), shapes)
def test_a_box_is_a_run_exactly_when_its_elements_are_consecutive(data: st.DataObject, shape: tuple[int, ...]) -> None:
    at, extent = data.draw(boxes(shape))
    elements = part(np.arange(prod(shape)).reshape(shape), at, extent).reshape(-1).tolist()
    consecutive = elements == list(range(elements[0], elements[0] + len(elements)))
    assert is_run(shape, at, extent) == (elements[0] if consecutive else None)


@given(st.data(), shapes)
def test_an_overlap_is_what_both_boxes_hold(data: st.DataObject, shape: tuple[int, ...]) -> None:
    (at_a, extent_a), (at_b, extent_b) = data.draw(boxes(shape)), data.draw(boxes(shape))
    marks = np.zeros(shape, dtype=int)
    for at, extent in ((at_a, extent_a), (at_b, extent_b)):
        marks[(*(slice(a, a + e) for a, e in zip(at, extent, strict=True)), ...)] += 1
    found = overlap(at_a, extent_a, at_b, extent_b)
    both = int((marks == 2).sum())
    assert (found is None) == (both == 0)
    if found is not None:
        assert (part(marks, *found) == 2).all()
        assert prod(found[1]) == both


def test_an_empty_run_has_no_boxes() -> None:
    assert list(boxes_of_run((3, 0), 0, 0)) == []
