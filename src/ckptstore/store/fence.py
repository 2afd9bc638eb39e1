"""Copying while forward and backward run, and holding the next ``optimizer.step`` until the copy is done."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol


class Steps(Protocol):
    """What the fence uses of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[Any, Any]: ...

    def register_step_pre_hook(self, hook: Callable[..., None]) -> Any: ...


class Fence:
    """The copy that is under way, if any, and the optimizers that wait for it.

    Only what a guarded optimizer steps or keeps is copied in the background: everything else (a buffer, an EMA copy,
    the model of an optimizer that isn't guarded) may change before any step that waits, and the snapshot would mix two.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._copying: Future[object] | None = None
        self._guarded: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.is_wanted = False

    @property
    def is_on(self) -> bool:
        """Whether copies may go on in the background."""
        return self.is_wanted and len(self._guarded) > 0

    def held(self, tensors: Sequence[Any]) -> frozenset[int]:
        """Places of those that only steps of guarded optimizers change, so that they may be copied meanwhile."""
        if not self.is_on:
            return frozenset()
        stepped = {id(_memory(tensor)) for optimizer in self._guarded for tensor in _stepped(optimizer)}
        return frozenset(i for i, tensor in enumerate(tensors) if id(tensor) in stepped)

    def guard(self, optimizer: Steps) -> None:
        """From now on each step of this optimizer first waits for the copy. Once per optimizer."""
        if optimizer not in self._guarded:
            self._guarded.add(optimizer)
            optimizer.register_step_pre_hook(lambda *_: self.wait())

    def run(self, copy: Callable[[], object]) -> None:
        """Start a copy; ``copy`` handles its own errors."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="ckptstore-overlap")
            self._copying = self._pool.submit(copy)

    def wait(self) -> None:
        """Return once the last copy begun is done; in a forked child, which has none, at once."""
        if self._copying is not None and os.getpid() == self._pid:
            self._copying.result()

    def close(self) -> None:
        """Wait, and let the thread go."""
        self.wait()
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None


def _stepped(optimizer: Steps) -> Iterator[Any]:
    """What its step changes, and maybe more."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for entry in optimizer.state.values():
        if isinstance(entry, dict):
            yield from entry.values()


def _memory(tensor: Any) -> Any:
    """The local part of a DTensor, any other as it is."""
    return getattr(tensor, "_local_tensor", tensor)
