"""A node to test on, and waiting for things to come true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fake_trainer import WAIT_S, Trainer

from ckptstore.agent.client import AgentClient
from ckptstore.agent.runtime import RuntimeDir


class Node:
    """One machine: roots below ``path``, agents found through this process's XDG_RUNTIME_DIR."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "root"
        self.remote = f"file://{path / 'bucket' / 'store'}"
        self._trainers: list[Trainer] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._roots: set[Path] = set()

    def trainer(self, root: Path | None = None, **options: Any) -> Trainer:
        root = root or self.root
        self._roots.add(root)
        trainer = Trainer(root, **options)
        self._trainers.append(trainer)
        return trainer

    def watch(self, root: Path | None = None) -> None:
        """Make sure that this root's agent, whoever starts it, ends with the test."""
        self._roots.add(root or self.root)

    def runtime(self, root: Path | None = None) -> RuntimeDir:
        return RuntimeDir.of(root or self.root)

    def log(self, root: Path | None = None) -> str:
        return self.runtime(root).log.read_text()

    def agent_pid(self, root: Path | None = None) -> int | None:
        """Pid of the living agent."""
        try:
            pid = int(self.runtime(root).lock.read_text())
            if b"ckptstore.agent" in Path(f"/proc/{pid}/cmdline").read_bytes().replace(
                b"sick_agent", b"ckptstore.agent"
            ):
                return pid
        except (FileNotFoundError, ValueError, ProcessLookupError):
            pass
        return None

    def sick_agent(self, *sickness: str, root: Path | None = None) -> subprocess.Popen[bytes]:
        """Start the agent of a root with a sick disk; trainers that connect will find it."""
        root = root or self.root
        self._roots.add(root)
        script = Path(__file__).parent / "sick_agent.py"
        with (self.path / "sick.log").open("ab") as log:
            command = [sys.executable, str(script), *sickness, "--", "--root", str(root)]
            process = subprocess.Popen(command, stderr=log, cwd="/")
        self._processes.append(process)
        until(lambda: is_served(root))
        return process

    def close(self) -> None:
        for trainer in self._trainers:
            trainer.close()
        for process in self._processes:
            process.kill()
            process.wait(10)
        for root in self._roots:
            pid = self.agent_pid(root)
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(FileNotFoundError):
                assert "Traceback" not in self.log(root), self.log(root)


def is_served(root: Path) -> bool:
    """Whether an agent of this root answers."""
    observer = AgentClient.observe(root)
    if observer is not None:
        observer.close()
    return observer is not None


def until(condition: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
    return value
