"""One save on its way through the levels."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace

from ckptstore.errors import CkptError, ConfigError, SaveFailedError, SaveTimeoutError
from ckptstore.types import CheckpointInfo, Level, TierState

log = logging.getLogger("ckptstore")


class SaveHandle:
    """A save in progress: ``staged``, ``local`` and ``remote`` resolve when **every** rank's part has that level.

    Safe to share between threads. Dropping it is fine: the save goes on, and a failure is still raised by
    ``store.wait`` and ``store.close``.

    Attributes:
        step: the step that was saved.
        save_id: its unique id.
        remotes: remote's name -> future of that remote.
        because: what keeps it from a level after so many seconds, in words for an error; empty: nobody knows.
        line: stands for the connection to the agent whose word it waits for.
    """

    def __init__(self, info: CheckpointInfo, remotes: Iterable[str], quorum: int | None) -> None:
        self._info = info
        self.because: Callable[[str, float], str] = lambda level, waited_s: ""
        self.line: object | None = None
        self._lock = threading.RLock()  # done-callbacks of users run while it is held
        self._tiers: dict[str, TierState] = {}
        self._hooks: dict[str, list[Callable[[CheckpointInfo], None]]] = {}
        self._futures: dict[str, Future[CheckpointInfo]] = {"staged": Future(), "local": Future(), "remote": Future()}
        self.remotes: Mapping[str, Future[CheckpointInfo]] = {name: Future() for name in remotes}
        self._quorum = len(self.remotes) if quorum is None else min(quorum, len(self.remotes))

    def __repr__(self) -> str:
        return f"SaveHandle(step={self.step}, save_id={self.save_id!r}, reached={self.level!r})"

    @property
    def step(self) -> int:
        return self._info.step

    @property
    def save_id(self) -> str:
        return self._info.save_id

    @property
    def level(self) -> Level | None:
        """The highest level reached so far."""
        reached: Level | None = None
        for level in ("staged", "local", "remote"):
            future = self._futures[level]
            if future.done() and future.exception() is None:
                reached = level
        return reached

    @property
    def staged(self) -> Future[CheckpointInfo]:
        """Every rank's part is sealed in memory the agents own: survives the death of any trainer process."""
        return self._futures["staged"]

    @property
    def local(self) -> Future[CheckpointInfo]:
        """Every rank's part is fsynced and the save is committed: survives a power cut."""
        return self._futures["local"]

    @property
    def remote(self) -> Future[CheckpointInfo]:
        """The configured number of remotes hold the save: survives the loss of machine and disk.

        Raises:
            ConfigError: the store has no remote.
        """
        self.check_level("remote")
        return self._futures["remote"]

    def check_level(self, level: str) -> None:
        """Raise ConfigError unless this store can reach ``level``."""
        if level not in self._futures:
            raise ConfigError(f"no such level: {level!r}", hint="use 'staged', 'local' or 'remote'")
        if level == "remote" and not self.remotes:
            raise ConfigError(
                "level 'remote' can't be reached: this store has no remote",
                hint="open it with CheckpointStore(local, remote='s3://bucket/prefix')",
            )

    def done(self, level: str) -> bool:
        """Whether ``level`` was reached or has failed."""
        return self._futures[level].done()

    def wait(self, level: str = "local", timeout_s: float | None = None) -> CheckpointInfo:
        """Block until ``level`` is reached.

        Raises:
            SaveFailedError: the save failed.
            SaveTimeoutError: not reached in ``timeout_s`` seconds; says why, if the agent knows. The save goes on.
            ConfigError: a level this store doesn't have.
        """
        self.check_level(level)
        try:
            return self._futures[level].result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise self.late(level, timeout_s or 0.0) from None

    def late(self, level: str, waited_s: float) -> SaveTimeoutError:
        """The error of a wait that was so long."""
        return SaveTimeoutError(
            f"step {self.step} (save {self.save_id}) did not reach '{level}' within {waited_s:g} s"
            + self.because(level, waited_s),
            hint="the save goes on; wait again, or run `ckptctl push` later",
            step=self.step,
            save_id=self.save_id,
        )

    def before(self, level: str, action: Callable[[CheckpointInfo], None]) -> None:
        """Call ``action`` right before ``level``, or the remote of that name, resolves; at once if it has.

        It runs in the thread that brings the word, which waits for it. An exception in it is logged, nothing more.
        """
        with self._lock:
            future = self._futures.get(level) or self.remotes[level]
            if not future.done():
                self._hooks.setdefault(level, []).append(action)
            elif future.exception() is None:
                _call(action, future.result())

    # Called by the store as word arrives; each is idempotent.

    def reach(self, level: Level, tier: str | None = None, **facts: object) -> None:
        """Resolve ``level``; for a remote, ``tier`` names it. ``facts`` update the info."""
        with self._lock:
            if facts:
                self._info = replace(self._info, **facts)  # type: ignore[arg-type]
            if level == "local":
                self._tiers["local"] = "complete"
                # A commit implies that every part was sealed, whether or not that word arrived first.
                self._resolve("staged")
            elif level == "remote" and tier is not None:
                self._tiers[tier] = "complete"
                if tier in self.remotes:
                    self._resolve(tier)
                if sum(t != "local" for t in self._tiers) < self._quorum:
                    return
            self._resolve(level)

    def fail(self, error: CkptError, level: Level = "staged", tier: str | None = None) -> bool:
        """Fail ``level`` and everything that can't be reached any more; returns whether that was news."""
        failure = error
        if not isinstance(error, SaveFailedError) or f"step {self.step} " not in f"{error.message} ":
            failure = SaveFailedError(
                f"saving step {self.step} failed: {error.message}",
                hint=error.hint,
                **{"error": type(error).__name__, **error.context, "step": self.step, "save_id": self.save_id},
            )
            failure.__cause__ = error
        news = False
        with self._lock:
            if tier is not None and tier in self.remotes and not self.remotes[tier].done():
                self.remotes[tier].set_exception(failure)
                news = True
                failed = sum(f.done() and f.exception() is not None for f in self.remotes.values())
                if len(self.remotes) - failed >= self._quorum:
                    return news
            # Where writing failed before all nodes had told that they have it staged, nobody tells any more.
            for name in ("remote",) if level == "remote" else ("staged", "local", "remote"):
                if not self._futures[name].done():
                    self._futures[name].set_exception(failure)
                    news = True
            if level != "remote":
                for future in self.remotes.values():
                    if not future.done():
                        future.set_exception(failure)
        if news:
            log.error("%s", failure)
        return news

    def abandon(self, reason: str) -> None:
        """This save will not reach its remotes any more, by policy: not an error, but whoever waits is told."""
        failure = SaveFailedError(f"step {self.step} was not uploaded: {reason}", step=self.step, save_id=self.save_id)
        with self._lock:
            for future in (*self.remotes.values(), self._futures["remote"]):
                if not future.done():
                    future.set_exception(failure)

    def pass_over(self, tier: str) -> None:
        """By policy this save is never sent to this remote: what waits for that resolves with ``info.skipped`` set."""
        with self._lock:
            if tier not in self.remotes or self.remotes[tier].done():
                return
            info = replace(self._info, tiers=dict(self._tiers), skipped=True)
            self.remotes[tier].set_result(info)
            held = {name for name in self.remotes if self._tiers.get(name) == "complete"}
            possible = held | {name for name, future in self.remotes.items() if not future.done()}
            if len(possible) < self._quorum and not self._futures["remote"].done():
                self._futures["remote"].set_result(info)

    def failure(self) -> SaveFailedError | None:
        """The error of the lowest level that failed, if any did."""
        for future in self._futures.values():
            if future.done() and (error := future.exception()) is not None:
                return error if isinstance(error, SaveFailedError) else None
        return None

    def _resolve(self, name: str) -> None:
        future = self._futures.get(name) or self.remotes[name]
        if not future.done():
            info = replace(self._info, tiers=dict(self._tiers))
            for action in self._hooks.pop(name, ()):
                _call(action, info)
            future.set_result(info)


def _call(action: Callable[[CheckpointInfo], None], info: CheckpointInfo) -> None:
    try:
        action(info)
    except Exception:
        log.exception("what was to happen before step %d resolves has failed", info.step)
