"""The line to one remote: its store, how fast it goes and may go, and the timelines told over it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ckptstore.agent.pace import Pace, cap_at
from ckptstore.clock import Clock
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError
from ckptstore.format.manifest import Summary
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.blob.retry import Retry
    from ckptstore.blob.throttle import Throttle
    from ckptstore.repo.remote import RemoteTier

log = logging.getLogger("ckptstore.agent")


class RemoteLine:
    """One remote of one run as the thread that uploads to it sees it.

    Args:
        tier: Where this node's claims of timelines are, and others' are noted.
        run, name, url: Which remote of which run.
        environ: Credentials; kept in memory, never shown.
        clock: Tells the time of day for caps.

    Attributes:
        pace: How fast it has been lately.
        on_retry: Hears of requests that are tried again.
    """

    def __init__(self, tier: LocalTier, run: str, name: str, url: str, environ: dict[str, str], clock: Clock) -> None:
        self.pace = Pace()
        self.on_retry: Callable[[Retry], None] | None = None
        self._tier = tier
        self._run = run
        self._name = name
        self._url = url
        self._environ = environ
        self._clock = clock
        self._claimed: set[int] = set()
        self._remote: RemoteTier | None = None
        self._throttle: Throttle | None = None

    def replace_environ(self, environ: Mapping[str, str]) -> None:
        """Use these credentials, also in requests under way that are tried again."""
        self._environ.update(environ)
        for name in set(self._environ) - set(environ):
            del self._environ[name]

    def remote(self, config: StoreConfig) -> RemoteTier:
        """The run on this remote; opened when it is first asked for.

        Raises:
            ConfigError: the URL can't be right, or an extra is missing.
        """
        if self._remote is None:
            from ckptstore.blob import open_blob_store
            from ckptstore.blob.throttle import Throttle
            from ckptstore.repo.remote import RemoteTier

            self._throttle = Throttle(self.cap(config), clock=self._clock)
            blob = open_blob_store(self._url, environ=self._environ, throttle=self._throttle, on_retry=self._retried)
            self._remote = RemoteTier(blob, self._run, self._name)
        return self._remote

    def apart(self) -> RemoteTier:
        """A connection of its own, for work beside the uploads; close its ``blob``."""
        from ckptstore.blob import open_blob_store
        from ckptstore.repo.remote import RemoteTier

        return RemoteTier(open_blob_store(self._url, environ=dict(self._environ)), self._run, self._name)

    def hang_up(self) -> None:
        """Forget the connection, and what was remembered of the remote."""
        if self._remote is not None:
            self._remote.blob.close()
        self._remote = None

    def cap(self, config: StoreConfig) -> float | None:
        """Bytes a second that may be used at this time of day."""
        return cap_at(config, self._clock.now().astimezone())

    def apply_cap(self, config: StoreConfig) -> float | None:
        """The cap of this time of day, in force from now on."""
        cap = self.cap(config)
        if self._throttle is not None:
            self._throttle.limit(cap)
        return cap

    def learn_timelines(self) -> None:
        """Note claims of other machines in the local tier, where this node's trainers look. Best effort."""
        if self._remote is None:
            return
        try:
            known = self._tier.timelines(self._run)
            for number in self._remote.known_timelines():
                if number > max(known, default=0) and (record := self._remote.timeline_record(number)) is not None:
                    self._tier.claim_timeline(self._run, number, record)
        except CkptError as error:
            log.warning("can't look for newer jobs of %s on %s: %s", self._run, self._name, error)

    def claim_timeline(self, summary: Summary | None) -> None:
        """Let other machines know that this timeline is taken. Best effort: saves never collide, whoever has it."""
        if self._remote is None or summary is None or summary.timeline in self._claimed:
            return
        number = summary.timeline
        self._claimed.add(number)
        record = self._tier.timeline_record(self._run, number)
        if record is None:
            return
        try:
            if not self._remote.claim_timeline(number, record):
                log.warning("timeline %d of %s is somebody else's on %s", number, self._run, self._name)
        except CkptError as error:
            log.warning("can't claim timeline %d of %s on %s: %s", number, self._run, self._name, error)

    def _retried(self, retry: Retry) -> None:
        if self.on_retry is not None:
            self.on_retry(retry)
