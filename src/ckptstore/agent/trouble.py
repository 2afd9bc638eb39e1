"""What keeps a remote from taking saves, and when it is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ckptstore.errors import CkptError, TransientError

MAX_PAUSE_SECONDS = 60.0
#: After a refusal: somebody has to do something, and may do it without telling us.
REFUSED_PAUSE_SECONDS = 300.0


@dataclass
class Trouble:
    """A remote that is away, or refuses us. Its owner guards it; times are on the monotonic clock.

    Attributes:
        error: the last one; None once it works.
        failures: how many there were in a row.
        is_refused: the remote answers, and says no.
        pause_until: when it is tried again.
        away_since: when it stopped answering.
    """

    error: CkptError | None = None
    failures: int = 0
    is_refused: bool = False
    pause_until: float = 0.0
    away_since: float | None = None

    def is_over(self) -> None:
        """The remote did what it was asked."""
        self.error, self.failures, self.is_refused, self.away_since = None, 0, False, None

    def try_again(self) -> None:
        """Now, whatever there was."""
        self.failures, self.is_refused, self.pause_until, self.away_since = 0, False, 0.0, None

    def note(self, error: CkptError, now: float, *, has_news: bool) -> float:
        """The remote as a whole can't be used; returns how long it will be left alone.

        Args:
            has_news: something came meanwhile that must be tried at once all the same.
        """
        is_refused = not isinstance(error, TransientError)
        self.error = error
        self.failures += 1
        if is_refused:
            self.away_since = None
        elif self.away_since is None:
            self.away_since = now
        pause = REFUSED_PAUSE_SECONDS if is_refused else self._back_off(error)
        if not has_news:
            self.is_refused, self.pause_until = is_refused, now + pause
        return pause

    def has_lasted(self, now: float, seconds: float) -> bool:
        """Whether the remote has not answered for so long."""
        return self.away_since is not None and now - self.away_since >= seconds

    def _back_off(self, error: CkptError) -> float:
        wanted = error.context.get("retry_after_s")
        least = float(wanted) if isinstance(wanted, (int, float)) else 0.0
        longest = min(MAX_PAUSE_SECONDS, 2.0 ** min(self.failures - 1, 6))
        return max(least, longest * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
