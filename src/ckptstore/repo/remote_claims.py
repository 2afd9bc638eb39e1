"""Who does what in a run: intents of saves under way, what gc has condemned, timelines taken, saves pinned."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from ckptstore.blob.base import BlobStore
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import (
    CheckpointExistsError,
    ConflictError,
    CredentialsError,
    FormatError,
    NoStoreError,
    NotFoundError,
)
from ckptstore.format.manifest import FORMAT, FORMAT_VERSION, MAX_MANIFEST_BYTES, MAX_SUMMARY_BYTES, canonical
from ckptstore.repo import names
from ckptstore.repo.condemned import CondemnedList, list_name, parse_list_name
from ckptstore.repo.remote_names import intent_key, parse_intent_name
from ckptstore.repo.remote_run import RemoteRun, modified

#: A save that takes long says so this often: gc takes an intent nobody has renewed for days for one of the dead.
RENEW_SECONDS = 3600.0
#: What is remembered instead of being listed anew is listed all the same when it is older than this.
RELIST_SECONDS = 3600.0


class RemoteClaims(RemoteRun):
    """The part of a run in which processes tell each other what they are at."""

    def __init__(self, blob: BlobStore, run: str, name: str, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(blob, run, name, clock)
        self._renewed: dict[str, float] = {}
        self._lists: tuple[str | None, dict[str, frozenset[str]]] | None = None
        """The mark of the news that came before them, and what is condemned by each."""
        self._taken: tuple[str | None, float, list[int]] | None = None
        """The mark of the news that came before it, and which timelines were taken when."""

    # --- saves under way

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

    def forget_intent(self, save_id: str) -> None:
        """Take the intent back, after the commit. Without the right to delete it stays, which costs a small object."""
        try:
            self.blob.delete([f"{self._prefix}intents/{save_id}.json"])
        except CredentialsError:
            return

    # --- what gc has announced

    def condemned(self) -> frozenset[str]:
        """Keys that gc may be deleting, or has deleted while saves were under way.

        One GET as long as there is no news from gc; else, and the first time, a LIST and a GET for each new list.

        Raises:
            FormatError: a list is damaged.
        """
        news = self.news("condemned")  # before the lists are looked at: what comes later has later news
        mark, told = (news.mark, news.names) if news is not None else (None, ())
        held = self._lists
        if held is None or held[0] != mark:
            held = self._lists = mark, self._read_lists(told, held[1] if held is not None else {})
        return frozenset[str]().union(*held[1].values())

    def _read_lists(self, told: Iterable[str], known: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        """All lists: those that are listed, and those that news told of, should the listing be stale."""
        prefix = f"{self._prefix}condemned/"
        found = [info.key.removeprefix(prefix) for info in self.blob.list(prefix)] + [list_name(one) for one in told]
        ids = {list_id for name in found if (list_id := parse_list_name(name)) is not None}
        lists: dict[str, frozenset[str]] = {}
        for list_id in ids:
            if list_id not in known:
                try:
                    lists[list_id] = frozenset(self.condemned_list(list_id).keys)
                except NoStoreError:
                    raise
                except NotFoundError:
                    continue  # taken back since it was listed, so no save that is under way needs it
            else:
                lists[list_id] = known[list_id]
        return lists

    def condemned_list(self, list_id: str) -> CondemnedList:
        """One list of what gc will delete."""
        what = f"condemned list {list_id} on {self.name}"
        data = self._get(f"condemned/{list_name(list_id)}", MAX_MANIFEST_BYTES)
        found = CondemnedList.decode(data, what=what)
        if found.run != self.run:
            raise FormatError(f"{what} is about run {found.run}, not {self.run}", tier=self.name)
        return found

    # --- timelines

    def claim_timeline(self, number: int, record: bytes) -> bool:
        """Take this timeline number; False when somebody else has it."""
        self.create()
        try:
            self._create_once(f"{self._prefix}timelines/{names.timeline_file(number)}", record)
        except ConflictError:
            return False
        self.put_news("timelines", [names.timeline_file(number)])
        return True

    def timelines(self) -> list[int]:
        """Numbers taken so far, ascending; one LIST."""
        prefix = f"{self._prefix}timelines/"
        numbers = (names.parse_timeline_file(info.key.removeprefix(prefix)) for info in self.blob.list(prefix))
        return sorted(number for number in numbers if number is not None)

    def known_timelines(self) -> list[int]:
        """As :meth:`timelines`, but one GET instead of the LIST as long as nobody has taken one since the last time."""
        mark, now = self._mark("timelines"), self._clock.monotonic()
        held = self._taken
        if held is None or held[0] != mark or now - held[1] > RELIST_SECONDS:
            held = self._taken = mark, now, self.timelines()
        return held[2]

    def timeline_record(self, number: int) -> bytes | None:
        """What the claimer of this timeline wrote; None when it is proven unclaimed."""
        try:
            return self._get(f"timelines/{names.timeline_file(number)}", MAX_SUMMARY_BYTES)
        except NoStoreError:
            raise
        except NotFoundError:
            return None

    # --- pins

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

    def _mark(self, folder: str) -> str | None:
        news = self.news(folder)
        return news.mark if news is not None else None


def _intent(save_id: str) -> bytes:
    return canonical({"format": FORMAT, "version": FORMAT_VERSION, "save_id": save_id})
