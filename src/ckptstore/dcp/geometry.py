"""Boxes of a row-major array: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]


def overlap(offsets_a: Shape, shape_a: Shape, offsets_b: Shape, shape_b: Shape) -> tuple[Shape, Shape] | None:
    """(offsets, shape) of what two boxes have in common; None if that is nothing."""
    low = tuple(map(max, offsets_a, offsets_b))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(offsets_a, shape_a, offsets_b, shape_b, strict=True))
    extent = tuple(h - lo for h, lo in zip(high, low, strict=True))
    return (low, extent) if all(n > 0 for n in extent) else None


def is_run(shape: Shape, at: Shape, extent: Shape) -> int | None:
    """Index of the first element if the box ``extent`` at ``at`` is consecutive in an array of ``shape``, else None."""
    index = 0
    for n, a in zip(shape, at, strict=True):
        index = index * n + a
    # Once a dimension has more than one row in it, everything behind it must be whole.
    whole_from_here = False
    for n, e in zip(shape, extent, strict=True):
        if whole_from_here and e != n:
            return None
        whole_from_here = whole_from_here or e > 1
    return index


def boxes_of_run(shape: Shape, start: int, count: int) -> Iterator[tuple[Shape, Shape]]:
    """The boxes, in order, that ``count`` consecutive elements from ``start`` of a row-major array make up.

    At most two per dimension and one more.
    """
    if count <= 0:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, skipped = divmod(start, row)
    if skipped:
        head = min(count, row - skipped)
        yield from (((first, *at), (1, *extent)) for at, extent in boxes_of_run(shape[1:], skipped, head))
        first, count = first + 1, count - head
    rows, rest = divmod(count, row)
    if rows:
        yield (first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
    if rest:
        yield from (((first + rows, *at), (1, *extent)) for at, extent in boxes_of_run(shape[1:], 0, rest))
