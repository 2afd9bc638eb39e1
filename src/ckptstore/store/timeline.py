"""Which line of the run a save belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from ckptstore.errors import FormatError, LockedError
from ckptstore.format.manifest import Parent
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.local import LocalTier
from ckptstore.repo.timelines import Claim


class TimelineClaimer(Protocol):
    """What claiming needs of an agent client."""

    def claim_timeline(self, at_least: int, record: bytes) -> int: ...


class TimelineKeeper:
    """The timeline of this process's saves; lives on rank 0.

    A timeline is claimed at the first save, and again when a save would not come after the last one: the same step
    again, an earlier step, or a save after a load. Of two live jobs in one run the one that claimed last goes on; the
    other finishes what it began and starts nothing new. A job that claimed while a remote could not be asked may hear
    of higher numbers that jobs before it took: the first time it hears of any, it claims a number above them.

    Args:
        catalog: Reads the run when a timeline has to be claimed.
        newest: The newest claim above a number known on this node, its own number and its job's nonce; None: there is
            none.
    """

    def __init__(
        self, catalog: Callable[[], Catalog], newest: Callable[[int], tuple[int, str] | None] = lambda _: None
    ) -> None:
        self._catalog = catalog
        self._newest = newest
        self._number: int | None = None
        self._parent: Parent | None = None
        self._saves: list[Parent] = []
        self._resumed: Parent | None = None
        self._fresh = False
        self._may_hear = False

    def resumed(self, parent: Parent) -> None:
        """The state now is that of ``parent``: the next save starts a timeline that continues from it."""
        self._number, self._resumed, self._fresh, self._saves = None, parent, False, []

    def fresh(self) -> None:
        """The next save starts a timeline that continues from nothing."""
        self._number, self._resumed, self._fresh, self._saves = None, None, True, []

    def at(self, step: int, claimer: TimelineClaimer, *, job: str) -> tuple[int, Parent | None]:
        """The timeline for a save of ``step``, claimed if it must be new, and the save it continues from.

        Raises:
            LockedError: another job has claimed a newer timeline while this one was running.
        """
        has_heard = False
        must_claim = self._number is None or bool(self._saves and step <= self._saves[-1].step)
        if self._number is not None and (newest := self._newest(self._number)) is not None:
            number, other = newest
            if other != job and self._may_hear:
                must_claim = has_heard = True
            elif other != job:
                raise LockedError(
                    f"a newer job has taken over this run: timeline {number}, this one has {self._number}",
                    hint="stop this job; or load a checkpoint, or use another run, to go on in a line of its own",
                    step=step,
                )
        if must_claim:
            catalog, resumed = self._catalog(), self._resumed
            if not has_heard or self._saves:
                self._parent = self._parent_for(step, catalog)
            record = {"job": job, "step": step, "parent": self._parent.model_dump() if self._parent else None}
            # A parent on another node's disk may be of a line that no tier of this node has heard of.
            highest = max(catalog.next_timeline(), (self._number or 0) + 1, 1 + (resumed.timeline if resumed else 0))
            self._number = claimer.claim_timeline(highest, json.dumps(record, sort_keys=True).encode())
            # Not after what was heard: of two live jobs that see no remote, one must give way in the end.
            self._may_hear = bool(catalog.unreachable) and not has_heard
            self._resumed, self._fresh, self._saves = None, False, []
        assert self._number is not None
        return self._number, self._parent

    def note(self, save: Parent) -> None:
        """This save was agreed on."""
        self._saves.append(save)
        del self._saves[:-64]

    def _parent_for(self, step: int, catalog: Catalog) -> Parent | None:
        if self._fresh:
            return None
        if self._resumed is not None:
            return self._resumed
        # Saves of our own that are still on their way are not in the catalogue yet.
        own = [save for save in self._saves if save.step < step]
        return own[-1] if own else catalog.parent_for(step)


def newest_claim(tier: LocalTier, run: str, above: int) -> tuple[int, str] | None:
    """The highest timeline above this one claimed in this tier and its job's nonce ("" when a crash tore the claim)."""
    numbers = tier.timelines(run)
    if not numbers or numbers[-1] <= above:
        return None
    record = tier.timeline_record(run, numbers[-1])
    try:
        return numbers[-1], Claim.decode(record or b"", what=f"claim of timeline {numbers[-1]}").job
    except FormatError:
        return numbers[-1], ""
