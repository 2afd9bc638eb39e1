"""The node agent of this machine, watched: what it writes and uploads now, how fast, and when it will be through."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptstore.agent.client import AgentClient
from ckptstore.clock import Clock
from ckptstore.errors import CkptError

#: Weight of the past after this many seconds is 1/e.
SMOOTHING_SECONDS = 15.0


@dataclass(frozen=True)
class Uploading:
    """One remote's queue.

    Attributes:
        waiting: saves in it, newest first: step, state, attempts, done and total bytes, error.
        remaining_bytes: plain bytes still to deal with.
        rate_bytes_per_s: plain bytes dealt with per second lately; None while nothing has moved.
        eta_s: time to the end of the queue at that rate; None if it can't be told.
    """

    remote: str
    waiting: tuple[dict[str, Any], ...]
    lag_s: float
    remaining_bytes: int
    rate_bytes_per_s: float | None
    eta_s: float | None
    is_refused: bool
    error: str | None


class AgentWatch:
    """Looks at the agent of ``root`` through one connection; never starts one, never keeps one alive."""

    def __init__(self, root: Path | None, clock: Clock) -> None:
        self.status: dict[str, Any] | None = None
        self.error: CkptError | None = None
        self._root = root
        self._clock = clock
        self._client: AgentClient | None = None
        self._lock = threading.Lock()
        self._rates: dict[tuple[str, str], float] = {}
        self._done: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self._looked_at: float | None = None

    def look(self) -> None:
        """Ask the agent; None afterwards if there is none."""
        if self._root is None:
            return
        try:
            if self._client is None or self._client.is_lost:
                self._client = AgentClient.observe(self._root)
            status = None if self._client is None else self._client.status()
            self.error = None
        except CkptError as error:
            status, self.error = None, error
            self.close()
        self._measure(status)
        self.status = status

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(CkptError):
                client.close()

    def run(self, run: str) -> dict[str, Any] | None:
        """What the agent says of one run."""
        status = self.status
        found: dict[str, Any] | None = None if status is None else status.get("runs", {}).get(run)
        return found

    def uploading(self, run: str, sizes: Mapping[str, int]) -> list[Uploading]:
        """Its queues, one per remote. ``sizes`` are plain bytes by save_id, for what it has not begun."""
        result = []
        for name, remote in ((self.run(run) or {}).get("remotes") or {}).items():
            remaining = 0
            rows = []
            for row in remote.get("queue", ()):
                total = row["plain_total_bytes"] or sizes.get(row["save_id"], 0)
                left = max(0, total - row["plain_done_bytes"])
                remaining += left
                rows.append({**row, "plain_total_bytes": total})
            with self._lock:
                rate = self._rates.get((run, name))
            error = remote.get("error")
            result.append(
                Uploading(
                    remote=name,
                    waiting=tuple(rows),
                    lag_s=float(remote.get("lag_seconds", 0.0)),
                    remaining_bytes=remaining,
                    rate_bytes_per_s=rate if rate and rate > 1 else None,
                    eta_s=remaining / rate if rows and rate and rate > 1 else None,
                    is_refused=bool(remote.get("is_refused")),
                    error=None if error is None else str(error.get("message")),
                )
            )
        return result

    def _measure(self, status: dict[str, Any] | None) -> None:
        now = self._clock.monotonic()
        passed = None if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        with self._lock:
            for run, said in ((status or {}).get("runs") or {}).items():
                for name, remote in said["remotes"].items():
                    queue = {
                        row["save_id"]: (row["plain_done_bytes"], row["plain_total_bytes"]) for row in remote["queue"]
                    }
                    before = self._done.get((run, name), {})
                    self._done[run, name] = queue
                    if passed is None or passed <= 0 or not before:
                        continue
                    moved = sum(max(0, done - before.get(save_id, (0, 0))[0]) for save_id, (done, _) in queue.items())
                    moved += sum(total - done for save_id, (done, total) in before.items() if save_id not in queue)
                    weight = math.exp(-passed / SMOOTHING_SECONDS)
                    old = self._rates.get((run, name))
                    rate = moved / passed
                    self._rates[run, name] = rate if old is None else weight * old + (1 - weight) * rate
