"""Stall, lag, durable step and the sources of a load as curves, for whoever draws the loss already."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from ckptstore.store import SaveHandle
from ckptstore.types import CheckpointInfo


class SummaryWriter(Protocol):
    """What is used of a TensorBoard writer."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any:
        """Add one point."""


class Scalars:
    """Collects points as word comes in; writes them from the loop's thread, since writers aren't thread-safe."""

    def __init__(self, writer: SummaryWriter | None) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._points: list[tuple[str, float, int]] = []

    def offer(self, writer: SummaryWriter) -> None:
        """Write there, unless the program has named another place."""
        if self._writer is None:
            self._writer = writer

    def watch(self, handle: SaveHandle, stall_s: float, clock: Any) -> None:
        """Follow a save."""
        if self._writer is None:
            return
        begun = clock()
        self._add("ckptstore/save_stall_seconds", stall_s, handle.step)
        for level in ("local", *handle.remotes):
            handle.before(level, lambda info, level=level: self._reached(level, info.step, clock() - begun))  # type: ignore[misc]

    def loaded(self, info: CheckpointInfo) -> None:
        """Take note of where a load took its bytes from."""
        if self._writer is not None and info.report is not None:
            for source, size_bytes in info.report.bytes_by_source.items():
                self._add(f"ckptstore/load_{source}_bytes", float(size_bytes), info.step)

    def flush(self) -> None:
        """Hand over what has been collected."""
        if self._writer is None:
            return
        with self._lock:
            points, self._points = self._points, []
        for tag, value, step in points:
            self._writer.add_scalar(tag, value, step)

    def _reached(self, tier: str, step: int, seconds: float) -> None:
        self._add(f"ckptstore/{tier}_lag_seconds", seconds, step)
        self._add(f"ckptstore/{tier}_step", float(step), step)

    def _add(self, tag: str, value: float, step: int) -> None:
        with self._lock:
            self._points.append((tag, value, step))
