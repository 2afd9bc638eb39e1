"""What the committed saves of a remote hold already, so that a push refers to it instead of sending it again.

The newest two saves and the parent are *consulted*: bases come from them. Older ones are *remembered*, newest first and
within a bound on memory: a chunk that comes back as it was then (a model set back, an average restarted, saves that
alternate) is referenced too.

Two questions: is this very chunk there (by digest), and is there a full chunk of the same place in the same tensor to
take a difference against, with its plain bytes at hand on the local disk? Both are only answered while the pack in
question is still there, and the second from consulted saves, whose commit was asked for: objects removed by somebody
else must not spread into new saves. Nor are packs referred to that newer saves hardly need: they would be kept for
little. What they still hold is sent again, into packs of its own kind, and they die with the saves that need them.

When to take a new base. Differences grow as training moves away from the base. Sending one more is right as long as it
costs less than a save has cost on average since the base, the base itself included: the mean then still falls. The
first one that is larger is not sent; the chunk is, and is the new base.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ckptstore.errors import CheckpointNotFoundError, FormatError, IntegrityError, NoStoreError, NotFoundError
from ckptstore.format.manifest import Piece, RemoteShard, ShardManifest, digest
from ckptstore.repo.durable import READ_FLAGS
from ckptstore.repo.packs import Chunk, PlacedFrame, chunks_of, pack_owner, placed
from ckptstore.repo.remote import RemoteSave, RemoteTier

_log = logging.getLogger("ckptstore.repo")

#: How many committed saves are consulted, newest first: the latest, and one more in case it was a line of its own.
RECENT_SAVES = 2
#: How many older ones are remembered at most, ...
OLDER_SAVES = 16
#: ... and how many chunks of theirs: about a kilobyte each.
OLDER_CHUNKS = 1 << 16
#: A delta makes a restore read two frames: against its base it must save at least this share.
DELTA_MUST_SAVE = 0.05
#: A pack of which the consulted saves need less than this share is not referred to any more.
MIN_LIVE_SHARE = 0.25
#: Saves of another world size are consulted only up to this many ranks: one document each must be read.
MAX_FOREIGN_RANKS = 64

_REQUESTS_IN_FLIGHT = 8


@dataclass(frozen=True)
class PlainChunk:
    """Plain bytes of a chunk in a local checkpoint."""

    path: Path
    chunk: Chunk

    def read_into(self, out: memoryview) -> bool:
        """Read them; False when they are gone or damaged: a base is a convenience."""
        try:
            fd = os.open(self.path, READ_FLAGS)
        except OSError:
            return False
        try:
            count = os.preadv(fd, [out], self.chunk.offset)
        except OSError:
            return False
        finally:
            os.close(fd)
        return count == self.chunk.size_bytes and digest(out) == self.chunk.digest


@dataclass(frozen=True)
class Base:
    """A full chunk that a delta may refer to, if the delta's frame has at most ``limit_bytes``."""

    frame: PlacedFrame
    plain: PlainChunk
    limit_bytes: int


class KnownChunks:
    """Index of one remote for one push. :meth:`find` and :meth:`base_for` are thread-safe once it is gathered."""

    def __init__(self, remote: RemoteTier, distrust: Collection[str] = ()) -> None:
        self._remote = remote
        self._frames: dict[tuple[str, int, bool], PlacedFrame] = {}
        """By digest and size; derived frames apart, since only bf16 numbers may be read from them."""
        self._places: dict[tuple[object, ...], PlacedFrame] = {}
        self._plain: dict[str, PlainChunk] = {}
        self._pack_bytes: dict[str, int] = dict.fromkeys(distrust, 0)
        self._live_bytes: Counter[str] = Counter()
        self._order: dict[str, int] = {}
        self._lock = threading.Lock()

    def gather(self, committed: list[RemoteSave], shards: list[ShardManifest], local: Mapping[str, Path]) -> None:
        """Read what committed saves say about these shards' chunks.

        Args:
            committed: The remote's committed saves, oldest first, without the one being pushed.
            shards: What will be pushed.
            local: Checkpoint directories by save_id, whose plain bytes may serve as bases.
        """
        self._order = {save.save_id: number for number, save in enumerate(committed)}
        recent = committed[-RECENT_SAVES:]
        summary = next((s.summary for s in shards if s.summary is not None), None)
        if summary is not None and summary.parent is not None:
            recent = [s for s in committed if s.save_id == summary.parent.save_id and s not in recent] + recent
        documents = [d for save in recent for d in self._consult(save, shards)]
        owners = {pack_owner(list(placed(d, f).chain())[-1].pack) for d in documents for f in d.frames if f.base}
        left = [save for save in committed if save not in recent]
        bases = [save for save in left if save.save_id in owners and save.save_id in local]
        older = self._remember([*bases, *(save for save in reversed(left) if save not in bases)], len(bases), shards)
        for document in [*reversed(older), *documents]:
            self.add(document, local.get(document.shard.save_id))
        self._count_live(documents, older, shards)

    def _count_live(self, documents: list[RemoteShard], older: list[RemoteShard], shards: list[ShardManifest]) -> None:
        """How much of each pack the consulted saves need, and what will be pushed."""
        live = {(part.pack, part.offset): part.length for document in documents for part in _parts(document)}
        for chunk in (chunk for shard in shards for row in chunks_of(shard) for chunk in row):
            for is_derived in (False, True):
                frame = self._frames.get((chunk.digest, chunk.size_bytes, is_derived))
                if frame is not None:
                    live.update({(part.pack, part.offset): part.length for part in frame.chain()})
        self._live_bytes.update(dict.fromkeys((pack for document in older for pack in document.packs), 0))
        for (pack, _), length in live.items():
            self._live_bytes[pack] += length

    def add(self, document: RemoteShard, path: Path | None) -> None:
        """Take in a shard of a committed save, or one this push has just sent; later ones win."""
        shard = document.shard
        frames = [placed(document, frame) for frame in document.frames]
        for piece, row, chunks in zip(shard.pieces, document.chunks, chunks_of(shard), strict=True):
            for index, chunk in zip(row, chunks, strict=True):
                frame = frames[index]
                self._frames[chunk.digest, chunk.size_bytes, frame.codec == "derived"] = frame
                self._places[_place(shard, piece, chunk.index)] = frame
                if path is not None:
                    self._plain[frame.name] = PlainChunk(path / shard.file, chunk)

    def find(self, chunk: Chunk, dtype: str) -> PlacedFrame | None:
        """A frame of exactly this chunk, on the remote and worth keeping there."""
        for is_derived in (False, True) if dtype == "bfloat16" else (False,):
            frame = self._frames.get((chunk.digest, chunk.size_bytes, is_derived))
            if frame is not None and all(self._is_worth_keeping(part.pack) for part in frame.chain()):
                return frame if self._is_there(frame) else None
        return None

    def is_settled(self, chunk: Chunk) -> bool:
        """Whether a save that is known has this very chunk: what came back once may do so again."""
        return any((chunk.digest, chunk.size_bytes, is_derived) in self._frames for is_derived in (False, True))

    def base_for(self, shard: ShardManifest, piece: Piece, chunk: Chunk) -> Base | None:
        """The full chunk that this one's predecessor is, or is a delta against; so a delta never rests on a delta."""
        frame = self._places.get(_place(shard, piece, chunk.index))
        if frame is None or frame.codec == "derived":
            return None
        full = frame.base if frame.base is not None else frame
        plain = self._plain.get(full.name)
        if plain is None or full.size_bytes != chunk.size_bytes:
            return None
        if not self._is_worth_keeping(full.pack) or not self._is_there(full):
            return None
        return Base(full, plain, self._delta_limit(full, frame))

    def _delta_limit(self, full: PlacedFrame, newest: PlacedFrame) -> int:
        """Largest delta against ``full`` worth sending: the mean cost of a save since, ``full`` included.

        The deltas since are taken to be as large as the newest one, which overrates them a little.
        """
        limit = (1 - DELTA_MUST_SAVE) * full.length
        if newest is not full:
            owner = pack_owner(full.pack)
            num_deltas = len(self._order) - 1 - self._order.get(owner or "", -1)
            limit = min(limit, (full.length + num_deltas * newest.length) / (num_deltas + 1))
        return int(limit)

    def holds_all(self, document: RemoteShard) -> bool:
        """Whether every pack this document refers to is there, as far as it does."""
        ends: dict[str, PlacedFrame] = {}
        for part in _parts(document):
            if part.pack not in ends or part.offset + part.length > ends[part.pack].offset + ends[part.pack].length:
                ends[part.pack] = replace(part, base=None)
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            return all(pool.map(self._is_there, ends.values()))

    def distrust(self, packs: Collection[str]) -> None:
        """Refer to none of these packs from now on."""
        with self._lock:
            self._pack_bytes.update(dict.fromkeys(packs, 0))

    def look_again(self) -> None:
        """Believe nothing about which packs are there that was asked before now."""
        with self._lock:
            self._pack_bytes = {pack: 0 for pack, size in self._pack_bytes.items() if size == 0}

    def _is_there(self, frame: PlacedFrame) -> bool:
        return all(part.offset + part.length <= self._size_of(part.pack) for part in frame.chain())

    def _is_worth_keeping(self, pack: str) -> bool:
        """Whether the saves that were consulted need enough of this pack; one that this push has sent always is."""
        live_bytes = self._live_bytes.get(pack)
        return live_bytes is None or live_bytes >= MIN_LIVE_SHARE * self._size_of(pack)

    def _size_of(self, pack: str) -> int:
        size_bytes = self._pack_bytes.get(pack)
        if size_bytes is None:
            info = self._remote.head_pack(pack)
            size_bytes = info.size_bytes if info is not None else 0
            with self._lock:
                self._pack_bytes[pack] = size_bytes
        return size_bytes

    def _consult(self, save: RemoteSave, shards: list[ShardManifest]) -> list[RemoteShard]:
        """This save's documents, if it is committed still."""
        try:
            root = self._remote.root_manifest(save)
            world_size = root.summary.world_size
            if world_size == shards[0].world_size:
                ranks = {shard.rank for shard in shards}
            else:
                ranks = set(range(world_size)) if world_size <= MAX_FOREIGN_RANKS else set()
            refs = tuple(ref for ref in root.shards if ref.rank in ranks)
            self._remote.remember_refs(save, frozenset(ranks), refs)
            return [self._remote.cached_shard(save.save_id, ref) for ref in refs]
        except CheckpointNotFoundError:
            self._remote.forget_known()  # deleted since it was listed, so other things may have happened as well
            return []
        except NoStoreError:
            raise
        except (NotFoundError, FormatError, IntegrityError) as error:
            _log.warning(
                "save %s on %s is damaged, so nothing is taken from it: %s", save.save_id, self._remote.name, error
            )
            return []

    def _remember(self, saves: list[RemoteSave], least: int, shards: list[ShardManifest]) -> list[RemoteShard]:
        """Documents of older saves, as far as they are wanted and memory goes; what can't be had is no loss.

        Whether such a save is committed still is not asked: a chunk that is there, and not condemned, is as good.

        Args:
            saves: In the order in which they are wanted.
            least: So many of them however large they are: bases.
            shards: Of the same ranks.
        """
        ranks, world_size = frozenset(shard.rank for shard in shards), shards[0].world_size

        def read(save: RemoteSave) -> list[RemoteShard]:
            try:
                return self._remote.remembered_shards(save, ranks, world_size)
            except CheckpointNotFoundError:
                self._remote.forget_known()  # as above: the next push looks at what is left
                return []
            except NoStoreError:
                raise
            except (NotFoundError, FormatError, IntegrityError):
                return []

        found: list[RemoteShard] = []
        budget = OLDER_CHUNKS
        one = sum(len(row) for shard in shards for row in chunks_of(shard))  # they are about as large as these
        wanted = saves[: least + min(OLDER_SAVES, OLDER_CHUNKS // max(1, one))]
        with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
            for at in range(0, len(wanted), _REQUESTS_IN_FLIGHT):
                for number, documents in enumerate(pool.map(read, wanted[at : at + _REQUESTS_IN_FLIGHT]), at):
                    budget -= sum(len(document.frames) for document in documents)
                    if budget < 0 and number >= least:
                        return found
                    found += documents
        return found


def _parts(document: RemoteShard) -> Iterator[PlacedFrame]:
    """Every frame this document refers to, bases included."""
    for frame in document.frames:
        yield from placed(document, frame).chain()


def _place(shard: ShardManifest, piece: Piece, index: int) -> tuple[object, ...]:
    """Where a chunk belongs in the state, whichever rank stored it."""
    dtype = shard.tensors[piece.fqn].dtype
    return piece.fqn, dtype, piece.offsets, piece.shape, shard.chunk_elements, index
