"""Metrics between checkpoints, for whoever watches: about once a second a line in the run's journal.

Training must not notice. A step that is not due costs a comparison; one that is due looks at plain numbers and at
tensors that are on the host already (asking a device would make the loop wait for it), and a thread of its own writes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ckptstore.clock import SYSTEM_CLOCK, rfc3339
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier
from ckptstore.types import json_number

PERIOD_SECONDS = 1.0
#: Points that wait for the run's folder, which the first save makes.
MAX_WAITING = 5000


class Live:
    """The curve between checkpoints; does nothing without a local tier.

    Args:
        root: of the local tier.
        optimizers: asked for the learning rate.
        clock: for the period.
    """

    def __init__(
        self,
        root: Path | None,
        run: str,
        optimizers: Callable[[], Iterable[Optimizer]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tier = None if root is None else LocalTier(root)
        self._run, self._optimizers, self._clock = run, optimizers, clock
        self._next = -1.0
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING)
        self._writer: _Writer | None = None

    def note(self, step: int, epoch: int | None, metrics: Mapping[str, Any] | None) -> None:
        """A step is done. Never blocks on a disk or a device, never raises."""
        now = self._clock()
        if now < self._next or self._tier is None:
            return
        is_first, self._next = self._next < 0, now + PERIOD_SECONDS
        values = {
            str(name): json_number(value)
            for name, given in (metrics or {}).items()
            if (value := _host(given)) is not None
        }
        if "lr" not in values and (rate := self._learning_rate()) is not None:
            values["lr"] = rate
        point = {"time": rfc3339(SYSTEM_CLOCK.now()), "step": step, "epoch": epoch, "metrics": values}
        if is_first:
            point["begins"] = True  # a job's; no time of the loop's lies between it and the point before
        self._waiting.append(point)
        if self._writer is None:
            self._writer = _Writer(self._tier, self._run, self._waiting)
            self._writer.start()
        self._writer.wake.set()

    def close(self) -> None:
        """Write what is left, if the disk takes it within a second."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.closing.set()
            writer.wake.set()
            writer.join(1.0)

    def _learning_rate(self) -> float | None:
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                return _host(group.get("lr"))
        return None


class _Writer(threading.Thread):
    """Writes what waits each time it is woken, and a last time once it is closing, however long the disk hung."""

    def __init__(self, tier: LocalTier, run: str, waiting: deque[dict[str, Any]]) -> None:
        super().__init__(name="ckptstore-live", daemon=True)
        self._tier, self._run, self._waiting = tier, run, waiting
        self.wake, self.closing = threading.Event(), threading.Event()

    def run(self) -> None:
        while True:
            self.wake.wait()
            self.wake.clear()
            is_last = self.closing.is_set()
            if self._tier.run_path(self._run).is_dir():
                points = []
                with suppress(IndexError):
                    while True:
                        points.append(self._waiting.popleft())
                if points:
                    journal.append(self._tier, self._run, "live", points)
            if is_last:
                return


def _host(value: Any) -> float | None:
    """The number, if reading it costs nothing."""
    if isinstance(value, torch.Tensor):
        # Subclasses may do anything when they are asked, such as talking to other ranks.
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.numel() != 1:
            return None
        value = value.detach()
    elif not isinstance(value, Real):
        return None
    try:
        return float(value)
    except (RuntimeError, OverflowError, ValueError, TypeError):  # complex, or too large
        return None
