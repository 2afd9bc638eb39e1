"""Packs and shard manifests of a run: where each chunk of each rank lies."""

from __future__ import annotations

from collections.abc import Collection

from xxhash import xxh3_128

from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import (
    CheckpointExistsError,
    ConflictError,
    FormatError,
    IntegrityError,
    NoStoreError,
    NotFoundError,
)
from ckptstore.format.manifest import MAX_MANIFEST_BYTES, RemoteShard, ShardRef, strong_digest
from ckptstore.repo.packs import check_remote_shard, pack_name
from ckptstore.repo.remote_names import parse_shard_key, shard_key
from ckptstore.repo.remote_run import RemoteRun

#: Remote shard manifests remembered per remote: so many (a node with 8 ranks needs 16 to know its last two saves), ...
CACHED_SHARDS = 32
#: ... and more as long as all of them have no more chunks than this.
CACHED_CHUNKS = 1 << 17


class RemoteShards(RemoteRun):
    """The part of a run that holds the bytes."""

    def __init__(self, blob: BlobStore, run: str, name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(blob, run, name, clock)
        self._cache: dict[str, RemoteShard] = {}
        self._num_chunks = 0

    # --- reading

    def remote_shard(self, save_id: str, ref: ShardRef) -> RemoteShard:
        """Where rank ``ref.rank``'s chunks lie, its shard manifest being the one the root manifest pins.

        Raises:
            NotFoundError: it is gone.
            FormatError: it is damaged.
            IntegrityError: it is not the one that was committed.
        """
        document = self._decode_shard(self._get(shard_key(save_id, ref.rank), MAX_MANIFEST_BYTES), save_id, ref.rank)
        if strong_digest(document.shard.encode()) != ref.manifest_digest:
            raise IntegrityError(
                f"the shard manifest of rank {ref.rank}, save {save_id}, on {self.name} is not the committed one",
                rank=ref.rank,
                tier=self.name,
            )
        return document

    def cached_shard(self, save_id: str, ref: ShardRef) -> RemoteShard:
        """As :meth:`remote_shard`, remembering the newest few: the next push asks for what this one sent."""
        with self._lock:
            document = self._cache.get(ref.manifest_digest)
        if document is None:
            document = self.remote_shard(save_id, ref)
            self.remember_shard(document, ref.manifest_digest)
        return document

    def remember_shard(self, document: RemoteShard, manifest_digest: str) -> None:
        """Keep this document for :meth:`cached_shard`; it counts only once a root manifest pins its digest."""
        with self._lock:
            before = self._cache.pop(manifest_digest, None)
            self._cache[manifest_digest] = document
            self._num_chunks += len(document.frames) - (len(before.frames) if before is not None else 0)
            while len(self._cache) > CACHED_SHARDS and self._num_chunks > CACHED_CHUNKS:
                self._num_chunks -= len(self._cache.pop(next(iter(self._cache))).frames)

    def find_shard(self, save_id: str, rank: int) -> RemoteShard | None:
        """The remote shard manifest of this rank, committed or not; None when it is proven absent."""
        try:
            data = self._get(shard_key(save_id, rank), MAX_MANIFEST_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return None
        return self._decode_shard(data, save_id, rank)

    def shard_at(self, key: str) -> RemoteShard | None:
        """The remote shard manifest under this key; None when it is proven absent.

        Raises:
            FormatError: it is damaged.
        """
        parsed = parse_shard_key(key)
        return None if parsed is None else self.find_shard(*parsed)

    def get_range(self, pack: str, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes of a pack."""
        return self.blob.get(self._prefix + pack, start=start, length=length)

    def head_pack(self, pack: str) -> ObjectInfo | None:
        """What the store knows of a pack; None when it is proven absent."""
        return self.blob.head(self._prefix + pack)

    # --- writing

    def put_pack(
        self,
        save_id: str,
        rank: int,
        data: Buffer,
        *,
        look_first: bool,
        distrust: Collection[str] = (),
        avoid: Collection[str] = (),
    ) -> tuple[str, int]:
        """Send one pack, named by its content, unless it is there.

        Args:
            save_id: The save that sends it.
            rank: The rank whose chunks it holds.
            data: The frames, back to back.
            look_first: Ask before sending: an earlier attempt may have sent it.
            distrust: Keys of packs known to be damaged, which are replaced.
            avoid: Keys that gc may delete at any moment: the same bytes get another name.

        Returns:
            Its key below the run's prefix, and the bytes sent (0 when it was there).
        """
        hasher = xxh3_128(data)
        while (name := pack_name(save_id, rank, hasher.hexdigest())) in avoid:
            hasher.update(b"again")
        key = self._prefix + name
        size_bytes = memoryview(data).nbytes
        if name in distrust:
            self.blob.put(key, data)
            return name, size_bytes
        if look_first:
            info = self.blob.head(key)
            if info is not None and info.size_bytes == size_bytes:
                return name, 0
        try:
            self.blob.put(key, data, if_absent=True)
        except CheckpointExistsError:
            info = self.blob.head(key)
            if info is None or info.size_bytes != size_bytes:  # cut off by a server that stored what it got
                self.blob.put(key, data)
        return name, size_bytes

    def put_shard(self, document: RemoteShard, *, replace: bool = False) -> RemoteShard:
        """Say where one rank's chunks lie, once all its packs are there.

        Args:
            document: Where.
            replace: The document under this name is damaged, or points at packs that are: put this one in its place.
                Its ``shard`` is what the root manifest pins, so a committed save stays what it is.

        Returns:
            The document that counts: this one, or that of an earlier attempt at the same shard, which may have cut its
            packs differently.

        Raises:
            ConflictError: the name is taken by another shard.
        """
        save_id, rank = document.shard.save_id, document.shard.rank
        if replace:
            self.blob.put(self._prefix + shard_key(save_id, rank), document.encode())
            return document
        try:
            self.blob.put(self._prefix + shard_key(save_id, rank), document.encode(), if_absent=True)
        except CheckpointExistsError:
            earlier = self.find_shard(save_id, rank)
            if earlier is None or earlier.shard != document.shard:
                raise ConflictError(
                    f"{self.name} holds another shard manifest of rank {rank} for save {save_id}",
                    rank=rank,
                    tier=self.name,
                ) from None
            return earlier
        return document

    # --- inside

    def _decode_shard(self, data: bytes, save_id: str, rank: int) -> RemoteShard:
        document = RemoteShard.decode(data, what=f"shard manifest of rank {rank}, save {save_id}, on {self.name}")
        if (document.shard.save_id, document.shard.rank) != (save_id, rank):
            raise FormatError(f"the shard manifest of rank {rank}, save {save_id}, on {self.name} is another one's")
        check_remote_shard(document)
        return document
