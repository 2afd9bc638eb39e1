"""Filling: stored chunks into the memory of slots, whatever boxes were stored and whatever boxes are wanted.

A chunk is a run of elements of a stored box. Where such a run is a run of the target's memory too, it is read straight
into it; otherwise into a buffer and from there, box by box, into place. Chunks are read in file order, in batches of
neighbours, several batches at once. With peers, chunks that another rank reads for this one arrive in windows; and what
a node's disk holds damaged is found in a first round, so that a second one brings it there once for all its ranks. So
memory stays at the target plus a few batches.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.boxes import dtype_of
from ckptstore.dcp.geometry import overlap
from ckptstore.dcp.giving import Giver, Parcels
from ckptstore.dcp.parts import Part, Slot, chunks_touched, memory_of, scatter
from ckptstore.dcp.sharing import ChunkId, Delivery, Readers, deliveries, windows
from ckptstore.dcp.source import ChunkSource
from ckptstore.errors import IncompleteCheckpointError, IntegrityError
from ckptstore.format.manifest import digest

#: Plain bytes being read at a time, by all threads together: each reads its share in one batch. Few large requests cost
#: both ends much less than many small ones.
WINDOW_BYTES = 96 << 20
_LEAST_BATCH_BYTES = 8 << 20
#: Source of bytes that another rank read for this one.
PEER = "peer"
#: Longest time between two signs of life of a rank that is busy loading.
_BEAT_S = 0.5


class Filler:
    """Fills slots; remembers which targets were written to and where the bytes came from. Not reusable.

    Args:
        source: the checkpoint.
        slots: what to fill.
        agreement: with ``readers``: the ranks that fill their slots at the same time; :meth:`run` is Collective then.
        readers: which rank can read what.
    """

    def __init__(
        self,
        source: ChunkSource,
        slots: list[Slot],
        *,
        agreement: Agreement | None = None,
        readers: Readers | None = None,
    ) -> None:
        self._source = source
        self._slots = _last_of_each_memory(slots)
        self._agreement = agreement if agreement is not None and agreement.world_size > 1 else None
        self._readers = readers
        self._lock = threading.Lock()
        self._parts: dict[ChunkId, list[Part]] = {}
        self._damaged: set[ChunkId] = set()  # on this node's disk
        self.touched: set[str] = set()
        self.bytes_by_source: Counter[str] = Counter()

    def plan(self) -> None:
        """Find out which chunks are needed; no byte moves.

        Raises:
            IncompleteCheckpointError: the stored pieces don't cover a slot.
        """
        for slot in self._slots:
            wanted = 0
            for part in self._parts_of(slot):
                wanted += prod(part.shape)
                for number in chunks_touched(part):
                    self._parts.setdefault((part.rank, part.piece_index, number), []).append(part)
            if wanted != prod(slot.box.shape):
                raise IncompleteCheckpointError(
                    f"the stored pieces of {slot.name!r} hold {wanted} of the {prod(slot.box.shape)} elements "
                    f"wanted for {slot.key!r}",
                    key=slot.name,
                )

    def run(self, threads: int) -> None:
        """Read everything that was planned; blocks until all ranks are done, or one has failed.

        Raises:
            CkptError: this rank could not get its bytes.
            SaveFailedError: a peer was lost.
        """
        chunks, agreement, readers = sorted(self._parts), self._agreement, self._readers
        if agreement is None or readers is None:
            self._round(chunks, [], threads, None)
            return
        absent = [chunk for chunk in chunks if not readers.is_here(agreement.rank, chunk[0])]
        with Giver(self._source, agreement.rank, agreement.world_size) as giver:
            found = self._shared(agreement, readers, absent)
            damaged = self._round(chunks, found, threads, giver, nearby=readers)
            if damaged is None:
                return
            found = self._shared(agreement, readers, damaged)
            self._damaged.update(damaged)
            self._round(damaged, found, threads, giver)

    def _round(
        self,
        chunks: Sequence[ChunkId],
        found: list[Delivery],
        threads: int,
        giver: Giver | None,
        *,
        nearby: Readers | None = None,
    ) -> list[ChunkId] | None:
        """Collective, with others. Read these chunks, of which those of ``found`` travel.

        Args:
            giver: reads for others; None where nothing travels.
            nearby: what is on this node's disk is read from there alone.

        Returns:
            The chunks that are damaged there; None if some rank has failed.
        """
        rank = self._agreement.rank if self._agreement is not None else 0
        mine = {delivery.chunk: delivery for delivery in found if rank in delivery.takers}
        alone = [chunk for chunk in chunks if chunk not in mine]
        batches = list(self._batched(alone, max(_LEAST_BATCH_BYTES, WINDOW_BYTES // threads)))

        def read(batch: Sequence[ChunkId]) -> list[ChunkId]:
            return self._read_batch(batch, nearby=nearby is not None and nearby.is_here(rank, batch[0][0]))

        if self._agreement is None and len(batches) <= 1:
            return [chunk for batch in batches for chunk in read(batch)]
        pool = ThreadPoolExecutor(max(1, min(threads, len(batches))), thread_name_prefix="ckptstore-load")
        is_whole = True
        try:
            futures = [pool.submit(read, batch) for batch in batches]
            if self._agreement is not None:
                left = self._share(self._agreement, giver, found, futures) if giver is not None else set()
                rest = self._batched(sorted(left), _LEAST_BATCH_BYTES)
                futures += [pool.submit(self._read_at_last, [mine[chunk] for chunk in batch]) for batch in rest]
                is_whole = self._attend(self._agreement, futures, futures)
            done = [future.result() for future in futures if is_whole or future.done()]
        finally:
            pool.shutdown(cancel_futures=True)
        return [chunk for damaged in done for chunk in damaged] if is_whole else None

    # -- for itself ---------------------------------------------------------------------------------------------------

    def _parts_of(self, slot: Slot) -> Iterator[Part]:
        dtype = dtype_of(self._source.tensors[slot.name].dtype)
        if slot.box.local.numel() == 0:
            return
        for rank, index, piece in self._source.pieces(slot.name):
            common = overlap(piece.offsets, piece.shape, slot.box.offsets, slot.box.shape)
            if common is None:
                continue
            sizes = tuple(chunk.size_bytes for chunk in self._source.chunks(rank, index))
            yield Part(slot, rank, index, piece, *common, dtype, sizes[0] // dtype.itemsize, sizes)

    def _size_of(self, chunk: ChunkId) -> int:
        return self._source.chunks(chunk[0], chunk[1])[chunk[2]].size_bytes

    def _batched(self, chunks: Iterable[ChunkId], limit: int) -> Iterator[list[ChunkId]]:
        batch: list[ChunkId] = []
        size = 0
        for chunk in chunks:
            more = self._parts[chunk][0].chunk_bytes[chunk[2]] + 4096
            if batch and (size + more > limit or chunk[0] != batch[0][0]):
                yield batch
                batch, size = [], 0
            batch.append(chunk)
            size += more
        if batch:
            yield batch

    def _read_batch(self, batch: Sequence[ChunkId], *, nearby: bool = False) -> list[ChunkId]:
        """Read them from wherever they are; or from this node alone: returns those that are not whole here."""
        wanted: list[tuple[int, int, int, memoryview]] = []
        indirect: list[tuple[ChunkId, memoryview]] = []
        for chunk in batch:
            parts = self._parts[chunk]
            out = memory_of(parts[0], chunk[2]) if len(parts) == 1 else None
            if out is None:
                out = np.empty(parts[0].chunk_bytes[chunk[2]], np.uint8).data
                indirect.append((chunk, out))
            wanted.append((*chunk, out))
            self._touch(parts)
        sources = self._source.read_nearby(wanted) if nearby else self._source.read_batch(wanted)
        damaged = []
        for chunk, one, where in zip(batch, wanted, sources, strict=True):
            if where is None:
                damaged.append(chunk)
            else:
                self._count(where, one[3].nbytes)
        lost = set(damaged)
        for chunk, out in indirect:
            if chunk not in lost:
                self._place(chunk, out)
        return damaged

    def _place(self, chunk: ChunkId, data: memoryview) -> None:
        """Copy a verified chunk to where it belongs."""
        with torch.no_grad():
            for part in self._parts[chunk]:
                target = memory_of(part, chunk[2])
                if target is not None:
                    np.frombuffer(target, np.uint8)[:] = np.frombuffer(data, np.uint8)
                else:
                    scatter(part, chunk[2] * part.chunk_elements, data)

    def _touch(self, parts: list[Part]) -> None:
        with self._lock:
            self.touched.update(part.slot.key for part in parts)

    def _count(self, where: str, size: int) -> None:
        with self._lock:
            self.bytes_by_source[where] += size

    # -- with others --------------------------------------------------------------------------------------------------

    def _shared(self, agreement: Agreement, readers: Readers, lacking: Sequence[ChunkId]) -> list[Delivery]:
        """Collective. The chunks that travel, when each rank has told which ones its node lacks."""
        packed = np.array(lacking, dtype=np.int32).tobytes()
        everybody = agreement.gather(packed, what="telling which chunks are wanted")
        wants = [np.frombuffer(data, dtype=np.int32).reshape(-1, 3).tolist() for data in everybody]
        return deliveries([[(a, b, c) for a, b, c in chunks] for chunks in wants], readers, self._size_of)

    def _share(
        self, agreement: Agreement, giver: Giver, found: list[Delivery], own: Sequence[Future[Any]]
    ) -> set[ChunkId]:
        """Collective. Give and take, window by window; returns the chunks that arrived damaged or not at all."""
        rounds = windows(found)
        left: set[ChunkId] = set()
        ahead = deque((window, giver.pack(window)) for window in islice(rounds, 2))
        while ahead:
            window, parcels = ahead.popleft()
            if not self._attend(agreement, parcels.reads, own):
                break
            left |= self._trade(agreement, window, parcels, parcels.complete())
            ahead.extend((window, giver.pack(window)) for window in islice(rounds, 1))
        return left

    def _attend(self, agreement: Agreement, until: Sequence[Future[Any]], own: Sequence[Future[Any]]) -> bool:
        """Collective. Wait until every rank's ``until`` are done, giving signs of life; False if a rank has failed."""
        pause = 0.002
        while True:
            busy = not all(future.done() for future in until)
            failed = any(future.done() and future.exception() is not None for future in own)
            raised = agreement.agree(same={}, flags={"busy": busy, "failed": failed}).raised
            if "failed" in raised:
                return False
            if not raised:
                return True
            wait([future for future in until if not future.done()], timeout=pause)
            pause = min(2 * pause, _BEAT_S)

    def _trade(
        self, agreement: Agreement, window: list[Delivery], parcels: Parcels, sources: dict[ChunkId, str]
    ) -> set[ChunkId]:
        """Collective. One window changes hands; returns the chunks for this rank that are not what they should be."""
        rank = agreement.rank
        coming = [d for d in window if rank in d.takers and d.sender != rank]
        taken = [sum(d.size_bytes for d in coming if d.sender == sender) for sender in range(agreement.world_size)]
        take = torch.empty(sum(taken), dtype=torch.uint8, device="cpu")
        agreement.trade(parcels.give, parcels.given, take, taken)
        data = take.numpy().data
        left = set()
        at = 0
        for delivery in sorted(coming, key=lambda d: d.sender):
            chunk = delivery.chunk
            view = data[at : at + delivery.size_bytes]
            at += delivery.size_bytes
            if digest(view) == self._source.chunks(chunk[0], chunk[1])[chunk[2]].digest:
                self._take(chunk, view, PEER)
                if chunk in self._damaged and self._readers is not None and self._readers.repairs(rank, delivery):
                    self._source.repair(*chunk, view)
            else:
                left.add(chunk)
        for delivery in window:
            if delivery.sender == rank and rank in delivery.takers:
                if delivery.chunk in sources:
                    self._take(delivery.chunk, parcels.views[delivery.chunk], sources[delivery.chunk])
                else:
                    left.add(delivery.chunk)
        return left

    def _take(self, chunk: ChunkId, data: memoryview, where: str) -> None:
        self._touch(self._parts[chunk])
        self._place(chunk, data)
        self._count(where, data.nbytes)

    def _read_at_last(self, found: Sequence[Delivery]) -> list[ChunkId]:
        """Chunks that other ranks should have given: read them from wherever this rank can."""
        try:
            return self._read_batch([delivery.chunk for delivery in found])
        except IntegrityError as error:
            if len(found) > 1:
                return [chunk for delivery in found for chunk in self._read_at_last([delivery])]
            raise IntegrityError(
                f"{error.message}; the copy that rank {found[0].sender} can read is no good either",
                hint=error.hint,
                **error.context,
            ) from error


def _last_of_each_memory(slots: list[Slot]) -> list[Slot]:
    """Tied targets are filled once; where different tensors are stored for them the last one wins, as in torch."""
    by_memory: dict[object, Slot] = {}
    for slot in slots:
        local = slot.box.local
        memory = (local.device, local.data_ptr(), local.shape, local.stride()) if local.numel() else id(local)
        by_memory.pop(memory, None)
        by_memory[memory] = slot
    return list(by_memory.values())
