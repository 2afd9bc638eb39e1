"""A real terminal of 80 columns that a test can type into and look at: a tmux server of its own."""

from __future__ import annotations

import shlex
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType

#: Generous: a loaded machine is slow, and nobody waits for it when all is well.
PATIENCE_S = 60.0
_END = "[the program ended with"


class Terminal:
    """A context manager; each program gets a window of its own, and the screen is that of the newest."""

    def __init__(self, columns: int = 80, lines: int = 50) -> None:
        self._tmux = ["tmux", "-L", f"ckptstore-{uuid.uuid4().hex[:12]}", "-f", "/dev/null"]
        self._size = ["-x", str(columns), "-y", str(lines)]

    def __enter__(self) -> Terminal:
        self._call("new-session", "-d", *self._size, "sleep 3600")
        self._call("set-option", "-g", "history-limit", "50000")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("kill-server")

    def start(self, argv: Sequence[str], environ: Mapping[str, str], cwd: str) -> None:
        """Run a program with exactly this environment, and ``TERM``."""
        setting = [f"{name}={value}" for name, value in {**environ, "TERM": "screen-256color"}.items()]
        # The shell outlives the Ctrl-C that its child is sent, and says how that ended; tmux itself may miss it.
        say = f'trap : INT; "$@"; echo "{_END} $? "; sleep 3600'
        self._call("new-window", "-c", cwd, shlex.join(["sh", "-c", say, "sh", "env", "-i", *setting, *argv]))

    def keys(self, *keys: str) -> None:
        """Press keys, by tmux's names (``C-c``, ``Tab``) or as text."""
        self._call("send-keys", *keys)

    def screen(self, *, colours: bool = False) -> str:
        """Everything on the screen and above it; lines that the terminal has wrapped are whole."""
        return self._call("capture-pane", "-p", "-J", "-S", "-", *(["-e"] if colours else []))

    def wait_for(self, text: str) -> str:
        """The screen once the text is on it."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in (screen := self.screen()):
            assert time.monotonic() < deadline, f"{text!r} never came:\n{screen}"
            time.sleep(0.05)
        return screen

    def wait_for_end(self) -> int:
        """The exit code of the newest program."""
        return int(self.wait_for(_END).rpartition(_END)[2].split()[0])

    def interrupt(self) -> int:
        """Press Ctrl-C until it ends, as a person would; the exit code.

        Python misses a signal that comes between its last look and the read that then waits for a line.
        """
        deadline = time.monotonic() + PATIENCE_S
        while _END not in self.screen() and time.monotonic() < deadline:
            self.keys("C-c")
            for _ in range(40):
                if _END in self.screen():
                    break
                time.sleep(0.05)
        return self.wait_for_end()

    def _call(self, *args: str) -> str:
        done = subprocess.run([*self._tmux, *args], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        return done.stdout
