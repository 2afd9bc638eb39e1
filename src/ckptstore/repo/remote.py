"""One run in one object store: its documents and the commit. Names are in :mod:`ckptstore.repo.remote_names`.

Every document is created once, by conditional create, and never changed. A create that finds the name taken compares
bytes: equal ones are our own request whose answer was lost, or a colleague's who computed the same pure function.
The listing of ``commits/`` is the only catalogue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ckptstore.blob.base import BlobStore
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import (
    CheckpointNotFoundError,
    FormatError,
    IncompleteCheckpointError,
    LockedError,
    NoStoreError,
    NotFoundError,
)
from ckptstore.format.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_SUMMARY_BYTES,
    RemoteShard,
    RootManifest,
    ShardManifest,
    ShardRef,
    Summary,
    root_of,
)
from ckptstore.repo import names
from ckptstore.repo.remote_claims import RELIST_SECONDS, RENEW_SECONDS, RemoteClaims
from ckptstore.repo.remote_names import MARKER, RemoteSave, parse_shard_name
from ckptstore.repo.remote_run import modified
from ckptstore.repo.remote_shards import CACHED_SHARDS, RemoteShards

__all__ = ["CACHED_SHARDS", "MARKER", "RENEW_SECONDS", "RemoteSave", "RemoteTier", "modified", "runs"]


#: Saves of which is remembered where the shard manifests of this node's ranks are.
CACHED_ROOTS = 64


def runs(blob: BlobStore) -> list[str]:
    """Names of the runs in this store, sorted; one LIST.

    Raises:
        NoStoreError: the bucket is missing.
    """
    found = (info.key.removeprefix("names/") for info in blob.list("names/"))
    return sorted(name for name in found if names.is_run(name))


class RemoteTier(RemoteClaims, RemoteShards):
    """One run in one object store: its commits. Thread-safe. Opening costs no request.

    Args:
        blob: The store; retries and throttling are its wrappers' business.
        run: The run; it need not exist yet.
        name: What users call this remote.
        clock: Tells when an intent has to be renewed.
    """

    def __init__(self, blob: BlobStore, run: str, name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(blob, run, name, clock)
        self._refs: dict[tuple[RemoteSave, frozenset[int]], tuple[ShardRef, ...]] = {}
        self._known: tuple[float, tuple[RemoteSave, ...]] | None = None

    # --- reading

    def saves(self) -> list[RemoteSave]:
        """Every committed save, oldest first; one LIST.

        Raises:
            NoStoreError: the bucket is missing. Any failure in mid-listing raises too: an error is never "no saves".
        """
        prefix = f"{self._prefix}commits/"
        parsed = (RemoteSave.parse(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        found = sorted(save for save in parsed if save is not None)
        with self._lock:
            self._known = self._clock.monotonic(), tuple(found)
        return found

    def known_saves(self) -> list[RemoteSave]:
        """As :meth:`saves`, but without a LIST where one was made within the hour: what this process has committed
        since is among them, what others have committed or deleted since is not known. Good enough to look for bases."""
        with self._lock:
            known = self._known
        if known is None or self._clock.monotonic() - known[0] > RELIST_SECONDS:
            return self.saves()
        return list(known[1])

    def forget_known(self) -> None:
        """Something is not as it was remembered: look at everything again."""
        with self._lock:
            self._known = None

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

    def find_root(self, save: RemoteSave) -> RootManifest | None:
        """The root manifest, if this save is committed; None when it is proven not to be. One GET, by its name."""
        try:
            return self.root_manifest(save)
        except CheckpointNotFoundError:
            return None

    def remembered_shards(self, save: RemoteSave, ranks: frozenset[int], world_size: int) -> list[RemoteShard]:
        """Shard manifests of these ranks, of a save that was committed when it was first asked for; [] for a save of
        another world size. Free as long as they are remembered."""
        with self._lock:
            refs = self._refs.get((save, ranks))
        if refs is None:
            root = self.root_manifest(save)
            is_alike = root.summary.world_size == world_size
            refs = tuple(ref for ref in root.shards if is_alike and ref.rank in ranks)
            self.remember_refs(save, ranks, refs)
        return [self.cached_shard(save.save_id, ref) for ref in refs]

    def remember_refs(self, save: RemoteSave, ranks: frozenset[int], refs: tuple[ShardRef, ...]) -> None:
        """Keep what a root manifest says of these ranks for :meth:`remembered_shards`."""
        with self._lock:
            self._refs[save, ranks] = refs
            while len(self._refs) > CACHED_ROOTS:
                del self._refs[next(iter(self._refs))]

    # --- writing, in this order

    def try_commit(
        self, save_id: str, known: Iterable[ShardManifest] = (), *, avoid: Collection[str] | None = None
    ) -> RootManifest | None:
        """Commit the save if the shard manifests of all its ranks are here.

        One LIST, of this save's shards, and none if the caller has put all of them.

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
        shards = {shard.rank: shard for shard in known}
        if not _is_whole(shards):
            shards = self._shards_there(save_id, shards)
        if not _is_whole(shards):
            return None
        root = self._root_of(save_id, shards)
        self._check_not_condemned(save_id, avoid)
        save = RemoteSave.of(root.summary)
        self._create_once(self._prefix + save.summary_key, root.summary.encode())
        self._create_once(self._prefix + save.key, root.encode())
        with self._lock:
            if self._known is not None:
                self._known = self._known[0], tuple(sorted({*self._known[1], save}))
        self.forget_intent(save_id)
        return root

    def delete(self, save: RemoteSave) -> None:
        """Take the commit point away, then the summary: the save is gone at once. Idempotent.

        Its shard manifests and packs are left to gc: somebody may be reading them, or sending this very save again.

        Raises:
            CredentialsError: without the right to delete.
        """
        self.forget_known()
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

    # --- inside

    def _shards_there(self, save_id: str, known: Mapping[int, ShardManifest]) -> dict[int, ShardManifest]:
        """The shard manifests of this save that a LIST shows; none is read while ranks are missing."""
        prefix = f"{self._prefix}shards/{save_id}/"
        ranks = (parse_shard_name(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        listed = {rank for rank in ranks if rank is not None}
        shards = {rank: shard for rank, shard in known.items() if rank in listed}
        for rank in sorted(listed - set(shards)):
            if shards and len(listed) < next(iter(shards.values())).world_size:
                break
            document = self.find_shard(save_id, rank)
            if document is not None:
                shards[rank] = document.shard
        return shards

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


def _is_whole(shards: Mapping[int, ShardManifest]) -> bool:
    return bool(shards) and len(shards) == next(iter(shards.values())).world_size
