"""push: a committed local checkpoint becomes a committed remote one.

Per shard: chunks that a committed save of this remote holds already are referenced; the others are read from the local
file, checked against their digest, encoded, decoded again to be sure, and packed. When all packs of a shard are
confirmed its remote shard manifest is created, and whoever sees those of all ranks commits.

May be killed, repeated, run twice at once, and run by several nodes for their own ranks: every name is content-named
or created once, so a second attempt finds what the first one sent.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ckptstore import codec
from ckptstore.config import StoreConfig
from ckptstore.errors import ConflictError, FormatError, IncompleteCheckpointError, IntegrityError, NotFoundError
from ckptstore.format.manifest import RootManifest, ShardManifest, digest, ref_of, strong_digest
from ckptstore.repo.durable import READ_FLAGS, raise_for_errno
from ckptstore.repo.known import KnownChunks
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import Chunk, FrameTable, PlacedFrame, chunks_of
from ckptstore.repo.progress import Meter, ProgressCallback
from ckptstore.repo.remote import RemoteTier

#: A delta that saves less than this against its full base is not worth a second read at restore: the chunk is sent in
#: full and becomes the base of those that follow.
DELTA_MUST_SAVE = 0.2

_ENCODERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        plain_bytes: tensor bytes of the shards that are here.
        stored_bytes: bytes this save added to the remote for them, in this push or an earlier attempt.
        sent_bytes: pack bytes this push sent.
        reused_bytes: tensor bytes that were referenced instead of sent.
        committed: the root manifest once the save is committed on this remote; None while other ranks are missing.
        is_cancelled: stopped on request; the next push goes on from there.
    """

    plain_bytes: int
    stored_bytes: int
    sent_bytes: int
    reused_bytes: int
    committed: RootManifest | None
    is_cancelled: bool = False


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
    Memory: ``upload_concurrency + 1`` packs, and a few chunks per core.

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
    save_id = shards[0].save_id
    meter = Meter(sum(piece.size_bytes for shard in shards for piece in shard.pieces), progress)
    remote.create()
    committed = remote.saves()
    done = next((save for save in committed if save.save_id == save_id), None)
    root = remote.root_manifest(done) if done is not None else None
    if root is not None:
        _check_ours(remote, shards, root)
    is_resumed = root is not None or not remote.put_intent(save_id)
    known = KnownChunks(remote, distrust)
    job = _Push(path, remote, config, known, meter, cancelled or _never, distrust)
    try:
        left = [shard for shard in shards if not (is_resumed and job.is_there(shard))]
        if left:
            if root is not None:
                remote.put_intent(save_id)  # what is sent again needs gc's respect as much as it did the first time
            here = {s.save_id: s.path for s in tier.saves(run) if s.state == "complete" and s.save_id != save_id}
            known.gather([save for save in committed if save != done], shards, here)
        for shard in left:
            job.send(shard)
    except _CancelledError:
        return PushResult(meter.plain_total, job.stored_bytes, meter.sent_bytes, job.reused_bytes, None, True)
    meter.add(stage="commit")
    if root is None:
        root = remote.try_commit(save_id, shards)
    else:
        remote.forget_intent(save_id)  # an earlier attempt may have died between the commit and this
    meter.add(stage="done")
    return PushResult(meter.plain_total, job.stored_bytes, meter.sent_bytes, job.reused_bytes, root)


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


@dataclass(frozen=True)
class _Encoded:
    """A chunk that is not there yet; ``base`` is the frame a delta refers to."""

    frame: bytes
    codec: str
    name: str
    base: PlacedFrame | None


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
        self._replace: set[int] = set()
        self.is_first = True
        self.reused_bytes = 0
        self.stored_bytes = 0

    def is_there(self, shard: ShardManifest) -> bool:
        """Whether an earlier attempt has sent this shard, and all it needs is still there."""
        self.is_first = False
        try:
            earlier = self.remote.find_shard(shard.save_id, shard.rank)
        except FormatError:
            self._replace.add(shard.rank)
            return False
        if earlier is None or earlier.shard != shard:
            return False
        if not self._known.holds_all(earlier):
            self._replace.add(shard.rank)
            return False
        self.meter.add(plain=sum(piece.size_bytes for piece in shard.pieces))
        self.stored_bytes += earlier.stored_bytes
        self._known.add(earlier, None)
        self.remote.remember_shard(earlier, strong_digest(shard.encode()))
        return True

    def send(self, shard: ShardManifest) -> None:
        """Send one shard's chunks and then its remote manifest."""
        with _open_shard(self._path / shard.file, shard) as fd, _Packs(self, shard) as packs:
            frames, chunks = self._frames(shard, fd, packs)
            keys = packs.finish()
        table = FrameTable()
        indices = [table.add(replace(f, pack=keys[int(f.pack)]) if f.pack.isdecimal() else f) for f in frames]
        rows = [[indices[number] for number in row] for row in chunks]
        document = table.remote_shard(shard, rows, packs.size_bytes)
        document = self.remote.put_shard(document, replace=shard.rank in self._replace)
        self.stored_bytes += document.stored_bytes
        self._known.add(document, None)
        self.remote.remember_shard(document, strong_digest(shard.encode()))

    def _frames(self, shard: ShardManifest, fd: int, packs: _Packs) -> tuple[list[PlacedFrame], list[list[int]]]:
        """All distinct frames of the shard, and for each piece's chunks the number of its frame.

        The pack of a new frame is its number as text until the pack is closed and has a name.
        """
        frames: list[PlacedFrame] = []
        numbers: dict[str, int] = {}
        rows: list[list[int]] = [[] for _ in shard.pieces]
        with closing(self._encoded(shard, fd)) as encoded:
            for chunk, result in encoded:
                number = numbers.get(result.name)
                if number is None:
                    number = numbers[result.name] = len(frames)
                    frames.append(packs.add(result, chunk) if isinstance(result, _Encoded) else result)
                if not isinstance(result, _Encoded):
                    self.reused_bytes += chunk.size_bytes
                rows[chunk.piece].append(number)
                self.meter.add(plain=chunk.size_bytes)
        return frames, rows

    def _encoded(self, shard: ShardManifest, fd: int) -> Generator[tuple[Chunk, _Encoded | PlacedFrame], None, None]:
        """Every chunk of the shard in file order, referenced or encoded; a window of them is worked on at once."""
        chunks = iter([chunk for row in chunks_of(shard) for chunk in row])
        window: deque[tuple[Chunk, Future[_Encoded | PlacedFrame]]] = deque()
        with ThreadPoolExecutor(_ENCODERS, "ckptstore-encode") as pool:
            try:
                while True:
                    while len(window) <= 2 * _ENCODERS and (chunk := next(chunks, None)) is not None:
                        window.append((chunk, pool.submit(self._one, shard, fd, chunk)))
                    if not window:
                        return
                    if self._cancelled():
                        raise _CancelledError
                    done, future = window.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _one(self, shard: ShardManifest, fd: int, chunk: Chunk) -> _Encoded | PlacedFrame:
        """Refer to this chunk, or read, check and encode it. Runs in the pool."""
        there = self._known.find(chunk)
        if there is not None:
            return there
        piece = shard.pieces[chunk.piece]
        try:
            plain = os.pread(fd, chunk.size_bytes, chunk.offset)
        except OSError as error:
            raise_for_errno(error, f"can't read {shard.file} of step {shard.step}", rank=shard.rank, key=piece.fqn)
        if len(plain) != chunk.size_bytes or digest(plain) != chunk.digest:
            raise IntegrityError(
                f"{piece.fqn} is damaged in the local file {shard.file} of rank {shard.rank}, step {shard.step}",
                hint="it was not uploaded; `ckptctl verify --repair` takes it from another tier if one has it",
                key=piece.fqn,
                rank=shard.rank,
                step=shard.step,
                tier="local",
            )
        dtype = shard.tensors[piece.fqn].dtype
        base = self._known.base_for(shard, piece, chunk) if self.config.compress else None
        base_plain = base.plain.read() if base is not None else None
        encoded = codec.encode(plain, dtype=dtype, base=base_plain, compress=self.config.compress)
        is_poor = base is not None and len(encoded.frame) > (1 - DELTA_MUST_SAVE) * base.frame.length
        if encoded.codec == "delta" and is_poor:
            encoded = codec.encode(plain, dtype=dtype, compress=self.config.compress)
        is_delta = encoded.codec == "delta"
        again = codec.decode(encoded.frame, size_bytes=len(plain), base=base_plain if is_delta else None)
        if again != plain:
            raise IntegrityError(f"{piece.fqn}: codec {encoded.codec} does not return what it was given", key=piece.fqn)
        return _Encoded(
            frame=encoded.frame,
            codec=encoded.codec,
            name=strong_digest(plain),
            base=base.frame if is_delta and base is not None else None,
        )


class _Packs:
    """Fills packs and keeps a bounded number of them in flight; use as a context manager."""

    def __init__(self, job: _Push, shard: ShardManifest) -> None:
        self._job = job
        self._shard = shard
        self._buffer = bytearray()
        self._sending: list[Future[str]] = []
        self._slots = threading.Semaphore(job.config.upload_concurrency)
        self._pool = ThreadPoolExecutor(job.config.upload_concurrency, "ckptstore-upload")
        self.size_bytes = 0

    def __enter__(self) -> _Packs:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Wait for what is in flight: a request can't be called back, and a finished pack serves the next attempt."""
        self._pool.shutdown(cancel_futures=True)

    def add(self, encoded: _Encoded, chunk: Chunk) -> PlacedFrame:
        """Put one frame into the open pack; blocks while too many packs are in flight."""
        if self._buffer and len(self._buffer) + len(encoded.frame) > self._job.config.pack_bytes:
            self._send()
        frame = PlacedFrame(
            pack=str(len(self._sending)),
            offset=len(self._buffer),
            length=len(encoded.frame),
            codec=encoded.codec,
            size_bytes=chunk.size_bytes,
            name=encoded.name,
            base=encoded.base,
        )
        self._buffer += encoded.frame
        return frame

    def finish(self) -> list[str]:
        """Send the rest and wait until every pack is confirmed; their keys, by number."""
        if self._buffer:
            self._send()
        return [future.result() for future in self._sending]

    def _send(self) -> None:
        self._slots.acquire()
        for future in self._sending:
            if future.done():
                future.result()  # stop at the first failure, not after the last chunk
        data, self._buffer = self._buffer, bytearray()
        self.size_bytes += len(data)
        self._sending.append(self._pool.submit(self._put, data))

    def _put(self, data: bytearray) -> str:
        try:
            job, shard = self._job, self._shard
            key, sent = job.remote.put_pack(
                shard.save_id, shard.rank, data, look_first=not job.is_first, distrust=job.distrust
            )
            job.meter.add(sent=sent)
            return key
        finally:
            self._slots.release()


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
