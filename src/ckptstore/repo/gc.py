"""gc: delete from a remote what no checkpoint needs, announced beforehand, a grace later.

Each collection does, for each run: carry out the lists published at least a grace ago, sparing what is needed again;
take back lists nobody depends on any more; publish a list of what is garbage now. It may be killed anywhere and begun
again. Time is the server's, so it works with clocks that are wrong by hours. How committers take part is told in
:mod:`ckptstore.repo.condemned`. Only names of our own grammar are ever touched.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from ckptstore.blob.base import BlobStore, ObjectInfo
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.repo import condemned
from ckptstore.repo.condemned import CondemnedList, SweptList
from ckptstore.repo.gc_lease import Lease, ServerTime
from ckptstore.repo.gc_mark import Marks, mark
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.remote import RemoteSave, RemoteTier, modified
from ckptstore.repo.remote_names import intent_key, parse_shard_key

GRACE_SECONDS = 86_400.0
#: An intent that was not renewed for so long is of a save that nobody will go on with.
INTENT_SECONDS = 7 * 86_400.0
#: Keys deleted between two looks at the lease.
BATCH = 500

MarkProgress = Callable[[int, int], None]
Garbage = Mapping[str, tuple[ObjectInfo, str]]


@dataclass(frozen=True)
class Doomed:
    """One object and why it may go."""

    key: str
    size_bytes: int
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "size_bytes": self.size_bytes, "why": self.why}


@dataclass
class Collected:
    """What a collection did, or would do, to one run.

    Attributes:
        kept_packs, kept_bytes: what some checkpoint, or a save under way, needs.
        condemned: newly announced; deleted by a collection after the grace.
        waiting: announced earlier, its grace not over.
        deleted: gone now.
        spared: announced earlier and needed again.
        dead_intents: saves that were begun and never committed.
    """

    run: str
    kept_packs: int = 0
    kept_bytes: int = 0
    condemned: list[Doomed] = field(default_factory=list)
    waiting: list[Doomed] = field(default_factory=list)
    deleted: list[Doomed] = field(default_factory=list)
    spared: list[str] = field(default_factory=list)
    dead_intents: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "kept_packs": self.kept_packs,
            "kept_bytes": self.kept_bytes,
            "condemned": [doomed.to_json() for doomed in self.condemned],
            "waiting": [doomed.to_json() for doomed in self.waiting],
            "deleted": [doomed.to_json() for doomed in self.deleted],
            "spared": self.spared,
            "dead_intents": self.dead_intents,
        }


@dataclass(frozen=True)
class Rules:
    """How long is long.

    Attributes:
        grace_seconds: from the announcement to the deletion; for readers of what has just been deleted.
        intent_seconds: from the last word of a save under way until it counts as dead.
    """

    grace_seconds: float = GRACE_SECONDS
    intent_seconds: float = INTENT_SECONDS


def collect(
    blob: BlobStore,
    name: str,
    runs: Sequence[str],
    *,
    rules: Rules | None = None,
    part: tuple[int, int] = (0, 1),
    progress: MarkProgress | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> list[Collected]:
    """Collect these runs of one store. Blocks; may be killed and called again.

    Args:
        blob: The store.
        name: What users call it.
        runs: Which runs.
        rules: How long is long.
        part: ``(i, n)``: for several collectors at once. Each reads all manifests, since a pack may be needed by any
            save; what is announced, and then deleted, is divided by saves.
        progress: Told how many of how many shard manifests were read.
        clock: Only measures how long things take here.

    Raises:
        LockedError: somebody else is collecting.
        IntegrityError, FormatError: a save is damaged, so that what it needs is not known; nothing more is deleted.
        CredentialsError: without the right to delete.
        TransientError: a listing was short, or the store is away.
    """
    rules = rules or Rules()
    time = ServerTime(blob, clock)
    done = []
    with Lease(blob, time, part) as lease:
        for run in runs:
            collector = _Collector(RemoteTier(blob, run, name, clock), time.now(), rules, part, lease)
            done.append(collector.collect(progress))
        if part[0] == 0:
            blob.abort_uploads("runs/", time.now() - timedelta(seconds=rules.intent_seconds))
    return done


def preview(
    blob: BlobStore,
    name: str,
    runs: Sequence[str],
    *,
    rules: Rules | None = None,
    part: tuple[int, int] = (0, 1),
    progress: MarkProgress | None = None,
) -> list[Collected]:
    """What :func:`collect` would do now. Writes nothing; for the time it takes that of the newest object."""
    rules = rules or Rules()
    done = []
    for run in runs:
        remote = RemoteTier(blob, run, name)
        times = [info.modified for info in remote.list_keys("commits").values() if info.modified is not None]
        for folder in ("condemned", "intents", "packs"):
            times += [info.modified for info in remote.list_keys(folder).values() if info.modified is not None]
        if times:
            done.append(_Collector(remote, max(times), rules, part, None).collect(progress))
    return done


class _Collector:
    """One run, one collection. Without a lease it only looks."""

    def __init__(
        self, remote: RemoteTier, now: datetime, rules: Rules, part: tuple[int, int], lease: Lease | None
    ) -> None:
        self._remote = remote
        self._now = now
        self._rules = rules
        self._index, self._count = part
        self._lease = lease
        self._done = Collected(remote.run)

    def collect(self, progress: MarkProgress | None) -> Collected:
        announced = self._announced()
        lists, swept = self._lists()
        marks = mark(
            self._remote,
            now=self._now,
            intent_seconds=self._rules.intent_seconds,
            known_commits=[name for _, one in lists.values() for name in one.commits],
            forget=self._forget_intent,
            progress=progress,
        )
        self._done.dead_intents = sorted(marks.expired)
        limit = self._now - timedelta(seconds=self._rules.grace_seconds)
        due = {
            i: one
            for i, (published, one) in lists.items()
            if i not in swept and published <= limit and i in announced and self._is_in_part(next(iter(one.keys), i))
        }
        self._sweep(due, marks)
        done = {i for i, waiting in swept.items() if not set(waiting) & (marks.underway | marks.expired)}
        for list_id in done:
            self._take_back(list_id)
        new = self._condemn({key for _, one in lists.values() for key in one.keys}, set(due) | set(swept), lists, marks)
        self._announce((set(lists) - done) | new, announced)
        kept = [info for key, info in marks.packs.items() if marks.is_needed(key)]
        self._done.kept_packs, self._done.kept_bytes = len(kept), sum(info.size_bytes for info in kept)
        return self._done

    def _announced(self) -> frozenset[str]:
        """Lists that committers have been told of: a list that was put by a collector who died just then is not."""
        news = self._remote.news("condemned")
        return frozenset(news.names if news is not None else ())

    def _announce(self, lists: set[str], announced: frozenset[str]) -> None:
        """Tell committers, who remember the lists, that these are the lists now. Carried out is only what was told."""
        if self._lease is not None and lists != announced:
            self._remote.put_news("condemned", lists)

    def _lists(self) -> tuple[dict[str, tuple[datetime, CondemnedList]], dict[str, tuple[str, ...]]]:
        """The condemned lists with the server's time of each, and what those that were carried out wait for."""
        lists, swept = {}, {}
        for key, info in self._remote.list_keys("condemned").items():
            name = key.removeprefix("condemned/")
            if (list_id := condemned.parse_list_name(name)) is not None:
                lists[list_id] = modified(info), self._remote.condemned_list(list_id)
            elif (list_id := condemned.parse_swept_name(name)) is not None:
                data = self._remote.blob.get(f"runs/{self._remote.run}/{key}", max_bytes=1 << 24)
                swept[list_id] = SweptList.decode(data, what=key).waiting_for
        return lists, swept

    def _forget_intent(self, save_id: str) -> None:
        if self._lease is not None:
            self._remote.remove_keys([intent_key(save_id)])

    def _sweep(self, due: dict[str, CondemnedList], marks: Marks) -> None:
        """Carry lists out: manifests first, then packs, never what is needed (again)."""
        condemned_keys = {key for one in due.values() for key in one.keys if _is_ours(key)}
        self._done.spared += sorted(key for key in condemned_keys if _exists(marks, key) and marks.is_needed(key))
        garbage = marks.garbage()
        shards = [key for key in sorted(condemned_keys) if key in garbage and pack_owner(key) is None]
        self._delete(shards, garbage)
        if self._lease is not None:
            marks.forget_shards(shards)
        # Not looked at anew: what only the manifests just deleted needed has not been announced, so it isn't on a list.
        packs = [key for key in sorted(condemned_keys) if key in garbage and pack_owner(key) is not None]
        self._delete(packs, garbage)
        for key in packs:
            marks.packs.pop(key, None)
        for list_id in due:
            if self._lease is not None:
                # Asked after the deletions: whose intent is younger sees them when it looks which packs are there.
                waiting = tuple(sorted(self._remote.intents()))
                self._remote.create_document(
                    f"condemned/{condemned.swept_name(list_id)}", SweptList(waiting_for=waiting).encode()
                )

    def _delete(self, keys: list[str], garbage: Garbage) -> None:
        for at in range(0, len(keys), BATCH):
            batch = keys[at : at + BATCH]
            if self._lease is not None:
                self._lease.check()
                self._remote.remove_keys(batch)
            self._done.deleted += [_doomed(key, garbage) for key in batch]

    def _take_back(self, list_id: str) -> None:
        if self._lease is not None:
            self._remote.remove_keys([f"condemned/{condemned.list_name(list_id)}"])
            self._remote.remove_keys([f"condemned/{condemned.swept_name(list_id)}"])

    def _condemn(
        self,
        announced: set[str],
        finished: set[str],
        lists: dict[str, tuple[datetime, CondemnedList]],
        marks: Marks,
    ) -> set[str]:
        """Publish what is garbage now and on no list; the ids of the new lists."""
        garbage = marks.garbage()
        waiting = {key for i, (_, one) in lists.items() if i not in finished for key in one.keys}
        self._done.waiting = [
            Doomed(k, garbage[k][0].size_bytes, garbage[k][1]) for k in sorted(waiting & set(garbage))
        ]
        new = [key for key in garbage if key not in announced and self._is_in_part(key)]
        self._done.condemned = [_doomed(key, garbage) for key in new]
        published: set[str] = set()
        if self._lease is None:
            return published
        commits = tuple(sorted(save.name for save in marks.commits.values()))
        for at in range(0, len(new), condemned.MAX_KEYS):
            keys = tuple(new[at : at + condemned.MAX_KEYS])
            document = CondemnedList(run=self._remote.run, keys=keys, commits=commits)
            list_id = condemned.new_list_id()
            self._lease.check()
            self._remote.create_document(f"condemned/{condemned.list_name(list_id)}", document.encode())
            published.add(list_id)
        return published

    def _is_in_part(self, key: str) -> bool:
        """Whether an object of this key, or a list that begins with it, is ours to deal with."""
        return zlib.crc32(_owner(key).encode()) % self._count == self._index


def _doomed(key: str, garbage: Garbage) -> Doomed:
    info, why = garbage[key]
    return Doomed(key, info.size_bytes, why)


def _owner(key: str) -> str:
    parsed = parse_shard_key(key)
    return pack_owner(key) or (parsed[0] if parsed else key)


def _is_ours(key: str) -> bool:
    """Whether this is a name gc may delete at all, whoever wrote the list."""
    is_summary = key.startswith("summaries/") and RemoteSave.parse(key.removeprefix("summaries/")) is not None
    return pack_owner(key) is not None or parse_shard_key(key) is not None or is_summary


def _exists(marks: Marks, key: str) -> bool:
    return key in marks.packs or key in marks.shard_infos or key in marks.summaries
