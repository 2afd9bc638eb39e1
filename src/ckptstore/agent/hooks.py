"""Tell somebody when a save fails, uploads fail or lag, bytes are damaged, or the disk fills: a POST, or a command.

What happens is heard as it happens, what creeps up is looked for every half minute. All waiting is done in one thread;
a hook that hangs or fails is given up, logged, and never disturbs a save. What is told has no secrets in it, and the
hook's own URL, which often is one, is never logged.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ckptstore._version import __version__
from ckptstore.agent.protocol import Event
from ckptstore.clock import SYSTEM_CLOCK, Clock, rfc3339
from ckptstore.config import StoreConfig

log = logging.getLogger("ckptstore.agent")

LOOK_SECONDS = 30.0
TRIES = 3
PAUSE_SECONDS = 2.0
#: News that wait; of more than these the oldest are dropped.
MAX_WAITING = 100
#: The disk is filling when less than so many checkpoints fit.
ROOM_CHECKPOINTS = 3

_DAMAGE = ("IntegrityError",)


@dataclass(frozen=True)
class Targets:
    """Whom to tell, and when; of the newest attachment."""

    url: str | None = None
    command: tuple[str, ...] = ()
    timeout_s: float = 10.0
    lag_seconds: float = 1800.0
    repeat_seconds: float = 3600.0

    @classmethod
    def of(cls, config: StoreConfig, environ: Mapping[str, str]) -> Targets | None:
        """What a trainer's configuration asks for; None if it asks for nothing."""
        url = config.hook_url
        if url is not None and url.startswith("env:"):
            url = environ.get(url.removeprefix("env:")) or None
            if url is None or not url.startswith(("http://", "https://")):
                log.warning("hook_url=%r names no URL in the trainer's environment", config.hook_url)
                url = None
        if url is None and not config.hook_command:
            return None
        return cls(
            url, config.hook_command or (), config.hook_timeout_s, config.hook_lag_seconds, config.hook_repeat_seconds
        )


class Hooks:
    """The hooks of one agent. Thread-safe; hears of saves as a watcher, and never blocks or raises into one.

    Args:
        status: the agent's ``status``.
        root: of the local tier.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]], root: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._status = status
        self._root = root
        self._clock = clock
        self._condition = threading.Condition()
        self._targets = Targets()
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._told: dict[tuple[str, ...], float] = {}
        self._sizes: dict[str, int] = {}
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def aim(self, targets: Targets) -> None:
        """Tell these from now on."""
        with self._condition:
            self._targets = targets
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="hooks", daemon=True)
                self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Tell what waits, within this time."""
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # ------------------------------------------------------------------ what happens

    def event(self, run: str, event: Event) -> None:
        """Trainers are told this."""
        if event.kind == "local":
            self._sizes[run] = int(event.data["summary"]["size_bytes"])
        if event.kind != "failed":
            return
        data = event.data
        error, level, remote = data["error"], data["level"], data.get("remote")
        kind = "upload_failed" if level == "remote" else "save_failed"
        if error == "NoSpaceError":
            kind = "no_space"
        elif error in _DAMAGE:
            kind = "damaged"
        facts = {"step": event.step, "save_id": event.save_id, "level": level, "remote": remote, "error": error}
        self._tell(kind, run, data["message"], (str(remote), error), **facts, hint=data["hint"])

    def written(self, run: str, ranks: Mapping[str, Mapping[str, float]], timing: Mapping[str, float]) -> None:
        """Nothing to tell of a save that went well."""

    def retried(self, op: str, reason: str) -> None:
        """Nothing to tell: it is tried again."""

    def _look(self) -> None:
        """What creeps up: uploads that lag, and a disk that fills."""
        runs = self._status()["runs"]
        for run, said in runs.items():
            for name, remote in said["remotes"].items():
                lag = float(remote["lag_seconds"])
                if lag > self._targets.lag_seconds:
                    message = f"uploads of {run} to {name} lag by {lag:.0f} s"
                    self._tell("upload_lag", run, message, (name,), remote=name, lag_seconds=round(lag, 1))
        size = max((self._sizes.get(run, 0) for run in runs), default=0)
        free = shutil.disk_usage(self._root).free
        if size and free < ROOM_CHECKPOINTS * size:
            message = f"{free} bytes free below {self._root}: room for {free // size} more checkpoints"
            run = max(runs, key=lambda name: self._sizes.get(name, 0))
            self._tell("no_space", run, message, ("filling",), free_bytes=free)

    def _tell(self, kind: str, run: str, message: str, what: tuple[str, ...], **facts: Any) -> None:
        now = self._clock.monotonic()
        key = (kind, run, *what)
        with self._condition:
            last = self._told.get(key)
            if last is not None and now - last < self._targets.repeat_seconds:
                return
            self._told[key] = now
            while len(self._told) > 10 * MAX_WAITING:
                del self._told[next(iter(self._told))]
            self._waiting.append(
                {
                    "schema_version": 1,
                    "event": kind,
                    "time": rfc3339(self._clock.now()),
                    "node": socket.gethostname(),
                    "root": str(self._root),
                    "run": run,
                    **{name: value for name, value in facts.items() if value is not None},
                    "message": message,
                    "text": f"ckptstore: {kind.replace('_', ' ')} in run {run} on {socket.gethostname()}: {message}",
                }
            )
            self._condition.notify_all()

    # ------------------------------------------------------------------ telling

    def _loop(self) -> None:
        look_at = self._clock.monotonic()
        while True:
            with self._condition:
                while not self._waiting and not self._is_closing and self._clock.monotonic() < look_at:
                    self._condition.wait(look_at - self._clock.monotonic())
                news = self._waiting.popleft() if self._waiting else None
                if news is None and self._is_closing:
                    return
                targets = self._targets
            try:
                if news is not None:
                    self._deliver(targets, news)
                elif not self._is_closing:
                    look_at = self._clock.monotonic() + LOOK_SECONDS
                    self._look()
            except Exception:
                log.exception("hooks")

    def _deliver(self, targets: Targets, news: Mapping[str, Any]) -> None:
        data = json.dumps(news).encode()
        if targets.url is not None:
            self._try(f"the hook on {urlsplit(targets.url).hostname}", lambda: _post(targets, data), news)
        if targets.command:
            self._try(f"the hook {targets.command[0]}", lambda: _run(targets, data), news)

    def _try(self, what: str, act: Callable[[], str | None], news: Mapping[str, Any]) -> None:
        trouble: str | None = None
        for number in range(TRIES):
            trouble = act()
            if trouble is None:
                log.info("%s was told: %s of %s", what, news["event"], news["run"])
                return
            with self._condition:
                if number + 1 < TRIES and not self._is_closing:
                    self._condition.wait_for(lambda: self._is_closing, PAUSE_SECONDS * (number + 1))
        log.warning("%s could not be told of %s of %s: %s", what, news["event"], news["run"], trouble)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would go on as a GET, without what there was to tell."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(targets: Targets, data: bytes) -> str | None:
    """POST once; why it did not work, without the address."""
    assert targets.url is not None
    headers = {"Content-Type": "application/json", "User-Agent": f"ckptstore/{__version__}"}
    request = urllib.request.Request(targets.url, data, headers, method="POST")  # noqa: S310 - checked by the config
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=targets.timeout_s):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:  # its text may hold the address
        reason = getattr(error, "reason", None)
        return type(reason or error).__name__


def _run(targets: Targets, data: bytes) -> str | None:
    """Run once; why it did not work."""
    try:
        done = subprocess.run(
            targets.command,
            input=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=targets.timeout_s,
            check=False,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {targets.timeout_s:g} s"
    except OSError as error:
        return str(error.strerror)
    if done.returncode == 0:
        return None
    return f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-300:].strip()}"
