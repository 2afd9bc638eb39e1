"""Copying a plan's pieces into the arena: the one pass over the bytes that a save makes.

The arena is the image of the shard file, so each piece's place is known and a copy is all there is. The C kernels copy
plain memory; ``Tensor.copy_`` does strides, conjugation and devices. Both release the GIL, so several threads share the
work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from ckptstore import native
from ckptstore.agent.pages import Pages
from ckptstore.dcp.binder import Binding
from ckptstore.dcp.boxes import copyable
from ckptstore.dcp.device_copy import Streams, copy_from_devices, streams_of
from ckptstore.dcp.planner import Plan
from ckptstore.dcp.portions import PORTION_BYTES, Copy, cut, grouped, run

#: Below this a second thread costs more than it saves.
_BYTES_PER_THREAD = 8 << 20

#: (address to, address from, bytes)
Block: TypeAlias = tuple[int, int, int]


def copy_pieces(plan: Plan, binding: Binding, image: Any, starts: Sequence[int], threads: int = 1) -> int:
    """Copy every piece of ``plan`` to its place in ``image`` once; see :meth:`Stage.copy`."""
    return Stage(plan, starts).copy(binding, image, threads)


class Stage:
    """Where a plan's pieces go; keeps its views of each image it was used with, since making them costs as much as
    copying small tensors. Not thread-safe.

    The views pin the image: :meth:`forget` lets go of it before it is unmapped.

    Args:
        plan: what to copy.
        starts: first byte of each piece in an image, in ``plan.pieces`` order, as ``format.stock.layout`` gives them.
    """

    def __init__(self, plan: Plan, starts: Sequence[int]) -> None:
        self._plan = plan
        self._starts = tuple(starts)
        self._targets: dict[int, tuple[list[torch.Tensor], list[int]]] = {}
        self._total = 0

    def copy(
        self,
        binding: Binding,
        image: Any,
        threads: int = 1,
        only: Collection[int] | None = None,
        streams: Streams | None = None,
        pages: Pages | None = None,
    ) -> int:
        """Copy every piece to its place in ``image``; all bytes are there when this returns.

        Args:
            binding: of the structure the plan was made for.
            image: a writable buffer, the image of the shard file.
            threads: upper bound; small totals are copied by the caller alone.
            only: which tensors of the binding to copy now, by their places in it; None: all.
            streams: as :func:`streams_of` gave them where training runs; needed by another thread, which has its own.
            pages: of the image: a long copy first brings those that are not there, many at once.

        Returns:
            Bytes copied.
        """
        locals_ = binding.locals
        targets, indexes = self._views(binding, image)
        total = self._total
        if only is not None:
            chosen = [(t, i) for t, i in zip(targets, indexes, strict=True) if i in only]
            targets, indexes = [t for t, _ in chosen], [i for _, i in chosen]
            total = sum(target.nbytes for target in targets)
        sources = [copyable(locals_[i]) for i in indexes]
        if only is not None:
            # Training may go on meanwhile: who gives a parameter other memory must not take ours away.
            sources = [source.detach() for source in sources]
        threads = min(threads, max(1, total // _BYTES_PER_THREAD))
        if total >= _BYTES_PER_THREAD and pages is not None and not pages.are_there:
            run([partial(pages.bring, *step) for step in pages.steps()], threads)
            pages.note_all()
        with torch.no_grad():
            if any(source.is_cuda for source in sources):
                copies = [Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]
                on_devices = [copy for copy in copies if copy.source.is_cuda]
                copy_from_devices(on_devices, streams_of(binding) if streams is None else streams, threads)
                run(_portions([copy for copy in copies if not copy.source.is_cuda]), threads)
            elif total >= _BYTES_PER_THREAD:
                run(_portions([Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]), threads)
            elif targets:
                torch._foreach_copy_(targets, sources)
        return total

    def forget(self) -> None:
        """Release all images seen so far."""
        self._targets.clear()

    def _views(self, binding: Binding, image: Any) -> tuple[list[torch.Tensor], list[int]]:
        """Where the pieces with any bytes go in ``image``, and their places in the binding."""
        whole = torch.frombuffer(image, dtype=torch.uint8)
        views = self._targets.get(whole.data_ptr())
        if views is None:
            targets: list[torch.Tensor] = []
            indexes: list[int] = []
            for index, start in zip(self._plan.indexes, self._starts, strict=True):
                bound = binding.tensors[index]
                size = bound.size_bytes
                if size:
                    target = whole[start : start + size].view(bound.torch_dtype).view(bound.local_shape)
                    targets.append(copyable(target))
                    indexes.append(index)
            self._total = sum(target.nbytes for target in targets)
            views = self._targets[whole.data_ptr()] = (targets, indexes)
        return views


def _portions(copies: list[Copy]) -> Iterator[Callable[[], None]]:
    """The work, in parts of about the size that is taken at once; the longest single ones first."""
    blocks: list[Block] = []
    tensors: list[Copy] = []
    for target, source, size in copies:
        if native.is_available() and _is_plain(source):
            blocks.append((target.data_ptr(), source.data_ptr(), size))
        else:
            tensors.append(Copy(target, source, size))
    for part in grouped(sorted(cut(tensors), key=lambda c: -c.size_bytes)):
        yield partial(_copy_tensors, part)
    for some in grouped(_cut_blocks(blocks)):
        yield partial(_copy_blocks, some)


def _copy_tensors(copies: Sequence[Copy]) -> None:
    with torch.no_grad():  # the mode is per thread
        torch._foreach_copy_([c.target for c in copies], [c.source for c in copies])


def _copy_blocks(blocks: Sequence[Block]) -> None:
    targets, sources, sizes = zip(*blocks, strict=True)
    native.copy(targets, sources, sizes)


def _is_plain(source: torch.Tensor) -> bool:
    """Whether its numbers are the host memory's bytes from first to last."""
    return source.is_cpu and source.is_contiguous() and not source.is_conj() and not source.is_neg()


def _cut_blocks(blocks: Iterable[Block]) -> Iterator[Block]:
    for target, source, size in blocks:
        for at in range(0, size, PORTION_BYTES):
            yield target + at, source + at, min(PORTION_BYTES, size - at)
