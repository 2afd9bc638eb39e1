"""Tensors that overlap: views of one storage that share some of their elements.

Each is stored whole under its own name, where any reader of the directory finds it. Beside the state stands how they
lay in one memory, and where new memory is made for them they lie so again: what is written through one shows in the
others, as it did when they were saved. Of states of several ranks joined into one, as of a pipeline, that holds for
rank 0's own tensors only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ckptstore.dcp.boxes import dtype_of
from ckptstore.format import tree
from ckptstore.format.tree import View

if TYPE_CHECKING:
    from ckptstore.dcp.binder import BoundTensor
    from ckptstore.dcp.source import ChunkSource

Shape = tuple[int, ...]


class Span(NamedTuple):
    """Where a tensor lies in its storage, in elements; the last of them is at ``stop - 1``."""

    start: int
    stop: int
    number: int
    is_dense: bool


def overlapping(bound: Sequence[BoundTensor], locals_: Sequence[torch.Tensor]) -> dict[int, View]:
    """Index of each tensor that overlaps others -> where it lies in the memory they share.

    Found where the one that starts first has no gaps, and where the shared memory is no larger than they are together.
    What is sharded, conjugated, negated, or shows an element twice is left out.
    """
    by_storage: defaultdict[object, list[Span]] = defaultdict(list)
    for i, (each, local) in enumerate(zip(bound, locals_, strict=True)):
        if each.spec is None and each.kind != "per_rank" and each.shape == each.global_shape == local.shape:
            span = _span(i, local)
            if span is not None:
                by_storage[local.untyped_storage().data_ptr(), local.dtype, local.device].append(span)
    found: dict[int, View] = {}
    number = 0
    for spans in by_storage.values():
        for group in _groups(spans) if len(spans) > 1 else ():
            extent = max(span.stop for span in group) - group[0].start
            if extent <= sum(locals_[span.number].numel() for span in group):
                for span in group:
                    stride = tuple(locals_[span.number].stride())
                    found[span.number] = View(number, span.start - group[0].start, stride)
                number += 1
    return found


def still_holds(found: dict[int, View], locals_: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors lie to each other as they did; says nothing of others."""
    origin: dict[int, tuple[int, int]] = {}
    for index, view in found.items():
        local = locals_[index]
        where = local.untyped_storage().data_ptr(), int(local.storage_offset()) - view.offset
        if local.stride() != view.stride or origin.setdefault(view.group, where) != where:
            return False
    return True


def _span(index: int, local: torch.Tensor) -> Span | None:
    shape, stride = tuple(local.shape), local.stride()
    if not local.numel() or local.is_conj() or local.is_neg() or not _shows_each_once(shape, stride):
        return None
    start = int(local.storage_offset())
    extent = _extent(shape, stride)
    return Span(start, start + extent, index, extent == local.numel())


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _shows_each_once(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether no two places of the tensor are one element, as far as sorted strides can tell."""
    reach = 1
    for step, n in sorted(zip(stride, shape, strict=True)):
        if n > 1:
            if step < reach:
                return False
            reach += (n - 1) * step
    return True


def _groups(spans: Iterable[Span]) -> list[list[Span]]:
    """Those that overlap, each group in the order of its first elements."""
    groups: list[list[Span]] = []
    dense_stop = -1
    for span in sorted(spans, key=lambda each: (each.start, -each.stop)):
        if span.start >= dense_stop:
            groups.append([])
            dense_stop = -1
        groups[-1].append(span)
        if span.is_dense:
            dense_stop = max(dense_stop, span.stop)
    return [group for group in groups if len(group) > 1]


def host_memory(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """New memory of the host, whatever device is the default one."""
    return torch.empty(shape, dtype=dtype, device="cpu")


class NewMemory:
    """Makes memory for stored tensors; those that overlapped overlap again.

    Args:
        allocate: gives memory of a shape and dtype.
    """

    def __init__(
        self, source: ChunkSource, allocate: Callable[[Shape, torch.dtype], torch.Tensor] = host_memory
    ) -> None:
        self._source = source
        self._allocate = allocate
        self._views = tree.views(source.tree) if source.tree is not None else {}
        self._groups: dict[int, torch.Tensor | None] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Memory for the stored tensor of this name; what is in it doesn't matter."""
        meta, view = self._source.tensors[name], self._views.get(name)
        if view is not None:
            if view.group not in self._groups:
                self._groups[view.group] = self._shared(view.group)
            whole = self._groups[view.group]
            if whole is not None:
                return whole.as_strided(meta.shape, view.stride, view.offset)
        return self._allocate(meta.shape, dtype_of(meta.dtype))

    def _shared(self, group: int) -> torch.Tensor | None:
        """The memory of a group; None where what is said of it can't be true, or some of it was left out."""
        members = [
            (view, self._source.tensors[name])
            for name, view in self._views.items()
            if view.group == group and name in self._source.tensors
        ]
        extent = elements = 0
        for view, meta in members:
            if len(view.stride) != len(meta.shape) or not _shows_each_once(meta.shape, view.stride) or 0 in meta.shape:
                return None
            extent = max(extent, view.offset + _extent(meta.shape, view.stride))
            elements += torch.Size(meta.shape).numel()
        if extent > elements or len({meta.dtype for _, meta in members}) != 1:
            return None
        return self._allocate((extent,), dtype_of(members[0][1].dtype))
