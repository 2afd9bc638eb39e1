"""Giving: what one rank reads for others, laid out for an exchange of bytes.

A chunk that several ranks take is read once, into the stretch of its first taker, and copied from there to the others'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ckptstore.dcp.sharing import ChunkId, Delivery
from ckptstore.dcp.source import ChunkSource
from ckptstore.errors import CkptError, IntegrityError

#: Threads, and batches of a window.
_READERS = 4


@dataclass(frozen=True)
class Parcels:
    """What this rank gives in one window.

    Attributes:
        give: for the other ranks, by taker, back to back.
        given: bytes for each rank.
        views: each chunk once.
        reads: under way.
        repeats: each further stretch of a chunk, and the first one.
    """

    give: torch.Tensor
    given: list[int]
    views: dict[ChunkId, memoryview]
    reads: list[Future[dict[ChunkId, str]]]
    repeats: list[tuple[memoryview, memoryview]]

    def complete(self) -> dict[ChunkId, str]:
        """Once all is read: fill every stretch. Returns the source of each chunk that could be read."""
        for stretch, first in self.repeats:
            stretch[:] = first
        return {chunk: source for read in self.reads for chunk, source in read.result().items()}


class Giver:
    """Reads what other ranks lack, while this one goes on; its threads end with the ``with`` it is used in."""

    def __init__(self, source: ChunkSource, rank: int, world_size: int) -> None:
        self._source = source
        self._rank = rank
        self._world_size = world_size
        self._is_cut_off = False  # this rank can't reach what it should read for others
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ckptstore-share")

    def __enter__(self) -> Giver:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pack(self, window: Sequence[Delivery]) -> Parcels:
        """Start reading what this rank gives in this window."""
        mine = [delivery for delivery in window if delivery.sender == self._rank]
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        given = [0] * self._world_size
        for taker in others:
            given[taker] = sum(delivery.size_bytes for delivery in mine if taker in delivery.takers)
        give = torch.empty(sum(given), dtype=torch.uint8, device="cpu")
        data = give.numpy().data
        views: dict[ChunkId, memoryview] = {}
        repeats: list[tuple[memoryview, memoryview]] = []
        at = 0
        for taker in others:
            for delivery in mine:
                if taker in delivery.takers:
                    stretch = data[at : at + delivery.size_bytes]
                    at += delivery.size_bytes
                    first = views.setdefault(delivery.chunk, stretch)
                    if first is not stretch:
                        repeats.append((stretch, first))
        for delivery in mine:
            if delivery.chunk not in views:
                views[delivery.chunk] = np.empty(delivery.size_bytes, np.uint8).data
        reads = [self._pool.submit(self._read, batch) for batch in _split(list(views.items()))]
        return Parcels(give, given, views, reads, repeats)

    def _read(self, batch: Sequence[tuple[ChunkId, memoryview]]) -> dict[ChunkId, str]:
        """Read these into their views; returns the source of each that could be read.

        The takers notice what could not, and look for it themselves.
        """
        if self._is_cut_off:
            return {}
        try:
            sources = self._source.read_batch([(*chunk, out) for chunk, out in batch])
        except IntegrityError:
            if len(batch) == 1:
                return {}
            return {chunk: source for one in batch for chunk, source in self._read([one]).items()}
        except CkptError:
            self._is_cut_off = True  # to find that out once took all the tries there are; the takers will say why
            return {}
        return {chunk: source for (chunk, _), source in zip(batch, sources, strict=True)}


def _split(views: list[tuple[ChunkId, memoryview]]) -> Iterator[list[tuple[ChunkId, memoryview]]]:
    """As many batches as threads read a window, each of neighbours."""
    limit = max(1, sum(view.nbytes for _, view in views) // _READERS)
    batch: list[tuple[ChunkId, memoryview]] = []
    size = 0
    for chunk, view in sorted(views, key=lambda item: item[0]):
        batch.append((chunk, view))
        size += view.nbytes
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
