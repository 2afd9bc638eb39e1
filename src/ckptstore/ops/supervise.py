"""`run`: a command's parent that stays until its checkpoints are uploaded.

Containers and job steps kill whatever is left when their first process ends, and with it the agent and its uploads. So
the first process is this one: it passes signals on, collects orphans, and waits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from ckptstore.agent.client import AgentClient
from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.errors import CkptError, ConfigError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Supervisor:
    """Runs one command. Use it from the main thread; signal handlers are put back at the end.

    Args:
        argv: The command.
        say: Told what happens, for people.
    """

    def __init__(self, argv: Sequence[str], say: Callable[[str], None]) -> None:
        self._argv = list(argv)
        self._say = say
        self._child: subprocess.Popen[bytes] | None = None
        self._is_over = False
        self._early: list[int] = []
        self._hurry = threading.Event()
        # A terminal sends Ctrl-C to the whole group: the child has it already.
        self._is_at_terminal = sys.stdin.isatty()

    def run(self) -> int:
        """Run the command to its end; its exit code, 128 + n when signal n ended it.

        Raises:
            ConfigError: there is no such command, or it can't be executed.
        """
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            try:
                self._child = subprocess.Popen(self._argv)
            except FileNotFoundError:
                raise ConfigError(f"no such command: {self._argv[0]}", hint="ckptctl -s STORE run -- CMD") from None
            except OSError as error:
                raise ConfigError(f"can't run {self._argv[0]}: {error.strerror}") from None
            for number in self._early:
                self._send(number)
            code = self._wait()
        except BaseException:
            self.restore(before)
            raise
        self._before = before
        return code if code >= 0 else 128 - code

    def wait_for_uploads(self, root: Path, timeout_s: float) -> bool:
        """Wait until the agent of this root has uploaded everything; False when it hasn't.

        A signal that comes now, to whom waiting no longer suits, ends it.
        """
        client = AgentClient.observe(root)
        if client is None:
            return True
        self._say(f"waiting up to {timeout_s:.0f} s for uploads; a signal ends the wait")
        deadline = SYSTEM_CLOCK.monotonic() + timeout_s
        is_settled = False
        try:
            while not is_settled and not self._hurry.is_set() and (left := deadline - SYSTEM_CLOCK.monotonic()) > 0:
                is_settled = client.drain(min(1.0, left))
                if not is_settled and not _is_busy(client.status()):
                    break
        except CkptError as error:
            self._say(f"the agent is gone: {error}")
        finally:
            client.close()
        return is_settled

    def restore(self, before: dict[signal.Signals, signal._HANDLER] | None = None) -> None:
        """Put signal handlers back."""
        for number, handler in (before or self._before).items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._is_over:
            self._hurry.set()
        elif self._child is None:
            self._early.append(number)
        elif not (number == signal.SIGINT and self._is_at_terminal):
            self._send(number)

    def _send(self, number: int) -> None:
        if self._child is not None and self._child.returncode is None:
            try:
                os.kill(self._child.pid, number)
            except ProcessLookupError:
                return

    def _wait(self) -> int:
        assert self._child is not None
        if os.getpid() != 1:
            code = self._child.wait()
            self._is_over = True
            return code
        while True:  # as the first process of a container, also bury orphans
            pid, status = os.waitpid(-1, 0)
            if pid == self._child.pid:
                self._is_over = True
                self._child.returncode = os.waitstatus_to_exitcode(status)
                return self._child.returncode


def _is_busy(status: dict[str, object]) -> bool:
    """Whether waiting can help: something is staged, or on its way to a remote that doesn't refuse it."""
    runs = status.get("runs")
    for run in runs.values() if isinstance(runs, dict) else ():
        remotes = run["remotes"].values()
        if run["saves"] or any(r["queue"] and not r["is_refused"] for r in remotes):
            return True
    return False
