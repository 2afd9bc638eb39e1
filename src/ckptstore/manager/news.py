"""What one rank knows and all must act on at the same step: a signal has arrived, or it is time to save.

Asking all ranks at every step would cost a collective per step. So they are asked every k-th step, and the answer to a
question is only read k steps later, when it has long arrived: nobody waits. k follows the measured step time, so that
news is acted on within about two *reaction times* (one second each, less if the grace is short): 40 steps of 50 ms.
When steps are longer than the reaction time, every step asks and waits, which then costs nothing one could measure.
With one process there is nothing to ask.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ckptstore.dcp.agreement import Agreement

#: Steps between two questions, at most.
MAX_EVERY = 1024
#: How far ranks may be apart: one of them may evaluate alone for a while, as in any collective of torch (10 min).
APART_S = 600.0
#: A tenth of the grace goes to noticing, the rest to saving.
GRACE_SHARE = 0.1
#: Saves by the clock may be late by this part of their period, twice.
PERIOD_SHARE = 0.05
MAX_REACTION_S = 1.0


@dataclass(frozen=True)
class News:
    """Agreed by all ranks.

    Attributes:
        signal: the signal to act on, if one has arrived anywhere.
        is_due: rank 0's clock says that a save is due.
    """

    signal: int | None = None
    is_due: bool = False


NOTHING = News()


class NewsDesk:
    """Asks the ranks. Collective: every rank calls :meth:`ask` once per step.

    Args:
        grace_s: seconds between a signal and the kill.
        period_s: seconds between saves by the clock, which should come on time too.
    """

    def __init__(
        self,
        agreement: Agreement,
        *,
        grace_s: float,
        period_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agreement = agreement
        self._reaction_s = min(MAX_REACTION_S, grace_s * GRACE_SHARE, period_s * PERIOD_SHARE)
        self._clock = clock
        self._is_first = agreement.rank == 0
        self.is_alone = agreement.world_size == 1
        self.reset()

    def reset(self) -> None:
        """Start anew, asking at every step; after all ranks have met, e.g. in a save."""
        self._every = 1
        self._countdown = 1
        self._asked_at: float | None = None
        self._saves: int = 0
        self._answer: Callable[[], list[int]] | None = None
        self.is_silent = False

    @property
    def every(self) -> int:
        """Steps between two questions at present."""
        return self._every

    def ask(self, signal: int | None, is_due: Callable[[], bool], saves: int) -> News:
        """News that all ranks have at this step.

        Args:
            signal: the signal this rank has seen.
            is_due: whether it is time to save; asked on rank 0 only.
            saves: number of saves so far: time that was due before the last of them isn't any more.

        Raises:
            SaveFailedError: a peer was lost; from then on silent, until :meth:`reset`.
        """
        if self.is_silent:
            return NOTHING
        self._countdown -= 1
        if self._countdown > 0:
            return NOTHING
        try:
            return self._exchange(signal, is_due, saves)
        except BaseException:
            self.is_silent, self._answer = True, None
            raise

    def _exchange(self, signal: int | None, is_due: Callable[[], bool], saves: int) -> News:
        now = self._clock()
        step_us = 0 if self._asked_at is None else int((now - self._asked_at) / self._every * 1e6)
        mine = [signal or 0, int(self._is_first and is_due()), step_us]
        if self._answer is not None:
            asked_saves, values = self._saves, self._answer()
            self._answer = None
        else:
            asked_saves, values = saves, self._agreement.begin_max(mine, timeout_s=APART_S)()
            mine[1] = 0
        news = News(values[0] or None, bool(values[1]) and asked_saves == saves)
        target = int(self._reaction_s * 1e6 / values[2]) if values[2] else 1
        self._every = max(1, min(target, 2 * self._every, MAX_EVERY))
        self._countdown, self._asked_at, self._saves = self._every, now, saves
        if self._every > 1 and news.signal is None:
            if news.is_due:
                mine[1] = 0
            self._answer = self._agreement.begin_max(mine, timeout_s=APART_S)
        return news
