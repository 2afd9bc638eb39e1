"""push: a committed local checkpoint becomes a committed remote one.

Per shard: chunks that a committed save of this remote holds already are referenced; the others are read from the local
file, checked against their digest, encoded, decoded again to be sure, and packed. A bf16 chunk goes right behind its
fp32 master, if that is in the same shard, and costs nothing where it is the master rounded. When all packs of a shard
are confirmed its remote shard manifest is created. Then what gc has condemned meanwhile is sent again (see
:mod:`ckptstore.repo.condemned` for why that is enough), and whoever sees the shard manifests of all ranks commits.

May be killed, repeated, run twice at once, and run by several nodes for their own ranks: every name is content-named
or created once, so a second attempt finds what the first one sent.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptstore.config import StoreConfig
from ckptstore.errors import (
    CkptError,
    ConflictError,
    FormatError,
    IncompleteCheckpointError,
    NotFoundError,
    TransientError,
)
from ckptstore.format.manifest import FORMAT, RemoteShard, RootManifest, ShardManifest, ref_of, strong_digest
from ckptstore.repo.chunk_encoder import ChunkEncoder, ChunkJob, EncodedChunk
from ckptstore.repo.durable import READ_FLAGS, raise_for_errno
from ckptstore.repo.known import KnownChunks
from ckptstore.repo.local import LocalTier
from ckptstore.repo.pack_writer import PackWriter
from ckptstore.repo.packs import FrameTable, PlacedFrame, own_bytes, pack_owner
from ckptstore.repo.progress import Meter, ProgressCallback
from ckptstore.repo.remote import RemoteSave, RemoteTier

#: How often a push sends again what gc has condemned meanwhile, before it gives up for now.
MAX_ROUNDS = 5

_ENCODERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        plain_bytes: tensor bytes of the shards that are here.
        stored_bytes: bytes this save added to the remote for them, in this push or an earlier attempt.
        sent_bytes: pack bytes this push sent.
        reused_bytes: tensor bytes that were referenced instead of sent.
        bytes_by_codec: codec -> (tensor bytes, frame bytes) of what this push encoded.
        encode_seconds: time in which nothing could be sent because chunks were still being encoded.
        rests_on: save_ids of the saves whose packs this one refers to: bases of its deltas, and chunks it shares.
        committed: the root manifest once the save is committed on this remote; None while other ranks are missing.
        is_cancelled: stopped on request; the next push goes on from there.
    """

    plain_bytes: int
    stored_bytes: int
    sent_bytes: int
    reused_bytes: int
    committed: RootManifest | None
    is_cancelled: bool = False
    bytes_by_codec: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rests_on: tuple[str, ...] = ()
    encode_seconds: float = 0.0

    def notes(self) -> dict[str, object]:
        """What is noted of a push beside the checkpoint, for people."""
        return {
            "sent_bytes": self.sent_bytes,
            "stored_bytes": self.stored_bytes,
            "reused_bytes": self.reused_bytes,
            "by_codec": {codec: list(sizes) for codec, sizes in self.bytes_by_codec.items()},
            "rests_on": list(self.rests_on),
            "encode_seconds": round(self.encode_seconds, 6),
        }


def push(
    tier: LocalTier,
    path: Path,
    run: str,
    remote: RemoteTier,
    *,
    config: StoreConfig,
    progress: ProgressCallback | None = None,
    cancelled: Callable[[], bool] | None = None,
    distrust: Collection[str] = (),
) -> PushResult:
    """Send every shard of this local checkpoint that is here, and commit if that completes the save. Blocks.

    A save that is committed already is looked over, one HEAD per pack, and what is gone is sent again.
    Memory: ``upload_concurrency + 2`` packs, and a few chunks per core.

    Args:
        tier: The local tier, whose other checkpoints may serve as bases.
        path: A prepared or complete checkpoint directory in it.
        run: The run.
        remote: Where to; one of the same run.
        config: ``pack_bytes``, ``upload_concurrency`` and ``compress`` are used.
        progress: Called often, from this thread and others, one at a time.
        cancelled: Asked between chunks.
        distrust: Keys of packs on this remote that are known to be damaged: nothing may refer to them any more.

    Raises:
        IntegrityError: a local shard is damaged (it is never uploaded), or the remote holds another save of this name.
        IncompleteCheckpointError: no shard is here.
        TransientError: trying again can help, and goes on from here.
        StorageError: refused for good: bucket, rights, quota.
    """
    shards = tier.shard_manifests_present(path)
    if not shards:
        raise IncompleteCheckpointError(f"{path} holds no shard", path=str(path), run=run)
    meter = Meter(sum(piece.size_bytes for shard in shards for piece in shard.pieces), progress)
    remote.create()
    try:
        return _push_shards(tier, path, run, shards, remote, config, meter, cancelled or _never, distrust)
    except CkptError:
        remote.forget_known()
        raise


def _push_shards(
    tier: LocalTier,
    path: Path,
    run: str,
    shards: list[ShardManifest],
    remote: RemoteTier,
    config: StoreConfig,
    meter: Meter,
    cancelled: Callable[[], bool],
    distrust: Collection[str],
) -> PushResult:
    save_id = shards[0].save_id
    committed = remote.known_saves()
    summary = next((shard.summary for shard in shards if shard.summary is not None), None)
    named = [RemoteSave.of(summary)] if summary is not None else [s for s in committed if s.save_id == save_id]
    root = remote.find_root(named[0]) if named else None
    if root is not None:
        _check_ours(remote, shards, root)
    # Before anything is looked up: what gc deletes from now on, it has announced to those whose intent is there.
    is_resumed = root is not None or not remote.put_intent(save_id)
    known = KnownChunks(remote, distrust)
    job = _Push(path, remote, config, known, meter, cancelled, distrust)
    job.is_committed = root is not None
    try:
        left = [shard for shard in shards if not (is_resumed and job.is_there(shard))]
        if left:
            if root is not None:
                remote.put_intent(save_id)
                known.look_again()
            here = {s.save_id: s.path for s in tier.saves(run) if s.state == "complete" and s.save_id != save_id}
            known.gather([save for save in committed if save.save_id != save_id], shards, here)
        for shard in left:
            job.send(shard)
        if left or root is None:
            job.settle(shards)
    except _CancelledError:
        return job.result(None, is_cancelled=True)
    meter.add(stage="commit")
    if root is None:
        root = remote.try_commit(save_id, shards, avoid=job.avoid)
    else:
        remote.forget_intent(save_id)  # an earlier attempt may have died between the commit and this
    meter.add(stage="done")
    return job.result(root)


def _check_ours(remote: RemoteTier, shards: list[ShardManifest], root: RootManifest) -> None:
    """A committed save of this name must be this save."""
    pinned = {ref.rank: ref for ref in root.shards}
    for shard in shards:
        if pinned.get(shard.rank) != ref_of(shard):
            raise ConflictError(
                f"{remote.name} holds a different part of rank {shard.rank} for save {shard.save_id}",
                rank=shard.rank,
                step=shard.step,
                tier=remote.name,
            )


class _CancelledError(Exception):
    """Leaves the pipeline when the caller wants no more of it."""


def _never() -> bool:
    return False


class _Push:
    """One push: the pieces of the pipeline share its settings and its thread pools' lifetime is one shard."""

    def __init__(
        self,
        path: Path,
        remote: RemoteTier,
        config: StoreConfig,
        known: KnownChunks,
        meter: Meter,
        cancelled: Callable[[], bool],
        distrust: Collection[str],
    ) -> None:
        self._path = path
        self.remote = remote
        self.config = config
        self._known = known
        self.meter = meter
        self._cancelled = cancelled
        self.distrust = distrust
        self.avoid: frozenset[str] = frozenset()
        self._documents: dict[int, RemoteShard] = {}
        self._replace: set[int] = set()
        self.is_first = True
        self.is_committed = False
        self.reused_bytes = 0
        self._encode_s = 0.0
        self._by_codec: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])

    def result(self, root: RootManifest | None, *, is_cancelled: bool = False) -> PushResult:
        """What was done."""
        owners = {pack_owner(key) for document in self._documents.values() for key in document.packs}
        own = {document.shard.save_id for document in self._documents.values()}
        return PushResult(
            plain_bytes=self.meter.plain_total,
            stored_bytes=sum(document.stored_bytes for document in self._documents.values()),
            sent_bytes=self.meter.sent_bytes,
            reused_bytes=self.reused_bytes,
            committed=root,
            is_cancelled=is_cancelled,
            bytes_by_codec={name: (plain, stored) for name, (plain, stored) in sorted(self._by_codec.items())},
            rests_on=tuple(sorted(owner for owner in owners if owner is not None and owner not in own)),
            encode_seconds=self._encode_s,
        )

    def is_there(self, shard: ShardManifest) -> bool:
        """Whether an earlier attempt has sent this shard, and all it needs is still there."""
        self.is_first = False
        try:
            earlier = self.remote.find_shard(shard.save_id, shard.rank)
        except FormatError:
            self._replace.add(shard.rank)
            return False
        if earlier is not None and earlier.shard != shard and self.is_committed:
            self._replace.add(shard.rank)  # the commit pins ours, so what is there is damaged
        if earlier is None or earlier.shard != shard:
            return False
        if earlier.stored_bytes != own_bytes(earlier) or earlier.format != FORMAT or not self._known.holds_all(earlier):
            self._replace.add(shard.rank)
            return False
        self.meter.add(plain=sum(piece.size_bytes for piece in shard.pieces))
        self._documents[shard.rank] = earlier
        self._known.add(earlier, None)
        self.remote.remember_shard(earlier, strong_digest(shard.encode()))
        return True

    def send(self, shard: ShardManifest) -> None:
        """Send one shard's chunks and then its remote manifest."""
        with _open_shard(self._path / shard.file, shard) as fd, self._pack_writer(shard) as packs:
            frames, chunks = self._frames(shard, fd, packs)
            keys = packs.finish()
        table = FrameTable()
        indices = [table.add(_named(frame, keys)) for frame in frames]
        rows = [[indices[number] for number in row] for row in chunks]
        document = table.remote_shard(shard, rows, 0)
        document = document.model_copy(update={"stored_bytes": own_bytes(document)})
        document = self.remote.put_shard(document, replace=shard.rank in self._replace)
        self._documents[shard.rank] = document
        self._known.add(document, None)
        self.remote.remember_shard(document, strong_digest(shard.encode()))

    def settle(self, shards: list[ShardManifest]) -> None:
        """Send again what gc has condemned or deleted since it was looked up, until nothing we refer to is.

        Raises:
            TransientError: gc condemns faster than we send.
        """
        save_id = shards[0].save_id
        for _ in range(MAX_ROUNDS):
            if self.remote.put_intent(save_id):
                # Ours was taken for dead, and with it what we had sent.
                self._known.look_again()
                doubtful = {rank for rank, document in self._documents.items() if not self._known.holds_all(document)}
            else:
                doubtful = set()
            self.avoid = self.remote.condemned()
            self._known.distrust(self.avoid)
            again = [
                shard
                for shard in shards
                if shard.rank in doubtful or not self.avoid.isdisjoint(self._documents[shard.rank].packs)
            ]
            if not again:
                return
            self._replace.update(shard.rank for shard in again)
            for shard in again:
                self.send(shard)
        raise TransientError(f"gc on {self.remote.name} condemns what save {save_id} refers to again and again")

    def _frames(self, shard: ShardManifest, fd: int, packs: PackWriter) -> tuple[list[PlacedFrame], list[list[int]]]:
        """All distinct frames of the shard, and for each piece's chunks the number of its frame.

        The pack of a new frame is its number as text until the pack is closed and has a name.
        """
        frames: list[PlacedFrame] = []
        numbers: dict[tuple[str, bool], int] = {}
        rows: list[list[int]] = [[] for _ in shard.pieces]
        with closing(self._encoded(shard, fd)) as encoded:
            for job, result in encoded:
                chunk, is_new = job.chunk, isinstance(result, EncodedChunk)
                # Derived frames apart: equal bytes may be numbers of another dtype, which must not rest on these.
                key = (result.name, result.codec == "derived")
                number = numbers.get(key)
                if number is None:
                    number = numbers[key] = len(frames)
                    if isinstance(result, EncodedChunk):
                        if result.codec == "derived" and job.master is not None:
                            result = replace(result, base=frames[rows[job.master.piece][job.master.index]])
                        result = packs.add(result, chunk)
                        self._by_codec[result.codec][0] += chunk.size_bytes
                        self._by_codec[result.codec][1] += result.length
                    frames.append(result)
                if not is_new:
                    self.reused_bytes += chunk.size_bytes
                rows[chunk.piece].append(number)
                self.meter.add(plain=chunk.size_bytes)
        return frames, rows

    def _pack_writer(self, shard: ShardManifest) -> PackWriter:
        return PackWriter(
            self.remote,
            shard,
            self.config,
            self.meter,
            look_first=not self.is_first,
            distrust=self.distrust,
            avoid=self.avoid,
        )

    def _encoded(
        self, shard: ShardManifest, fd: int
    ) -> Generator[tuple[ChunkJob, EncodedChunk | PlacedFrame], None, None]:
        """Every chunk of the shard in sending order, referenced or encoded; a window of them is worked on at once."""
        encoder = ChunkEncoder(shard, fd, self._known, compress=self.config.compress)
        jobs = encoder.jobs()
        window: deque[tuple[ChunkJob, Future[EncodedChunk | PlacedFrame]]] = deque()
        with ThreadPoolExecutor(_ENCODERS, "ckptstore-encode") as pool:
            try:
                while True:
                    while len(window) <= 2 * _ENCODERS and (job := next(jobs, None)) is not None:
                        window.append((job, pool.submit(encoder.encode, job)))
                    if not window:
                        return
                    if self._cancelled():
                        raise _CancelledError
                    done, future = window.popleft()
                    begun = time.monotonic()
                    result = future.result()
                    self._encode_s += time.monotonic() - begun
                    yield done, result
            finally:
                pool.shutdown(cancel_futures=True)


def _named(frame: PlacedFrame, keys: list[str]) -> PlacedFrame:
    """The frame, and what it rests on, with the keys of packs that had only numbers while they were open."""
    base = _named(frame.base, keys) if frame.base is not None else None
    return replace(frame, pack=keys[int(frame.pack)] if frame.pack.isdecimal() else frame.pack, base=base)


@contextmanager
def _open_shard(path: Path, shard: ShardManifest) -> Iterator[int]:
    try:
        fd = os.open(path, READ_FLAGS)
    except FileNotFoundError:
        raise NotFoundError(f"the shard file of rank {shard.rank} is gone: {path}", rank=shard.rank) from None
    except OSError as error:
        raise_for_errno(error, f"can't open {path}", rank=shard.rank, step=shard.step)
    try:
        yield fd
    finally:
        os.close(fd)
