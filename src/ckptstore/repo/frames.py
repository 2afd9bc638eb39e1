"""Chunks out of remotes: ranged GETs, decoding, and falling back from one remote to the next.

Nothing is believed: a frame's place was bounded when its document was read, the decoder bounds the frame, and the
result must have the digest that the shard manifest states, which the root manifest pins.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptstore import codec
from ckptstore.errors import CkptError, FormatError, IntegrityError, NotFoundError, StorageError, TransientError
from ckptstore.format.manifest import RemoteShard, ShardManifest, ShardRef, digest
from ckptstore.repo.packs import Chunk, PlacedFrame, Range, placed, ranges
from ckptstore.repo.remote import RemoteTier

#: Whoever reads in batches decides how large requests are, up to this.
MAX_REQUEST_BYTES = 32 << 20
#: Batches don't ask a remote that did not answer for so long: its retries must not slow every request of a load.
AVOID_SECONDS = 30.0


@dataclass(frozen=True)
class Wanted:
    """One chunk of rank ``ref.rank``'s shard and the memory it shall go to, which is of its size."""

    ref: ShardRef
    chunk: Chunk
    out: memoryview


class Failures:
    """What went wrong at each source of one thing, and the error to raise when none is left."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.is_absent = True
        """Nothing worse happened than that it is nowhere."""
        self._unavailable: StorageError | None = None

    def add(self, source: str, error: Exception) -> None:
        """Take note. Damage and absence are facts; being unreachable or refused is only the state of the moment."""
        self.is_absent = self.is_absent and isinstance(error, NotFoundError)
        self.tried.append(f"{source}: {error.message if isinstance(error, CkptError) else error}")
        if not isinstance(error, StorageError) or isinstance(error, NotFoundError):
            return
        if not isinstance(self._unavailable, TransientError):
            self._unavailable = error

    def error(self, what: str, **context: object) -> StorageError | IntegrityError:
        """A source that could not be asked may still hold a good copy, so its error wins over the verdict of damage."""
        if self._unavailable is not None:
            return self._unavailable
        return IntegrityError(
            f"{what}: no good copy is left; tried {'; '.join(self.tried) or 'nothing, there is no other tier'}",
            hint="resume from another checkpoint; `ckptctl verify` lists what is damaged",
            **context,
        )


@dataclass(frozen=True)
class _Answer:
    """What a request brought, and the frames in it."""

    request: Range
    data: memoryview

    def holds(self, frame: PlacedFrame) -> bool:
        """Whether all of this frame's bytes are here."""
        start, end = self.request.start, self.request.start + self.request.length
        return frame.pack == self.request.pack and start <= frame.offset and frame.offset + frame.length <= end

    def decode(
        self,
        frame: PlacedFrame,
        plain: Mapping[PlacedFrame, memoryview | CkptError],
        out: memoryview | None = None,
        *,
        is_checked_by_caller: bool = False,
    ) -> memoryview | CkptError:
        """A frame that is here, given what it rests on; or what is wrong with either."""
        base = plain[frame.base] if frame.base is not None else None
        if isinstance(base, CkptError):
            return base
        try:
            body = self.data[frame.offset - self.request.start :][: frame.length]
            return codec.decode(
                body, size_bytes=frame.size_bytes, base=base, out=out, is_checked_by_caller=is_checked_by_caller
            )
        except IntegrityError as error:
            return error


class RemoteChunks:
    """Chunks of one save, from whichever remote has them. Thread-safe.

    Args:
        remotes: In order of preference; those that hold the save.
        save_id: The save.
        on_received: Told the size of each answer with packed bytes.
    """

    def __init__(
        self, remotes: Sequence[RemoteTier], save_id: str, on_received: Callable[[int], None] | None = None
    ) -> None:
        self.remotes = tuple(remotes)
        self._save_id = save_id
        self._on_received = on_received
        self._documents: dict[tuple[str, int], RemoteShard] = {}
        self._avoided: dict[str, float] = {}

    def document(self, remote: RemoteTier, ref: ShardRef) -> RemoteShard:
        """Where this remote holds rank ``ref.rank``'s chunks; read once.

        Raises:
            NotFoundError, FormatError, IntegrityError, StorageError: as :meth:`RemoteTier.remote_shard`.
        """
        key = (remote.name, ref.rank)
        if key not in self._documents:
            self._documents[key] = remote.remote_shard(self._save_id, ref)
        return self._documents[key]

    def shard(self, ref: ShardRef, failures: Failures) -> ShardManifest | None:
        """The shard manifest of this rank, from the first remote that has it whole."""
        for remote in self.remotes:
            try:
                return self.document(remote, ref).shard
            except (StorageError, IntegrityError, FormatError) as error:
                failures.add(remote.name, error)
        return None

    def read(self, ref: ShardRef, chunk: Chunk, out: memoryview, failures: Failures) -> str | None:
        """One chunk into ``out``, verified; the name of the remote that had it, or None when none has."""
        for remote in self.remotes:
            try:
                document = self.document(remote, ref)
                frame = placed(document, document.frames[document.chunks[chunk.piece][chunk.index]])
                data = self._get(remote, frame.pack, frame.offset, frame.length)
                codec.decode(data, size_bytes=chunk.size_bytes, base=self._base(remote, frame), out=out)
                if digest(out) != chunk.digest:
                    raise IntegrityError(f"pack {frame.pack} does not hold the chunk it should")
                return remote.name
            except (StorageError, IntegrityError, FormatError) as error:
                failures.add(remote.name, error)
        return None

    def read_many(self, wanted: Sequence[Wanted]) -> list[str | None]:
        """Chunks into their memory, neighbouring frames in one request each; for each the remote that had it.

        None where no remote gave it now: :meth:`read` says why. Blocks; call it from several threads for several
        requests in flight.
        """
        sources: list[str | None] = [None] * len(wanted)
        left = list(range(len(wanted)))
        for remote in self.remotes:
            if left and self._avoided.get(remote.name, 0.0) <= time.monotonic():
                left = self._in_bulk(remote, wanted, left, sources)
        return sources

    def _in_bulk(
        self, remote: RemoteTier, wanted: Sequence[Wanted], numbers: list[int], sources: list[str | None]
    ) -> list[int]:
        """What this remote can give of these; returns the numbers of the others."""
        by_frame: defaultdict[PlacedFrame, list[int]] = defaultdict(list)
        try:
            for number in numbers:
                chunk = wanted[number].chunk
                document = self.document(remote, wanted[number].ref)
                by_frame[placed(document, document.frames[document.chunks[chunk.piece][chunk.index]])].append(number)
            outs = {frame: wanted[which[0]].out for frame, which in by_frame.items()}
            for request in ranges(by_frame, max_bytes=MAX_REQUEST_BYTES):
                try:
                    for frame, plain in self.read_range(remote, request, outs):
                        if not isinstance(plain, CkptError):
                            self._hand_out(plain, [(n, wanted[n]) for n in by_frame[frame]], sources, remote.name)
                except (NotFoundError, IntegrityError):
                    continue  # these bytes are gone or cut off; what lies in other packs may be whole
        except (FormatError, IntegrityError, NotFoundError):
            pass  # no document to go by
        except StorageError:
            self._avoided[remote.name] = time.monotonic() + AVOID_SECONDS
        return [number for number in numbers if sources[number] is None]

    @staticmethod
    def _hand_out(
        plain: memoryview, takers: Sequence[tuple[int, Wanted]], sources: list[str | None], name: str
    ) -> None:
        found = digest(plain)
        for number, taker in takers:
            if found == taker.chunk.digest:
                if taker is not takers[0][1]:
                    taker.out[:] = plain
                sources[number] = name

    def read_range(
        self, remote: RemoteTier, request: Range, outs: Mapping[PlacedFrame, memoryview] | None = None
    ) -> Iterator[tuple[PlacedFrame, memoryview | CkptError]]:
        """Every frame of one request, decoded or damaged on its own; the caller compares digests.

        What frames rest on is taken from the same answer where it lies there, as a master does that its rounded copy
        follows; the rest is fetched in ranges too: bases lie side by side, as the deltas do. A base that only one delta
        needs is decoded where that delta goes, and changed there: no memory of its own, no second trip through it.

        Args:
            remote: Whom to ask.
            request: What to ask for.
            outs: Memory to decode a frame into; the others get memory of their own.

        Raises:
            NotFoundError, IntegrityError, StorageError: nothing of this request can be had.
        """
        inside = _Answer(request, memoryview(self._get(remote, request.pack, request.start, request.length)))
        room = dict(outs or {})
        plain = self._bases_of(remote, request.frames, inside, room)
        needed = {frame.base for frame in request.frames}
        for frame in sorted(request.frames, key=lambda frame: len(list(frame.chain()))):
            found = inside.decode(frame, plain, room.get(frame), is_checked_by_caller=True)
            if frame in needed:
                plain[frame] = found
            yield frame, found

    def _bases_of(
        self,
        remote: RemoteTier,
        frames: Sequence[PlacedFrame],
        inside: _Answer,
        room: dict[PlacedFrame, memoryview],
    ) -> dict[PlacedFrame, memoryview | CkptError]:
        """What these frames rest on, decoded; without those that are among the frames themselves."""
        plain: dict[PlacedFrame, memoryview | CkptError] = {}
        resting = Counter(frame.base for frame in frames if frame.base is not None)
        given = set(frames)
        absent: dict[PlacedFrame, memoryview] = {}
        for frame in frames:
            base = frame.base
            if base is None or base in plain or base in absent or base in given:
                continue
            alone = frame.codec == "delta" and resting[base] == 1
            out = room.setdefault(frame, _memory(frame)) if alone else _memory(base)
            if inside.holds(base):
                plain |= self._bases_of(remote, [base], inside, {base: out})
                plain[base] = inside.decode(base, plain, out)
            else:
                absent[base] = out
        for part in ranges(absent, max_bytes=MAX_REQUEST_BYTES):
            plain.update(self.read_range(remote, part, absent))
        return plain

    def _base(self, remote: RemoteTier, frame: PlacedFrame) -> memoryview | None:
        base = frame.base
        if base is None:
            return None
        data = self._get(remote, base.pack, base.offset, base.length)
        return codec.decode(data, size_bytes=base.size_bytes, base=self._base(remote, base))

    def _get(self, remote: RemoteTier, pack: str, start: int, length: int) -> bytes:
        data = remote.get_range(pack, start, length)
        if self._on_received is not None:
            self._on_received(length)
        return data


def _memory(frame: PlacedFrame) -> memoryview:
    return memoryview(bytearray(frame.size_bytes))
