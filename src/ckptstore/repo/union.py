"""Bringing together what each tier says of a run's saves.

A save counts once, under its save_id. The local tier describes it if it can; only for the others is a remote asked,
each remote in turn until one can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ckptstore.errors import FormatError, IntegrityError, NoStoreError, NotFoundError, StorageError, TransientError
from ckptstore.format.manifest import Summary
from ckptstore.repo import timelines
from ckptstore.repo.directory import check_summary
from ckptstore.repo.local_save import LocalSave
from ckptstore.repo.record import LOCAL, Damaged, Record
from ckptstore.types import TierState

if TYPE_CHECKING:
    from ckptstore.repo.remote import RemoteSave, RemoteTier

#: Requests in flight while reading a catalogue.
CONCURRENCY = 16


class Union:
    """Collects what the tiers say about each save."""

    def __init__(self, run: str, local_saves: Iterable[LocalSave], elsewhere: Iterable[Summary] = ()) -> None:
        self.run = run
        self.local: dict[str, LocalSave] = {}
        self.remote: dict[str, dict[str, RemoteSave]] = {}
        self.tier: dict[str, RemoteTier] = {}
        self.summaries: dict[str, Summary] = {}
        self.reasons: dict[str, str] = {}
        self.unreachable: dict[str, TransientError] = {}
        for save in local_saves:
            if save.save_id in self.local and _usable(self.local[save.save_id]):
                continue  # a copy under another step: its summary disagrees with its name
            self.local[save.save_id] = save
            if _usable(save) and save.summary is not None:
                self.summaries[save.save_id] = save.summary
        self.elsewhere: set[str] = set()
        for summary in elsewhere:
            self.elsewhere.add(summary.save_id)
            self.summaries.setdefault(summary.save_id, summary)

    def read(self, remotes: Sequence[RemoteTier], *, tolerate_unreachable: bool) -> set[str]:
        """List these remotes at once, then fetch the summaries that no local file gives; returns what they have pinned.

        Raises:
            TransientError: one can't be reached, unless that is tolerated.
            CkptError: one can't be listed.
        """
        if not remotes:
            return set()
        from concurrent.futures import ThreadPoolExecutor  # costs a local listing more than its files do

        pins: set[str] = set()
        with ThreadPoolExecutor(max_workers=CONCURRENCY) as pool:
            for remote, listing in zip(remotes, pool.map(_list, remotes), strict=True):
                if isinstance(listing, TransientError):
                    self._leave_out(remote.name, listing, tolerate_unreachable)
                    continue
                self.tier[remote.name] = remote
                for save in listing[0]:
                    self.remote.setdefault(save.save_id, {})[remote.name] = save
                pins |= listing[1]
            wanted = [save_id for save_id in self.remote if save_id not in self.summaries]
            for save_id, found in zip(wanted, pool.map(self._fetch, wanted), strict=True):
                if isinstance(found, Summary):
                    self.summaries[save_id] = found
                else:
                    self._note(save_id, found, tolerate_unreachable)
        for places in self.remote.values():
            for name in self.unreachable:
                places.pop(name, None)
        return pins

    def _leave_out(self, name: str, error: TransientError, tolerate_unreachable: bool) -> None:
        if not tolerate_unreachable:
            raise error
        self.unreachable.setdefault(name, error)

    def _note(self, save_id: str, said: dict[str, Exception], tolerate_unreachable: bool) -> None:
        """No remote could tell this save's summary: deleted since it was listed, out of reach, or damaged."""
        reasons = []
        for name, error in said.items():
            if isinstance(error, TransientError):
                self._leave_out(name, error, tolerate_unreachable)
            elif not isinstance(error, NotFoundError):
                reasons.append(f"{name}: {error}")
        if reasons:
            self.reasons[save_id] = "; ".join(reasons)

    def _fetch(self, save_id: str) -> Summary | dict[str, Exception]:
        """The summary from the first remote that can tell it, or what each of them said."""
        said: dict[str, Exception] = {}
        for name, save in self.remote[save_id].items():
            try:
                return self._ask(self.tier[name], save)
            except (FormatError, IntegrityError, NotFoundError, TransientError) as error:
                if isinstance(error, NoStoreError):
                    raise
                said[name] = error
        return said

    def _ask(self, remote: RemoteTier, save: RemoteSave) -> Summary:
        try:
            summary = remote.summary(save)
            return check_summary(summary, run=self.run, step=save.step, save_id=save.save_id, what="summary")
        except (FormatError, IntegrityError):
            summary = remote.root_manifest(save).summary
            return check_summary(summary, run=self.run, step=save.step, save_id=save.save_id, what="root manifest")

    def records(
        self, tiers: Sequence[str], pins: set[str], claim_of: Callable[[timelines.Line], timelines.Claim | None]
    ) -> list[Record]:
        current = {summary.save_id for summary in timelines.current_line(self.summaries.values(), claim_of)}
        return [
            Record(
                summary=summary,
                local=self.local.get(summary.save_id),
                remote=self.remote.get(summary.save_id, {}),
                superseded=summary.save_id not in current,
                pinned=summary.save_id in pins,
                tiers={name: self._state(name, summary.save_id) for name in tiers},
            )
            for summary in timelines.in_order(self.summaries.values())
        ]

    def damaged(self) -> list[Damaged]:
        result = []
        for save_id in {**self.local, **self.remote}:
            save = self.local.get(save_id)
            here = save is not None and save.state == "complete"
            there = self.remote.get(save_id, {}) if save_id in self.reasons else {}
            if save_id in self.summaries or not (here or there):
                continue
            reasons = [f"{LOCAL}: {save.damaged}"] if here and save is not None else []
            reasons += [self.reasons[save_id]] if save_id in self.reasons else []
            step = save.step if save is not None else next(iter(there.values())).step
            result.append(Damaged(step, save_id, (*([LOCAL] if here else []), *there), "; ".join(reasons)))
        return sorted(result, key=lambda damaged: (damaged.step, damaged.save_id))

    def _state(self, tier: str, save_id: str) -> TierState:
        if tier != LOCAL:
            return "complete" if tier in self.remote.get(save_id, {}) else "absent"
        save = self.local.get(save_id)
        if save_id in self.elsewhere and (save is None or not _usable(save)):
            return "complete"  # of a local tier that is spread over nodes
        if save is None:
            return "absent"
        if save.state == "prepared":
            return "prepared"
        return "complete" if _usable(save) else "damaged"


def _usable(save: LocalSave) -> bool:
    return save.state == "complete" and save.damaged is None


def _list(remote: RemoteTier) -> tuple[list[RemoteSave], set[str]] | TransientError:
    try:
        return remote.saves(), remote.pins()
    except TransientError as error:
        return error
    except StorageError as error:
        error.context.setdefault("tier", remote.name)  # whoever can do without this one leaves it out
        raise
