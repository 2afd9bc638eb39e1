"""What is to be done at a step: the signal to act on, and why a save is due. The same on every rank."""

from __future__ import annotations

import math
import time

from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import SaveFailedError
from ckptstore.manager.news import NOTHING, News, NewsDesk
from ckptstore.manager.options import END_GRACES
from ckptstore.manager.progress import Progress
from ckptstore.manager.voice import Voice
from ckptstore.policy import EverySeconds, SavePolicy


class Agenda:
    """Applies the save policy, and asks the other ranks where one rank could know more than another.

    Args:
        policy: when to save.
        end: Unix time at which the allocation ends, where that is known.
        grace_s: seconds between a signal and the kill.
    """

    def __init__(
        self,
        policy: SavePolicy,
        progress: Progress,
        agreement: Agreement,
        *,
        end: float | None,
        grace_s: float,
        voice: Voice,
    ) -> None:
        self._policy, self._progress, self._voice = policy, progress, voice
        self._end, self._grace_s = end, grace_s
        periods = [rule.seconds for rule in policy.rules() if isinstance(rule, EverySeconds)]
        self._desk = NewsDesk(agreement, grace_s=grace_s, period_s=min(periods, default=math.inf))

    def at_step(self, pending: int | None, *, is_watching: bool) -> tuple[int | None, str | None]:
        """The signal to act on, and why a save is due. Collective.

        Args:
            pending: the signal this rank has seen.
            is_watching: whether ranks look out for signals at all.
        """
        progress, desk = self._progress, self._desk
        if desk.is_alone:
            reason = self._policy.due(progress.moment(end=self._end))
            self._note_end(reason)
            return pending, reason
        reason = self._policy.due(progress.moment(timed=False))
        news = self._ask(pending) if is_watching or self._policy.is_timed else NOTHING
        if reason is None and news.is_due:
            reason = self._policy.due(progress.moment(end=self._end)) or "rank 0 says it is time"
            self._note_end(reason)
        if desk.is_silent and pending is not None:
            return pending, None  # nobody to agree with: this rank ends alone, with what is saved
        return news.signal, reason

    @property
    def can_save(self) -> bool:
        """Whether the other ranks can be reached, as far as is known."""
        return not self._desk.is_silent

    @property
    def every(self) -> int:
        """Steps between two questions at present."""
        return self._desk.every

    def met(self) -> None:
        """All ranks have just met: those that could not be asked can be asked again."""
        if self._desk.is_silent:
            self._desk.reset()

    def _ask(self, pending: int | None) -> News:
        def is_due() -> bool:
            return self._policy.due(self._progress.moment(end=self._end)) is not None

        try:
            return self._desk.ask(pending, is_due, self._progress.saves)
        except SaveFailedError as error:
            self._voice.warn(f"the ranks can't be asked for signals until the next save: {error.message}")
            return NOTHING

    def _note_end(self, reason: str | None) -> None:
        if reason is not None and self._end is not None and self._end - time.time() <= self._grace_s * END_GRACES:
            self._progress.is_end_saved = True
