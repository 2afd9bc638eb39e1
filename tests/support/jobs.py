"""Jobs to be killed in: ``job.py`` as a process, forked from one that has torch loaded, or started like a user's."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "job.py"
#: Nothing is a race against the clock: this only ends a test whose job hangs.
LIMIT_S = 120.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.utils.data", "job", "ckptstore.store.session"])


class Job:
    """A job as a process; what it says is kept, so nothing is missed and nothing depends on who is faster.

    Args:
        group: it gets a process group of its own.
        is_started: the script is started by a fresh interpreter.
    """

    def __init__(self, *arguments: str, group: bool = False, is_started: bool = False) -> None:
        self.out: list[tuple[str, dict[str, Any]]] = []
        self.err = ""
        self._news = threading.Condition()
        pipes = [_context.Pipe(duplex=False) for _ in range(2)]
        if is_started:
            command = [sys.executable, "-u", str(SCRIPT), *arguments]
            files = [theirs.fileno() for _, theirs in pipes]
            process = subprocess.Popen(command, stdout=files[0], stderr=files[1], start_new_session=group)
            self.pid, self._wait_for_end = process.pid, process.wait
        else:
            child = _context.Process(target=_run, args=(arguments, [theirs for _, theirs in pipes], group))
            child.start()
            assert child.pid is not None
            self.pid, self._child = child.pid, child
            self._wait_for_end = self._joined
        self._readers = []
        for (mine, theirs), take in zip(pipes, (self._take_out, self._take_err), strict=True):
            theirs.close()
            self._readers.append(threading.Thread(target=self._read, args=(mine, take), daemon=True))
            self._readers[-1].start()

    def until(self, word: str, **facts: Any) -> dict[str, Any]:
        """The facts of the first line with this word and these facts, said already or to come."""

        def found() -> dict[str, Any] | None:
            return next((each for said, each in self.out if said == word and facts.items() <= each.items()), None)

        self._wait(lambda: found() is not None, f"{word} {facts}")
        line = found()
        assert line is not None
        return line

    def until_told(self, text: str) -> None:
        """Until this was printed on stderr."""
        self._wait(lambda: text in self.err, text)

    def said(self, word: str) -> list[dict[str, Any]]:
        """The facts of every line with this word."""
        return [facts for said, facts in self.out if said == word]

    def send(self, name: str) -> None:
        """A signal to the job alone."""
        os.kill(self.pid, getattr(signal, name))

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return any(reader.is_alive() for reader in self._readers)

    def end(self) -> tuple[int, str]:
        """Wait for the end: exit code, and everything it printed on stderr."""
        code = self._wait_for_end(LIMIT_S)
        for reader in self._readers:
            reader.join(LIMIT_S)
        return code, self.err

    def close(self) -> None:
        """Whatever became of it, it is gone."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.end()

    def _joined(self, timeout_s: float) -> int:
        self._child.join(timeout_s)
        assert self._child.exitcode is not None, f"it hangs: {self.err}"
        return self._child.exitcode

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + LIMIT_S
        with self._news:
            while not is_so() and self.is_alive() and time.monotonic() < until:
                self._news.wait(0.5)
        assert is_so(), f"no {what}; said {self.out[-5:]}: {self.err}"

    def _read(self, pipe: Connection, take: Callable[[str], None]) -> None:
        with open(os.dup(pipe.fileno()), errors="replace") as file:
            pipe.close()
            for line in file:
                with self._news:
                    take(line)
                    self._news.notify_all()

    def _take_out(self, line: str) -> None:
        word, _, rest = line.partition(" {")
        self.out.append((word, json.loads("{" + rest)))

    def _take_err(self, line: str) -> None:
        self.err += line


@contextmanager
def job(folder: Path, *options: str, group: bool = False, is_started: bool = False) -> Iterator[Job]:
    """A job that saves below ``folder``."""
    started = Job(str(folder), *options, group=group, is_started=is_started)
    try:
        yield started
    finally:
        started.close()


def _run(arguments: tuple[str, ...], pipes: list[Connection], group: bool) -> None:
    """In the child: what an interpreter does with a script."""
    import job as script

    if group:
        os.setsid()
    for number, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.argv = [str(SCRIPT), *arguments]
    try:
        script.main()
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
