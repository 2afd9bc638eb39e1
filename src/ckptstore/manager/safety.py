"""What is safe where: the newest step that each tier holds, as words come in."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Mapping

from ckptstore.store import SaveHandle
from ckptstore.types import CheckpointInfo


class Safety:
    """The newest step at each level and remote. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: dict[str, int] = {}
        #: step -> when it was handed over, for saves that no remote has confirmed yet
        self._waiting: dict[str, dict[int, float]] = {}

    def resumed(self, info: CheckpointInfo) -> None:
        """This checkpoint was there before."""
        for tier, state in info.tiers.items():
            if state == "complete":
                self._reach(tier, info.step)

    def watch(self, handle: SaveHandle) -> None:
        """Follow a save through the levels."""
        with self._lock:
            for name in handle.remotes:
                self._waiting.setdefault(name, {})[handle.step] = time.monotonic()
        for level in ("staged", "local", *handle.remotes):
            handle.before(level, lambda info, level=level: self._reach(level, info.step))  # type: ignore[misc]

    @property
    def steps(self) -> Mapping[str, int]:
        """Level or remote -> newest step there."""
        with self._lock:
            return dict(self._steps)

    def newest(self) -> int | None:
        """The newest step anywhere, staged included."""
        return max(self.steps.values(), default=None)

    def lag(self, name: str) -> tuple[int, float]:
        """How many saves the remote lacks that are newer than its newest, and the age of the oldest of them."""
        with self._lock:
            waiting = self._waiting.get(name, {})
            return len(waiting), time.monotonic() - min(waiting.values()) if waiting else 0.0

    def sentence(self) -> str:
        """``safe: local 12400, remote 12000``; with ``staged`` where that is newer than what is on disk.

        A remote that has been sent saves and has none of them says so.
        """
        steps = dict(self.steps)
        staged = steps.pop("staged", -1)
        said = [
            f"{tier} {step}" for tier, step in sorted(steps.items(), key=lambda item: (item[0] != "local", item[0]))
        ]
        with self._lock:
            said += [f"{name} nothing yet" for name in sorted(self._waiting) if name not in steps]
        if staged > steps.get("local", -1):
            said.append(f"staged {staged} (in the node agent's memory, which is writing it)")
        return f"safe: {', '.join(said)}" if steps or staged >= 0 else "nothing was saved"

    def _reach(self, tier: str, step: int) -> None:
        with self._lock:
            self._steps[tier] = max(step, self._steps.get(tier, -1))
            waiting = self._waiting.get(tier, {})
            for older in [each for each in waiting if each <= step]:
                del waiting[older]


def command() -> str:
    """How this job was started, as far as a worker can know."""
    import builtins
    import os

    if hasattr(builtins, "__IPYTHON__") or hasattr(sys, "ps1"):
        return "continue by running this again"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "continue with the same torchrun command"
    return f"continue with: {shlex.join(sys.orig_argv)}"
