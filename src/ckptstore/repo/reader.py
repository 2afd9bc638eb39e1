"""One checkpoint, read chunk by chunk from wherever it is whole.

Local bytes first, straight into the caller's memory; what is damaged or missing there comes from the remotes in their
order, and a damaged local file is repaired in place with the verified bytes. Every byte handed out has the digest that
its shard manifest states, every shard manifest has the digest that the root manifest states, and the root manifest is
the pure function of its shard manifests that it must be.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from types import TracebackType

from ckptstore.errors import (
    CkptError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    NotFoundError,
    StorageError,
)
from ckptstore.format.manifest import (
    Json,
    Piece,
    RootManifest,
    ShardManifest,
    ShardRef,
    TensorMeta,
    digest,
    root_from,
)
from ckptstore.repo import directory
from ckptstore.repo.frames import Failures, RemoteChunks, Wanted
from ckptstore.repo.holding import Hold
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import Chunk, chunks_of
from ckptstore.repo.peers import PEERS, Told
from ckptstore.repo.record import ARENA, LOCAL, Record
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.shard_files import ShardFiles, repair

Buffer = bytes | bytearray | mmap

_MANIFEST_READERS = 8


class CheckpointReader:
    """Opens one checkpoint: reads its manifests and no tensor byte. Thread-safe; close it to let go of it.

    While it is open the local copy is not deleted: retention passes it over and comes back to it.

    Attributes:
        root: The root manifest.
        shards: Shard manifests by rank.
        tensors: Every stored tensor by name, without aliases.
        tree: The encoded state tree.
        aliases: Tied names -> the name whose bytes they share.

    Args:
        record: The save, as the catalogue knows it.
        local: The local tier, if there is one.
        remotes: All remotes, in order of preference; those that lack the save are not asked.
        told: Manifests that other nodes of this job hold; their shard files are theirs to read.
        images: Rank -> image of its shard file in memory, which may change at any time.

    Raises:
        IntegrityError: no tier has manifests that fit together.
        IncompleteCheckpointError: some ranks' parts are on other nodes, and there is no remote.
        TransientError: a tier that may have them can't be reached now.
        StorageError: ... or refuses.
    """

    def __init__(
        self,
        record: Record,
        local: LocalTier | None,
        remotes: Sequence[RemoteTier],
        *,
        told: Told | None = None,
        images: Mapping[int, Buffer] | None = None,
    ) -> None:
        self._summary = record.summary
        self._told = told
        self._images = dict(images or {})
        self._local = local
        self._save = record.local if local is not None else None
        self._places = dict(record.remote)
        self._chunks = RemoteChunks([r for r in remotes if r.name in self._places], record.summary.save_id)
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._repaired: set[str] = set()
        self._manifests_here: set[int] = set()
        self._hold = Hold(self._save.path) if self._save is not None else None
        try:
            self.root, self.shards = self._open()
        except BaseException:
            self.close()
            raise
        self._tables = {rank: chunks_of(shard) for rank, shard in self.shards.items()}
        self._refs = {ref.rank: ref for ref in self.root.shards}
        here = self._save.path if self._save is not None else None
        self._paths = {rank: here / shard.file for rank, shard in self.shards.items()} if here is not None else {}
        self.tensors: dict[str, TensorMeta] = {}
        self._index: dict[str, list[tuple[int, int, Piece]]] = {}
        for rank, shard in self.shards.items():
            self.tensors.update(shard.tensors)
            for number, piece in enumerate(shard.pieces):
                self._index.setdefault(piece.fqn, []).append((rank, number, piece))
        self.tree: Json | None = self.shards[0].tree
        self.aliases: dict[str, str] = dict(self.shards[0].aliases)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the checkpoint; idempotent."""
        with self._lock:
            self._images = {}
            hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()

    @property
    def world_size(self) -> int:
        """Ranks that saved."""
        return self.root.summary.world_size

    @property
    def bytes_by_source(self) -> dict[str, int]:
        """Plain bytes read so far from each source: ``arena``, ``local`` or a remote's name."""
        with self._lock:
            return dict(self._bytes)

    @property
    def repaired(self) -> tuple[str, ...]:
        """Local shard files whose damaged bytes were replaced so far."""
        with self._lock:
            return tuple(sorted(self._repaired))

    @property
    def ranks_here(self) -> frozenset[int]:
        """Ranks whose shard file is here, in memory or on disk: read without asking anybody."""
        return self.ranks_on_disk | self._images.keys()

    @property
    def ranks_on_disk(self) -> frozenset[int]:
        """Ranks whose shard file is in the local tier, of the right size."""
        if self._save is None:
            return frozenset()
        path = self._save.path
        shards = [self.shards[rank] for rank in self._manifests_here]
        return frozenset(s.rank for s in shards if directory.file_bytes(path / s.file) == s.file_bytes)

    def pieces(self, fqn: str) -> list[tuple[int, int, Piece]]:
        """Where this tensor's boxes lie: (rank, number of the piece in its shard, piece). Follows aliases.

        Raises:
            KeyError: no such tensor.
        """
        return list(self._index[self.aliases.get(fqn, fqn)])

    def chunks(self, rank: int, piece_index: int) -> Sequence[Chunk]:
        """The chunks of one piece, in order; their sizes are those of the buffers :meth:`read_chunk` wants."""
        return self._tables[rank][piece_index]

    def per_rank(self, rank: int) -> Json | None:
        """The encoded tree of this rank's own values."""
        shard = self.shards.get(rank)
        return shard.per_rank if shard is not None else None

    def read_chunk(self, rank: int, piece_index: int, chunk_index: int, out: memoryview) -> str:
        """Exactly the plain bytes of one chunk into ``out``, verified. Blocks.

        Args:
            rank: Whose shard.
            piece_index: Number of the piece in that shard.
            chunk_index: Number of the chunk in that piece.
            out: Writable, contiguous, of the chunk's size. After an error its content is undefined.

        Returns:
            The source: ``local`` or a remote's name.

        Raises:
            IntegrityError: no tier has a good copy; names the tensor.
            TransientError: a tier that may have one can't be reached now.
            StorageError: ... or refuses.
        """
        return self.read_batch([(rank, piece_index, chunk_index, out)])[0]

    def read_batch(self, wanted: Sequence[tuple[int, int, int, memoryview]]) -> list[str]:
        """Many chunks, each as :meth:`read_chunk` does it; those from a remote share requests with their neighbours.

        Call it from several threads with batches of some MiB, each of neighbours in one shard: then that many requests
        are in flight, each about so large, and no more memory is used than that.

        Args:
            wanted: (rank, number of the piece, number of the chunk, out).

        Returns:
            The source of each.

        Raises:
            IntegrityError, TransientError, StorageError: as :meth:`read_chunk`, for the first that can't be had.
        """
        sources, missing = self._nearby(wanted)
        if missing:
            found = self._chunks.read_many([one for _, one, _ in missing])
            for (number, one, failures), source in zip(missing, found, strict=True):
                sources[number] = source if source is not None else self._read_at_last(one, failures)
                if self._save is not None:
                    self._repair(one.ref.rank, one.chunk, one.out)
        self._count(sources, wanted)
        return [source for source in sources if source is not None]

    def read_nearby(self, wanted: Sequence[tuple[int, int, int, memoryview]]) -> list[str | None]:
        """As :meth:`read_batch`, but from this node's memory and disk alone; None for each that is not whole there."""
        sources, _ = self._nearby(wanted)
        self._count(sources, wanted)
        return sources

    def repair(self, rank: int, piece_index: int, chunk_index: int, good: memoryview) -> None:
        """Put the verified bytes of a chunk, which somebody else had, where damaged ones are on this node's disk."""
        if self._save is not None:
            self._repair(rank, self._tables[rank][piece_index][chunk_index], good)

    # --- manifests

    def _open(self) -> tuple[RootManifest, dict[int, ShardManifest]]:
        """The first root manifest that fits its shard manifests, wherever each of them comes from."""
        failures = Failures()
        incomplete: IncompleteCheckpointError | None = None
        for name, root in self._roots(failures):
            try:
                with ThreadPoolExecutor(_MANIFEST_READERS) as pool:
                    shards = dict(
                        zip([ref.rank for ref in root.shards], pool.map(self._shard, root.shards), strict=True)
                    )
                head = shards[0].summary
                if head is None or root_from(head, root.shards) != root:
                    raise IntegrityError(f"the root manifest on {name} does not follow from its shard manifests")
                return root, shards
            except (IntegrityError, FormatError, StorageError) as error:
                self._manifests_here.clear()
                failures.add(name, error)
            except IncompleteCheckpointError as error:
                self._manifests_here.clear()
                incomplete = error
        if incomplete is not None and not failures.tried:
            raise incomplete
        step, save_id = self._summary.step, self._summary.save_id
        raise failures.error(f"the manifests of step {step}, save {save_id}", step=step, run=self._summary.run)

    def _roots(self, failures: Failures) -> Iterator[tuple[str, RootManifest]]:
        if self._local is not None and self._save is not None and self._save.state == "complete":
            try:
                yield LOCAL, self._local.root_manifest(self._summary.run, self._save)
            except CkptError as error:
                failures.add(LOCAL, IntegrityError(error.message))
        if self._told is not None:
            for root in self._told.root_manifests(run=self._summary.run, save_id=self._summary.save_id):
                yield PEERS, root
        for remote in self._chunks.remotes:
            try:
                yield remote.name, remote.root_manifest(self._places[remote.name])
            except (StorageError, FormatError, IntegrityError) as error:
                failures.add(remote.name, error)

    def _shard(self, ref: ShardRef) -> ShardManifest:
        failures = Failures()
        if self._local is not None and self._save is not None:
            try:
                shard = self._local.shard_manifest(self._save.path, ref)
                self._manifests_here.add(ref.rank)
                return shard
            except NotFoundError as error:
                failures.add(LOCAL, error)
            except CkptError as error:
                failures.add(LOCAL, IntegrityError(error.message))
        if self._told is not None:
            try:
                return self._told.shard(ref)
            except (NotFoundError, IntegrityError, FormatError) as error:
                failures.add(PEERS, error)
        found = self._chunks.shard(ref, failures)
        if found is None and failures.is_absent and not self._chunks.remotes:
            raise IncompleteCheckpointError(
                f"the part of rank {ref.rank}, step {self._summary.step}, is not here: it is on node {ref.node}",
                hint="name a remote, or a file system that all nodes share",
                rank=ref.rank,
                step=self._summary.step,
            )
        if found is None:
            raise failures.error(f"the shard manifest of rank {ref.rank}", rank=ref.rank, step=self._summary.step)
        return found

    # --- bytes

    def _nearby(
        self, wanted: Sequence[tuple[int, int, int, memoryview]]
    ) -> tuple[list[str | None], list[tuple[int, Wanted, Failures]]]:
        """What memory and disk have, by source; and what they lack: its number, what to ask for, what was tried."""
        sources: list[str | None] = []
        missing: list[tuple[int, Wanted, Failures]] = []
        with ShardFiles() as files:
            for number, (rank, piece_index, chunk_index, out) in enumerate(wanted):
                chunk = self._tables[rank][piece_index][chunk_index]
                view = out.cast("B")
                if view.nbytes != chunk.size_bytes:
                    raise ValueError(f"out has {view.nbytes} bytes, the chunk {chunk.size_bytes}")
                failures = Failures()
                if self._try_image(rank, chunk, view):
                    sources.append(ARENA)
                    continue
                is_here = self._save is not None and self._try_local(files, rank, chunk, view, failures)
                sources.append(LOCAL if is_here else None)
                if not is_here:
                    missing.append((number, Wanted(self._refs[rank], chunk, view), failures))
        return sources, missing

    def _read_at_last(self, one: Wanted, failures: Failures) -> str:
        """One chunk on its own, from every remote; or the verdict with all reasons."""
        source = self._chunks.read(one.ref, one.chunk, one.out, failures)
        if source is not None:
            return source
        rank, step = one.ref.rank, self.root.summary.step
        fqn = self.shards[rank].pieces[one.chunk.piece].fqn
        raise failures.error(f"{fqn} (rank {rank}, step {step})", key=fqn, rank=rank, step=step)

    def _try_image(self, rank: int, chunk: Chunk, out: memoryview) -> bool:
        """Copy first, verify the copy: the image may be written over meanwhile."""
        image = self._images.get(rank)
        if image is None or chunk.offset + chunk.size_bytes > len(image):
            return False
        import numpy as np  # assigning to a memoryview would keep other threads from copying too

        with memoryview(image) as view, view[chunk.offset : chunk.offset + chunk.size_bytes] as there:
            np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(there, np.uint8))
        return digest(out) == chunk.digest

    def _try_local(self, files: ShardFiles, rank: int, chunk: Chunk, out: memoryview, failures: Failures) -> bool:
        try:
            files.read(self._paths[rank], chunk, out)
        except (OSError, IntegrityError) as error:
            # A disk that fails is no reason to wait for it: another tier, or a verdict that names the errno.
            failures.add(LOCAL, IntegrityError(str(error)))
            return False
        return True

    def _repair(self, rank: int, chunk: Chunk, good: memoryview) -> None:
        shard = self.shards[rank]
        if repair(self._paths[rank], shard.file_bytes, chunk, good):
            with self._lock:
                self._repaired.add(shard.file)

    def _count(self, sources: Sequence[str | None], wanted: Sequence[tuple[int, int, int, memoryview]]) -> None:
        with self._lock:
            for source, one in zip(sources, wanted, strict=True):
                if source is not None:
                    self._bytes[source] += one[3].nbytes
