"""mark: what a run still needs, and the proof that what looks gone is gone.

A listing may lie: fail, be empty, or be short. A failure raises. For the others nothing is believed absent because a
listing lacks it: each commit, and each shard manifest, without which something would be garbage, is asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from ckptstore.blob.base import ObjectInfo
from ckptstore.errors import FormatError, IntegrityError, NoStoreError, NotFoundError, TransientError
from ckptstore.format.manifest import RemoteShard
from ckptstore.repo.aside import aside_key, saves_aside
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.remote_names import parse_shard_key, shard_key

READS_IN_FLIGHT = 16


@dataclass
class Marks:
    """One look at one run.

    Attributes:
        commits: Committed saves.
        underway: Saves with a live intent.
        expired: Saves whose intent nobody has renewed for too long.
        aside: Saves that were set aside as damaged: kept, as far as what they need is known.
        shards: Every shard manifest there is, by key; None where it is damaged and of no committed save.
        needed: Packs that some shard manifest names, bases of deltas included.
        packs: Every pack there is.
        summaries: Every summary there is.
    """

    commits: dict[str, RemoteSave]
    underway: frozenset[str]
    expired: frozenset[str]
    aside: frozenset[str] = frozenset()
    shards: dict[str, RemoteShard | None] = field(default_factory=dict)
    shard_infos: dict[str, ObjectInfo] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    packs: dict[str, ObjectInfo] = field(default_factory=dict)
    summaries: dict[str, ObjectInfo] = field(default_factory=dict)

    def is_live(self, save_id: str) -> bool:
        """Whether this save is committed, on its way to be, or set aside."""
        return save_id in self.commits or save_id in self.underway or save_id in self.aside

    def is_needed(self, key: str) -> bool:
        """Whether this pack, shard manifest or summary has to stay."""
        if (owner := pack_owner(key)) is not None:
            return key in self.needed or owner in self.underway or owner in self.aside
        if (parsed := parse_shard_key(key)) is not None:
            return self.is_live(parsed[0])
        save = _parse_summary(key)
        return save is None or self.is_live(save.save_id)

    def forget_shards(self, keys: Iterable[str]) -> None:
        """These shard manifests were deleted: they need no packs any more."""
        gone = set(keys)
        self.shards = {key: document for key, document in self.shards.items() if key not in gone}
        self.shard_infos = {key: info for key, info in self.shard_infos.items() if key not in gone}
        self.needed = {pack for document in self.shards.values() if document for pack in document.packs}

    def garbage(self) -> dict[str, tuple[ObjectInfo, str]]:
        """What nothing needs: key -> (what it is, why it may go)."""
        found: dict[str, tuple[ObjectInfo, str]] = {}
        for kind in (self.shard_infos, self.summaries, self.packs):
            for key, info in kind.items():
                if not self.is_needed(key):
                    found[key] = info, self._why(key)
        return found

    def _why(self, key: str) -> str:
        parsed = parse_shard_key(key)
        save_id = pack_owner(key) or (parsed[0] if parsed else None)
        if save_id in self.commits:
            return "left by an earlier attempt at a committed save"
        if save_id in self.expired:
            return "its save was begun and never committed"
        return "its save is gone"


def mark(
    remote: RemoteTier,
    *,
    now: datetime,
    intent_seconds: float,
    known_commits: Iterable[str] = (),
    forget: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Marks:
    """Look at everything a run has. Reads every shard manifest; several requests are in flight.

    Args:
        remote: The run.
        now: The server's time.
        intent_seconds: An intent that was not renewed for so long is of a dead save.
        known_commits: Names of commits seen earlier.
        forget: Called for each such intent, before anything else is looked at.
        progress: Told how many of how many shard manifests were read.

    Raises:
        TransientError: a listing was short, or can't be had now. Nothing may be deleted.
        IntegrityError: a committed save lacks a shard manifest, so what it needs is not known.
        FormatError: one is damaged.
    """
    # What may turn out to be garbage is listed before the intents: so a save that begins meanwhile is not among it.
    shards = remote.list_keys("shards")
    packs = remote.list_keys("packs")
    summaries = remote.list_keys("summaries")
    limit = now - timedelta(seconds=intent_seconds)
    intents = remote.intents()
    expired = frozenset(save_id for save_id, last in intents.items() if last < limit)
    for save_id in sorted(expired):
        if forget is not None:
            forget(save_id)
    commits = {save.save_id: save for save in remote.saves()}
    marks = Marks(
        commits=commits,
        underway=frozenset(intents) - expired,
        expired=expired,
        aside=saves_aside(remote),
        shard_infos={key: info for key, info in shards.items() if parse_shard_key(key) is not None},
        packs={key: info for key, info in packs.items() if pack_owner(key) is not None},
        summaries={key: info for key, info in summaries.items() if _parse_summary(key) is not None},
    )
    _read_shards(remote, marks, progress)
    _prove_absent(remote, marks, known_commits)
    return marks


def _parse_summary(key: str) -> RemoteSave | None:
    return RemoteSave.parse(key.removeprefix("summaries/"))


def _read_shards(remote: RemoteTier, marks: Marks, progress: Callable[[int, int], None] | None) -> None:
    wanted = set(marks.shard_infos)
    for save in list(marks.commits.values()):
        try:
            root = remote.root_manifest(save)
        except NoStoreError:
            raise
        except NotFoundError:
            del marks.commits[
                save.save_id
            ]  # deleted since it was listed; its shard manifests count while they are there
            continue
        wanted |= {shard_key(save.save_id, ref.rank) for ref in root.shards}
    committed = set(marks.commits)

    def read(key: str) -> RemoteShard | None:
        parsed = parse_shard_key(key)
        try:
            found = remote.shard_at(key)
        except FormatError:
            if parsed is not None and parsed[0] in committed:
                raise
            return None
        if found is None and parsed is not None and parsed[0] in committed and remote.has(marks.commits[parsed[0]].key):
            raise IntegrityError(
                f"{key} is missing on {remote.name}: what save {parsed[0]} needs is not known, so nothing is collected",
                hint="`ckptctl verify --repair` or `ckptctl push` brings it back; or delete that save",
                tier=remote.name,
                key=key,
            )
        return found

    with ThreadPoolExecutor(READS_IN_FLIGHT, "ckptstore-gc") as pool:
        keys = sorted(wanted)
        for number, (key, document) in enumerate(zip(keys, pool.map(read, keys), strict=True), 1):
            if document is not None or key in marks.shard_infos:
                marks.shards[key] = document
            if progress is not None:
                progress(number, len(keys))
    marks.forget_shards(())


def _prove_absent(remote: RemoteTier, marks: Marks, known_commits: Iterable[str]) -> None:
    """Ask by name for every commit, set-aside and shard manifest whose absence would make garbage of something."""
    commits = {RemoteSave.parse(name) for name in known_commits}
    commits |= {_parse_summary(key) for key in marks.summaries}
    for document in marks.shards.values():
        if document is not None and document.shard.summary is not None:
            commits.add(RemoteSave.of(document.shard.summary))
    dead = {save for save in commits if save is not None and not marks.is_live(save.save_id)}
    keys = {save.key for save in dead} | {aside_key(save.save_id) for save in dead}
    for key in marks.packs:
        parts = key.split("/")
        if marks.is_needed(key) or marks.is_live(parts[1]):
            continue
        keys.add(aside_key(parts[1]))
        rank = int(parts[2].partition("-")[0])
        for wanted in (shard_key(parts[1], rank), shard_key(parts[1], 0)):
            if wanted not in marks.shard_infos:
                keys.add(wanted)
    for key in marks.shard_infos:
        save_id, _ = parse_shard_key(key) or ("", 0)
        if marks.is_live(save_id):
            continue
        keys.add(aside_key(save_id))
        if shard_key(save_id, 0) not in marks.shard_infos:
            keys.add(shard_key(save_id, 0))
    with ThreadPoolExecutor(READS_IN_FLIGHT, "ckptstore-gc") as pool:
        ordered = sorted(keys)
        for key, is_there in zip(ordered, pool.map(remote.has, ordered), strict=True):
            if is_there:
                raise TransientError(
                    f"{key} is on {remote.name} although a listing did not show it: nothing is collected",
                    hint="try again later; if it stays so, the server's listings can't be relied on",
                    tier=remote.name,
                    key=key,
                )
