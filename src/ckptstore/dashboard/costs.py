"""What the buckets hold and cost: one LIST of the whole run, in the background, when somebody looks at the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckptstore.errors import CkptError
from ckptstore.ops.cost import Cost, cost
from ckptstore.repo.remote import RemoteTier

log = logging.getLogger("ckptstore.dashboard")

#: A LIST of a long run is dozens of requests, and its answer changes slowly.
REFRESH_SECONDS = 600.0


@dataclass(frozen=True)
class Bill:
    """One remote.

    Attributes:
        cost: None until the remote has been counted once.
        error: why it could not be counted lately.
    """

    remote: str
    cost: Cost | None = None
    error: str | None = None
    counted_at: float = float("-inf")


class Costs:
    """Counts and remembers. Thread-safe; :meth:`of` never waits for a bucket.

    Args:
        prices: dollars by kind of use.
    """

    def __init__(self, prices: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.prices = dict(prices)
        self._clock = clock
        self._lock = threading.Lock()
        self._bills: dict[tuple[str, str], Bill] = {}
        self._counting: set[str] = set()

    def of(self, run: str, remotes: Sequence[RemoteTier]) -> list[Bill]:
        """The last bills; counts again in the background if they are old."""
        with self._lock:
            bills = [self._bills.get((run, remote.name), Bill(remote.name)) for remote in remotes]
            is_old = any(self._clock() - bill.counted_at > REFRESH_SECONDS for bill in bills)
            if is_old and run not in self._counting:
                self._counting.add(run)
                threading.Thread(target=self._count, args=(run, tuple(remotes)), name="costs", daemon=True).start()
            return bills

    def count(self, run: str, remotes: Sequence[RemoteTier]) -> list[Bill]:
        """The bills as they are now. Waits for the buckets."""
        self._counting.add(run)
        self._count(run, remotes)
        return self.of(run, remotes)

    def _count(self, run: str, remotes: Sequence[RemoteTier]) -> None:
        try:
            for remote in remotes:
                old = self._bills.get((run, remote.name), Bill(remote.name))
                try:
                    bill = Bill(remote.name, cost(remote, self.prices), None, self._clock())
                except CkptError as error:
                    bill = Bill(remote.name, old.cost, error.message, self._clock())
                except Exception as error:  # also an answer: without one the next look would count again
                    log.exception("counting %s in %s", run, remote.name)
                    bill = Bill(remote.name, old.cost, f"unexpected {type(error).__name__}", self._clock())
                with self._lock:
                    self._bills[run, remote.name] = bill
        finally:
            with self._lock:
                self._counting.discard(run)
