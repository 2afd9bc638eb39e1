"""One run in one object store: its documents and the commit. Names are in :mod:`ckptstore.repo.remote_names`.

Every document is created once, by conditional create, and never changed. A create that finds the name taken compares
bytes: equal ones are our own request whose answer was lost, or a colleague's who computed the same pure function.
The listing of ``commits/`` is the only catalogue.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Literal

from pydantic import Field
from xxhash import xxh3_128

from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConflictError,
    CredentialsError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    LockedError,
    NoStoreError,
    NotFoundError,
    StorageError,
)
from ckptstore.format.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    MAX_SUMMARY_BYTES,
    Document,
    RemoteShard,
    RootManifest,
    ShardManifest,
    ShardRef,
    Summary,
    canonical,
    check_run_name,
    root_of,
    strong_digest,
)
from ckptstore.repo import names
from ckptstore.repo.condemned import CondemnedList, list_name, parse_list_name
from ckptstore.repo.packs import check_remote_shard, pack_name
from ckptstore.repo.remote_names import (
    MARKER,
    RemoteSave,
    intent_key,
    parse_intent_name,
    parse_shard_key,
    parse_shard_name,
    shard_key,
)

__all__ = ["MARKER", "RemoteSave", "RemoteTier", "runs"]

#: Remote shard manifests remembered per remote; a node with 8 ranks needs 16 to know its last two saves.
CACHED_SHARDS = 32
#: A save that takes long says so this often: gc takes an intent nobody has renewed for days for one of the dead.
RENEW_SECONDS = 3600.0


class Marker(Document):
    """What lies at the top of every store."""

    format: Literal["ckptstore"] = "ckptstore"
    version: int = Field(default=FORMAT_VERSION, ge=1)


def runs(blob: BlobStore) -> list[str]:
    """Names of the runs in this store, sorted; one LIST.

    Raises:
        NoStoreError: the bucket is missing.
    """
    found = (info.key.removeprefix("names/") for info in blob.list("names/"))
    return sorted(name for name in found if names.is_run(name))


class RemoteTier:
    """One run in one object store. Thread-safe. Opening costs no request.

    Args:
        blob: The store; retries and throttling are its wrappers' business.
        run: The run; it need not exist yet.
        name: What users call this remote.
        clock: Tells when an intent has to be renewed.
    """

    def __init__(self, blob: BlobStore, run: str, name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self.blob = blob
        self.run = check_run_name(run)
        self.name = name
        self._prefix = f"runs/{run}/"
        self._is_created = False
        self._clock = clock
        self._cache: dict[str, RemoteShard] = {}
        self._renewed: dict[str, float] = {}
        self._lists: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RemoteTier({self.blob.url!r}, run={self.run!r}, name={self.name!r})"

    # --- the store itself

    def exists(self) -> bool:
        """Whether a store is there (its marker is); one GET.

        Raises:
            NoStoreError: not even the bucket is there, which a mistyped URL is the likeliest reason for.
            FormatError: the store is of a newer version, or the marker isn't ours.
        """
        try:
            data = self.blob.get(MARKER, max_bytes=MAX_SUMMARY_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return False
        Marker.decode(data, what=f"{MARKER} of {self.blob.url}", max_bytes=MAX_SUMMARY_BYTES)
        return True

    def create(self) -> None:
        """Make sure the store and this run are there; free after the first time.

        Raises:
            FormatError: a newer ckptstore made this store; nothing was written.
            NoStoreError: the bucket is missing; buckets are never created.
        """
        if self._is_created:
            return
        if not self.exists():
            self._create_once(MARKER, Marker().encode())
        self._create_empty(f"names/{self.run}")
        self._is_created = True

    # --- reading

    def saves(self) -> list[RemoteSave]:
        """Every committed save, oldest first; one LIST.

        Raises:
            NoStoreError: the bucket is missing. Any failure in mid-listing raises too: an error is never "no saves".
        """
        prefix = f"{self._prefix}commits/"
        parsed = (RemoteSave.parse(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        return sorted(save for save in parsed if save is not None)

    def summary(self, save: RemoteSave) -> Summary:
        """What `list` shows of this save.

        Raises:
            CheckpointNotFoundError: neither the summary nor the root manifest is there.
            FormatError: it is damaged or another save's.
        """
        try:
            data = self._get(save.summary_key, MAX_SUMMARY_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return self.root_manifest(save).summary
        summary = Summary.decode(
            data, what=f"summary of save {save.save_id} on {self.name}", max_bytes=MAX_SUMMARY_BYTES
        )
        self._check_identity(save, summary)
        return summary

    def root_manifest(self, save: RemoteSave) -> RootManifest:
        """The root manifest of a committed save.

        Raises:
            CheckpointNotFoundError: no such commit.
            FormatError: it is damaged or another save's.
        """
        what = f"root manifest of save {save.save_id} on {self.name}"
        try:
            data = self._get(save.key, MAX_MANIFEST_BYTES)
        except NoStoreError:
            raise
        except NotFoundError as error:
            raise CheckpointNotFoundError(
                f"save {save.save_id} (step {save.step}) of run {self.run} is not on {self.name}",
                run=self.run,
                step=save.step,
                tier=self.name,
            ) from error
        root = RootManifest.decode(data, what=what)
        self._check_identity(save, root.summary)
        if [ref.rank for ref in root.shards] != list(range(root.summary.world_size)):
            raise FormatError(f"{what} is damaged: ranks are missing", tier=self.name, step=save.step)
        return root

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
            self._cache[manifest_digest] = document
            while len(self._cache) > CACHED_SHARDS:
                del self._cache[next(iter(self._cache))]

    def find_shard(self, save_id: str, rank: int) -> RemoteShard | None:
        """The remote shard manifest of this rank, committed or not; None when it is proven absent."""
        try:
            data = self._get(shard_key(save_id, rank), MAX_MANIFEST_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return None
        return self._decode_shard(data, save_id, rank)

    def get_range(self, pack: str, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes of a pack."""
        return self.blob.get(self._prefix + pack, start=start, length=length)

    def head_pack(self, pack: str) -> ObjectInfo | None:
        """What the store knows of a pack; None when it is proven absent."""
        return self.blob.head(self._prefix + pack)

    # --- writing, in this order

    def put_intent(self, save_id: str) -> bool:
        """Announce a save before its first pack, so that gc leaves it alone; whether we are the first to do so."""
        try:
            self.blob.put(self._prefix + intent_key(save_id), _intent(save_id), if_absent=True)
        except CheckpointExistsError:
            return False
        with self._lock:
            self._renewed[save_id] = self._clock.monotonic()
        return True

    def renew_intent(self, save_id: str) -> None:
        """Say that this save is still under way; free unless that was last said long ago."""
        now = self._clock.monotonic()
        with self._lock:
            if now - self._renewed.get(save_id, -RENEW_SECONDS) < RENEW_SECONDS:
                return
            self._renewed[save_id] = now
        self.blob.put(self._prefix + intent_key(save_id), _intent(save_id))

    def holds_intent(self, save_id: str) -> bool:
        """Whether this save's intent is there."""
        return self.blob.head(self._prefix + intent_key(save_id)) is not None

    def intents(self) -> dict[str, datetime]:
        """Saves under way, with the server's time of their last word; one LIST.

        Raises:
            StorageError: the server does not tell times.
        """
        prefix = f"{self._prefix}intents/"
        found: dict[str, datetime] = {}
        for info in self.blob.list(prefix):
            save_id = parse_intent_name(info.key.removeprefix(prefix))
            if save_id is not None:
                found[save_id] = modified(info)
        return found

    def condemned(self) -> frozenset[str]:
        """Keys that gc may be deleting, or has deleted while saves were under way; one LIST, a GET for each new list.

        Raises:
            FormatError: a list is damaged.
        """
        prefix = f"{self._prefix}condemned/"
        ids = [parse_list_name(info.key.removeprefix(prefix)) for info in self.blob.list(prefix)]
        lists: dict[str, frozenset[str]] = {}
        for list_id in ids:
            if list_id is None:
                continue
            if list_id not in self._lists:
                try:
                    lists[list_id] = frozenset(self.condemned_list(list_id).keys)
                except NoStoreError:
                    raise
                except NotFoundError:
                    continue  # taken back since it was listed, so no save that is under way needs it
            else:
                lists[list_id] = self._lists[list_id]
        self._lists = lists
        return frozenset[str]().union(*lists.values())

    def condemned_list(self, list_id: str) -> CondemnedList:
        """One list of what gc will delete."""
        what = f"condemned list {list_id} on {self.name}"
        data = self._get(f"condemned/{list_name(list_id)}", MAX_MANIFEST_BYTES)
        found = CondemnedList.decode(data, what=what)
        if found.run != self.run:
            raise FormatError(f"{what} is about run {found.run}, not {self.run}", tier=self.name)
        return found

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

    def try_commit(
        self, save_id: str, known: Iterable[ShardManifest] = (), *, avoid: Collection[str] | None = None
    ) -> RootManifest | None:
        """Commit the save if the shard manifests of all its ranks are here; one LIST, of this save's shards.

        Whoever finds them complete commits, and all who do write the same bytes. Each has made sure beforehand that its
        own shard manifests name nothing condemned; that none of the others' is about to be deleted is looked up here.

        Args:
            save_id: The save.
            known: Shard manifests the caller has put itself; they are not read again.
            avoid: What :meth:`condemned` said just now, while the intent was there; None: it is asked here.

        Returns:
            The committed root manifest, or None while ranks are missing.

        Raises:
            ConflictError: another root manifest was committed under this name.
            LockedError: gc is about to remove an abandoned attempt at this save; it can be sent again after that.
        """
        self.renew_intent(save_id)
        prefix = f"{self._prefix}shards/{save_id}/"
        ranks = (parse_shard_name(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        listed = {rank for rank in ranks if rank is not None}
        shards = {shard.rank: shard for shard in known if shard.rank in listed}
        for rank in sorted(listed - set(shards)):
            if shards and len(listed) < next(iter(shards.values())).world_size:
                return None
            document = self.find_shard(save_id, rank)
            if document is not None:
                shards[rank] = document.shard
        if not shards or len(shards) < next(iter(shards.values())).world_size:
            return None
        root = self._root_of(save_id, shards)
        self._check_not_condemned(save_id, avoid)
        save = RemoteSave.of(root.summary)
        self._create_once(self._prefix + save.summary_key, root.summary.encode())
        self._create_once(self._prefix + save.key, root.encode())
        self.forget_intent(save_id)
        return root

    def forget_intent(self, save_id: str) -> None:
        """Take the intent back, after the commit. Without the right to delete it stays, which costs a small object."""
        try:
            self.blob.delete([f"{self._prefix}intents/{save_id}.json"])
        except CredentialsError:
            return

    def delete(self, save: RemoteSave) -> None:
        """Take the commit point away, then the summary: the save is gone at once. Idempotent.

        Its shard manifests and packs are left to gc: somebody may be reading them, or sending this very save again.

        Raises:
            CredentialsError: without the right to delete.
        """
        self.blob.delete([self._prefix + save.key])
        self.blob.delete([self._prefix + save.summary_key])

    def rewrite(self, save: RemoteSave, root: RootManifest) -> None:
        """Put a damaged commit's documents right: they are a pure function of the shard manifests.

        Args:
            save: The commit whose documents are damaged.
            root: What they must be, from a tier where they are whole.

        Raises:
            FormatError: it is about another save.
        """
        self._check_identity(save, root.summary)
        self.blob.put(self._prefix + save.summary_key, root.summary.encode())
        self.blob.put(self._prefix + save.key, root.encode())

    # --- for gc: exact keys of this run, and what lies under them

    def list_keys(self, folder: str) -> dict[str, ObjectInfo]:
        """Objects below one folder of the run, by key below the run's prefix; foreign names too."""
        found = self.blob.list(f"{self._prefix}{folder}/")
        return {info.key.removeprefix(self._prefix): info for info in found}

    def has(self, key: str) -> bool:
        """Whether this key of the run is there: asked of the object itself, not of a listing."""
        return self.blob.head(self._prefix + key) is not None

    def create_document(self, key: str, data: bytes) -> None:
        """Write a document of gc once."""
        self._create_once(self._prefix + key, data)

    def remove_keys(self, keys: Sequence[str]) -> None:
        """Delete exactly these keys of the run; absent ones are fine."""
        self.blob.delete([self._prefix + key for key in keys])

    def shard_at(self, key: str) -> RemoteShard | None:
        """The remote shard manifest under this key; None when it is proven absent.

        Raises:
            FormatError: it is damaged.
        """
        parsed = parse_shard_key(key)
        return None if parsed is None else self.find_shard(*parsed)

    # --- timelines and pins

    def claim_timeline(self, number: int, record: bytes) -> bool:
        """Take this timeline number; False when somebody else has it."""
        self.create()
        try:
            self._create_once(f"{self._prefix}timelines/{names.timeline_file(number)}", record)
        except ConflictError:
            return False
        return True

    def timelines(self) -> list[int]:
        """Numbers taken so far, ascending; one LIST."""
        prefix = f"{self._prefix}timelines/"
        numbers = (names.parse_timeline_file(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        return sorted(number for number in numbers if number is not None)

    def timeline_record(self, number: int) -> bytes | None:
        """What the claimer of this timeline wrote; None when it is proven unclaimed."""
        try:
            return self._get(f"timelines/{names.timeline_file(number)}", MAX_SUMMARY_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return None

    def pin(self, save_id: str) -> None:
        """Keep this save from retention; idempotent."""
        self._create_empty(f"{self._prefix}pins/{names.check_save_id(save_id)}")

    def unpin(self, save_id: str) -> None:
        """Undo :meth:`pin`; idempotent."""
        self.blob.delete([f"{self._prefix}pins/{names.check_save_id(save_id)}"])

    def pins(self) -> set[str]:
        """Pinned saves; one LIST."""
        prefix = f"{self._prefix}pins/"
        found = (info.key.removeprefix(prefix) for info in self.blob.list(prefix))
        return {name for name in found if names.is_save_id(name)}

    # --- inside

    def _check_not_condemned(self, save_id: str, avoid: Collection[str] | None) -> None:
        """Make sure that gc leaves this save's shard manifests alone from now on.

        With the intent there, gc's next look spares them; a look before that has been announced in a list.
        """
        if avoid is None:
            self.put_intent(save_id)
            avoid = self.condemned()
        mine = f"shards/{save_id}/"
        if any(key.startswith(mine) for key in avoid):
            raise LockedError(
                f"gc on {self.name} is about to remove an abandoned attempt at save {save_id}",
                hint="it is sent again after the next `ckptctl gc`",
                tier=self.name,
            )

    def _get(self, name: str, max_bytes: int) -> bytes:
        return self.blob.get(self._prefix + name, max_bytes=max_bytes)

    def _create_empty(self, key: str) -> None:
        """Create an object whose name says it all."""
        with suppress(CheckpointExistsError):
            self.blob.put(key, b"", if_absent=True)

    def _create_once(self, key: str, data: bytes) -> None:
        """Create, or find exactly these bytes there: the answer to our own request may have been lost."""
        try:
            self.blob.put(key, data, if_absent=True)
        except CheckpointExistsError:
            if self.blob.get(key, max_bytes=MAX_MANIFEST_BYTES) != data:
                raise ConflictError(
                    f"{key} on {self.name} holds other bytes than ours", tier=self.name, key=key
                ) from None

    def _decode_shard(self, data: bytes, save_id: str, rank: int) -> RemoteShard:
        document = RemoteShard.decode(data, what=f"shard manifest of rank {rank}, save {save_id}, on {self.name}")
        if (document.shard.save_id, document.shard.rank) != (save_id, rank):
            raise FormatError(f"the shard manifest of rank {rank}, save {save_id}, on {self.name} is another one's")
        check_remote_shard(document)
        return document

    def _root_of(self, save_id: str, shards: Mapping[int, ShardManifest]) -> RootManifest:
        try:
            root = root_of(list(shards.values()))
        except IncompleteCheckpointError as error:
            raise FormatError(f"save {save_id} on {self.name}: {error.message}", tier=self.name) from error
        if root.summary.run != self.run:
            raise FormatError(f"save {save_id} is of run {root.summary.run}, not of {self.run}", tier=self.name)
        return root

    def _check_identity(self, save: RemoteSave, summary: Summary) -> None:
        if RemoteSave.of(summary) != save or summary.run != self.run:
            raise FormatError(
                f"{save.name} on {self.name} is about save {summary.save_id}, step {summary.step} of run {summary.run}",
                tier=self.name,
                step=save.step,
            )


def modified(info: ObjectInfo) -> datetime:
    """The server's time of an object: the only clock gc trusts.

    Raises:
        StorageError: the server does not tell.
    """
    if info.modified is None:
        raise StorageError(f"the server does not tell when {info.key} was written", key=info.key)
    return info.modified


def _intent(save_id: str) -> bytes:
    return canonical({"format": FORMAT, "version": FORMAT_VERSION, "save_id": save_id})
