"""Whether the state may be saved after an exception: it must be whole, and all ranks must be at the same place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.optimizers import unwrapped


class OptimizerGuard:
    """Counts optimizer steps, and knows while one is under way: a state in the middle of one must not be saved.

    Hooks are on the optimizers between :meth:`watch` and :meth:`release`.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._inside: set[int] = set()
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Count these from now on."""
        for optimizer in map(unwrapped, optimizers):
            if id(optimizer) in self._counts:
                continue
            with suppress(AttributeError):  # wrappers that never ran torch's __init__ take no hooks
                self._handles.append(optimizer.register_step_pre_hook(self._before))
                self._handles.append(optimizer.register_step_post_hook(self._after))
                self._counts[id(optimizer)] = 0

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._counts.clear()

    def mark(self) -> None:
        """A step of the training loop is complete."""
        if self._counts:
            self._counts = dict.fromkeys(self._counts, 0)

    def completed(self) -> int | None:
        """Whole steps since the last mark: 0 or 1; None if the state is torn in the middle of one."""
        if self._inside:
            return None
        done = {count > 0 for count in self._counts.values()}
        if len(done) > 1:
            return None  # some optimizers have stepped, others have not
        return int(True in done)

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._inside.add(id(optimizer))

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._inside.discard(id(optimizer))
        if id(optimizer) in self._counts:
            self._counts[id(optimizer)] += 1


def all_are_here(agreement: Agreement, step: int, timeout_s: float) -> bool:
    """Whether every rank comes here, having the same step, within ``timeout_s``. Local: no collective is used.

    Each rank leaves a word in the job's store and looks for those of the others, so a rank that never comes (it waits
    in a collective for us, or is dead) costs the others nothing but this time.
    """
    if agreement.world_size == 1:
        return True
    word = f"{step}/{agreement.calls}"
    found: list[bool] = []

    def meet() -> None:
        store = agreement.job_store()
        prefix = "ckptstore/emergency"
        keys = [f"{prefix}/{rank}" for rank in range(agreement.world_size)]
        store.set(keys[agreement.rank], word)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if store.check(keys):
                found.append(all(store.get(key).decode() == word for key in keys))
                return
            time.sleep(0.05)

    def quietly() -> None:
        with suppress(Exception):  # the store goes with its host: then nobody meets
            meet()

    thread = threading.Thread(target=quietly, name="ckptstore-meet", daemon=True)
    thread.start()
    thread.join(timeout_s + 1.0)
    return found == [True]
