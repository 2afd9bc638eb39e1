"""pull: a committed remote checkpoint becomes a local one, byte-equal to the original.

A shard file is its payload chunks, which lie in packs, and everything else, which follows from the shard manifest.
Requests are coalesced over neighbouring frames, several are in flight, and every chunk is verified before it is
written. A second attempt keeps what the first one wrote, chunk by chunk, as far as its digests are right.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from ckptstore.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CkptError,
    ConfigError,
    FormatError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StorageError,
)
from ckptstore.format import stock
from ckptstore.format.manifest import RootManifest, ShardManifest, ShardRef, digest
from ckptstore.repo import directory, durable, names
from ckptstore.repo.commit import StagingDir, complete
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.frames import Failures, RemoteChunks
from ckptstore.repo.local import LocalSave, LocalTier
from ckptstore.repo.packs import Chunk, PlacedFrame, Range, chunks_of, placed, ranges
from ckptstore.repo.progress import Meter, ProgressCallback
from ckptstore.repo.remote import RemoteSave, RemoteTier

_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def pull(
    remotes: RemoteTier | Sequence[RemoteTier],
    save: RemoteSave | str,
    tier: LocalTier,
    *,
    part: tuple[int, int] | None = None,
    reverify: bool = False,
    parts_of_node: bool = False,
    concurrency: int = 4,
    progress: ProgressCallback | None = None,
) -> Path:
    """Bring one save, or every n-th shard of it, into the local tier. Blocks; may be killed and called again.

    Memory: ``concurrency`` requests of at most ~16 MiB, decoded, with the bases of their deltas.

    Args:
        remotes: One run in one or more stores, in order of preference.
        save: The save, as :meth:`RemoteTier.saves` names it (the name is the same in every remote), or its save_id.
        tier: Where to; its store must exist.
        part: ``(i, n)``: only shards of the ranks with ``rank % n == i``. The result is *prepared* until all ranks'
            shards are here, whoever brings them.
        reverify: Trust nothing that is here: read every byte of these shards, and replace what is wrong or missing.
            Otherwise a complete checkpoint is left as it is.
        parts_of_node: Of a save of several nodes that is here in part, only what belongs to it.
        concurrency: Requests in flight.
        progress: Called often, from several threads, one at a time.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointNotFoundError: no remote has this save.
        IntegrityError: no remote has a good copy of some chunk; names the tensor.
        TransientError: trying again can help, and goes on from here.
        NoSpaceError: the disk is full; what was begun is removed.
        StorageError: a disk or a remote refused.
    """
    tiers = [remotes] if isinstance(remotes, RemoteTier) else list(remotes)
    index, count = part if part is not None else (0, 1)
    if not tiers or not 0 <= index < count or concurrency < 1:
        raise ConfigError(f"can't pull part {index}/{count} from {len(tiers)} remotes")
    run = tiers[0].run
    here = tier.find(run, save if isinstance(save, str) else save.save_id)
    is_complete = here is not None and here.state == "complete"
    root = None if reverify or here is None or not is_complete else _local_root(tier, run, here)
    if root is None:
        root = _remote_root(tiers, save)
    refs = directory.parts_of_node(here.path, root) if here is not None and parts_of_node else root.shards
    wanted = [ref for ref in refs if ref.rank % count == index]
    if here is not None and is_complete and not reverify and all(_is_here(here.path, ref) for ref in wanted):
        return here.path
    meter = Meter(sum(ref.size_bytes for ref in wanted), progress)
    source = RemoteChunks(tiers, root.summary.save_id, lambda count: meter.add(sent=count))
    staging = StagingDir(tier, run, root.summary.step, root.summary.save_id)
    try:
        with _locked(staging) as path:
            with ThreadPoolExecutor(concurrency, "ckptstore-pull") as pool:
                for ref in wanted:
                    if not reverify and _is_here(path, ref):
                        meter.add(plain=ref.size_bytes)
                    else:
                        _ShardPull(source, ref, path, meter, pool, concurrency).run()
            meter.add(stage="commit")
            durable.fsync_dir(path)
            if is_complete or all(_is_here(path, ref) for ref in root.shards):
                _complete(path, root)
            if path == staging.path:
                path = staging.commit()
    except OSError as error:
        if isinstance(error, NoSpaceError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            staging.discard()
        raise_for_errno(error, f"can't write step {root.summary.step}", run=run, step=root.summary.step)
    meter.add(stage="done")
    return path


def _local_root(tier: LocalTier, run: str, save: LocalSave) -> RootManifest | None:
    try:
        return tier.root_manifest(run, save)
    except (NotFoundError, FormatError):
        return None


def _remote_root(remotes: list[RemoteTier], save: RemoteSave | str) -> RootManifest:
    """The root manifest from the first remote that has it."""
    failures: list[CkptError] = []
    for remote in remotes:
        try:
            if isinstance(save, str):
                named = next((found for found in remote.saves() if found.save_id == save), None)
                if named is None:
                    raise CheckpointNotFoundError(f"save {save} of run {remote.run} is not on {remote.name}")
                return remote.root_manifest(named)
            return remote.root_manifest(save)
        except (StorageError, FormatError) as error:
            failures.append(error)
    # A remote that could not be asked may have it: that comes before the verdict that it is nowhere.
    raise next((error for error in failures if not isinstance(error, NotFoundError)), failures[0])


def _is_here(path: Path, ref: ShardRef) -> bool:
    """Whether this shard's committed manifest and a file of its size are in this directory."""
    try:
        directory.read_shard_manifest(path, ref)
        return directory.file_bytes(path / ref.file) == ref.file_bytes
    except (NotFoundError, IntegrityError, FormatError):
        return False


def _complete(path: Path, root: RootManifest) -> None:
    """Complete the checkpoint, or make an already complete one what it should be: its small files are derived."""
    if directory.file_bytes(path / names.MANIFEST) is None:
        complete(path, root)
        return
    expected = {names.SUMMARY: root.summary.encode(), names.MANIFEST: root.encode()}
    if all(_is_here(path, ref) for ref in root.shards):
        shards = [directory.read_shard_manifest(path, ref) for ref in root.shards]
        expected[names.STOCK_METADATA] = stock.metadata(root, shards)
    for name, data in expected.items():
        if not _has(path / name, data):
            durable.write_replacing(path / name, data)
    durable.fsync_dir(path)


def _has(file: Path, data: bytes) -> bool:
    try:
        return durable.read_bounded(file, len(data)) == data
    except (FileNotFoundError, FormatError):
        return False


@contextmanager
def _locked(staging: StagingDir) -> Iterator[Path]:
    """The directory to write into, held against other pulls: the final one where it exists, else the staging one."""
    while True:
        path = staging.final_path
        if not path.is_dir():
            try:
                staging.create(keep=True)
            except CheckpointExistsError:
                continue
            path = staging.path
        try:
            fd = os.open(path, durable.DIRECTORY_FLAGS)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not _is_same(fd, path):  # it was renamed or removed while we waited
                continue
            if path == staging.path:
                _clear(path)
            yield path
            return
        finally:
            os.close(fd)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _clear(path: Path) -> None:
    """Of an earlier attempt keep the shard files, whose chunks will be verified, and nothing else."""
    with os.scandir(path) as entries:
        for entry in entries:
            if names.parse_shard_file(entry.name) is None and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


class _ShardPull:
    """One shard file on its way."""

    def __init__(
        self,
        source: RemoteChunks,
        ref: ShardRef,
        path: Path,
        meter: Meter,
        pool: ThreadPoolExecutor,
        concurrency: int,
    ) -> None:
        self._source = source
        self._ref = ref
        self._path = path
        self._meter = meter
        self._pool = pool
        self._concurrency = concurrency
        self._failures = Failures()

    def run(self) -> None:
        """Write the file and then its manifest, both durable."""
        shard = self._source.shard(self._ref, self._failures)
        if shard is None:
            raise self._failures.error(f"the shard manifest of rank {self._ref.rank}", rank=self._ref.rank)
        file = self._path / shard.file
        is_new = directory.file_bytes(file) is None
        fd = os.open(file, _OPEN_FLAGS, 0o600)
        try:
            self._fill(fd, shard, is_new=is_new)
            durable.fsync_file(fd)
        except OSError as error:
            # What a failed fsync left can't be trusted to be what was written; a full disk wants its room back.
            if not isinstance(error, CkptError) and directory.file_bytes(self._path / names.MANIFEST) is None:
                os.unlink(file)
            raise
        finally:
            os.close(fd)
        manifest = self._path / names.shard_manifest_file(shard.rank)
        if not _has(manifest, shard.encode()):
            with suppress(FileNotFoundError):
                os.unlink(manifest)
            durable.write_new(manifest, shard.encode())

    def _fill(self, fd: int, shard: ShardManifest, *, is_new: bool) -> None:
        _allocate(fd, shard.file_bytes)
        _write_skeleton(fd, shard)
        chunks = [chunk for row in chunks_of(shard) for chunk in row]
        missing = chunks if is_new else [chunk for chunk in chunks if not _holds(fd, chunk)]
        self._meter.add(plain=sum(c.size_bytes for c in chunks) - sum(c.size_bytes for c in missing))
        for remote in self._source.remotes:
            missing = self._in_bulk(remote, missing, fd) if missing else []
        for chunk in missing:
            self._one_by_one(shard, chunk, fd)

    def _in_bulk(self, remote: RemoteTier, chunks: list[Chunk], fd: int) -> list[Chunk]:
        """Fetch in ranges what this remote has; returns the chunks it could not give."""
        try:
            document = self._source.document(remote, self._ref)
        except (StorageError, IntegrityError, FormatError) as error:
            self._failures.add(remote.name, error)
            return chunks
        wanted: defaultdict[PlacedFrame, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            wanted[placed(document, document.frames[document.chunks[chunk.piece][chunk.index]])].append(chunk)
        failed: list[Chunk] = []
        requests = ranges(wanted)
        is_down = threading.Event()
        window: deque[Future[list[Chunk]]] = deque()
        try:
            while True:
                while len(window) < 2 * self._concurrency and (request := next(requests, None)) is not None:
                    window.append(self._pool.submit(self._range, remote, request, wanted, fd, is_down))
                if not window:
                    return failed
                failed += window.popleft().result()
        finally:
            is_down.set()
            wait(window)  # nobody writes to a descriptor that its owner is about to close

    def _range(
        self,
        remote: RemoteTier,
        request: Range,
        wanted: dict[PlacedFrame, list[Chunk]],
        fd: int,
        is_down: threading.Event,
    ) -> list[Chunk]:
        """One request: every good chunk is written, the others are returned. Runs in the pool."""
        left = {frame: wanted[frame] for frame in request.frames}
        failed: list[Chunk] = []
        try:
            for frame, plain in () if is_down.is_set() else self._source.read_range(remote, request):
                for chunk in left.pop(frame):
                    if isinstance(plain, CkptError) or digest(plain) != chunk.digest:
                        failed.append(chunk)
                    else:
                        self._write(fd, chunk, plain)
        except (NotFoundError, IntegrityError):
            pass  # these bytes are gone or cut off; what lies in other packs may be whole
        except StorageError:
            is_down.set()  # don't spend the retries of every request on a remote that doesn't answer
        return failed + [chunk for chunks in left.values() for chunk in chunks]

    def _one_by_one(self, shard: ShardManifest, chunk: Chunk, fd: int) -> None:
        """The last resort for one chunk: its own request, to every remote, and the verdict with all reasons."""
        failures = Failures()
        out = memoryview(bytearray(chunk.size_bytes))
        if self._source.read(self._ref, chunk, out, failures) is None:
            fqn = shard.pieces[chunk.piece].fqn
            raise failures.error(
                f"{fqn} (rank {shard.rank}, step {shard.step})", key=fqn, rank=shard.rank, step=shard.step
            )
        self._write(fd, chunk, out)

    def _write(self, fd: int, chunk: Chunk, plain: memoryview) -> None:
        _write_at(fd, chunk.offset, plain)
        self._meter.add(plain=chunk.size_bytes)


def _write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)


def _allocate(fd: int, size_bytes: int) -> None:
    """Take the room now: a full disk shows before the first byte is fetched."""
    if size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(fd, size_bytes)


def _write_skeleton(fd: int, shard: ShardManifest) -> None:
    """Everything but the payloads, if it is what the original had."""
    state = xxhash.xxh3_128()
    for offset, data in stock.skeleton(shard):
        state.update(data)
        if os.pread(fd, len(data), offset) != data:
            _write_at(fd, offset, data)
    if state.hexdigest() != shard.skeleton_digest:
        raise FormatError(
            f"the envelopes in {shard.file} would differ from those of the original",
            hint="restore with the version that wrote it",
            rank=shard.rank,
        )


def _holds(fd: int, chunk: Chunk) -> bool:
    try:
        data = os.pread(fd, chunk.size_bytes, chunk.offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False
    return len(data) == chunk.size_bytes and digest(data) == chunk.digest
