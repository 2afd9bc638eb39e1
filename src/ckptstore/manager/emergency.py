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
from ckptstore.manager.children import ChildWatch


class OptimizerGuard:
    """Counts optimizer steps, and knows while one is under way: a state in the middle of one must not be saved.

    From the first optimizer's step until the loop says that its step is complete (:meth:`mark`), deaths of children are
    held back: what belongs to a step, such as the scheduler's, is then done as well.

    Hooks are on the optimizers between :meth:`watch` and :meth:`release`.
    """

    def __init__(self, children: ChildWatch) -> None:
        self._children = children
        self._is_holding = False
        self._counts: dict[int, int] = {}
        self._per_mark = 0
        self._depth: dict[int, int] = {}
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
        self._let_go()

    def mark(self) -> None:
        """A step of the training loop is complete."""
        if self._counts:
            if per := min(self._counts.values()):  # 0: marked twice, or a scaler passed over the step
                self._per_mark = per
            self._counts = dict.fromkeys(self._counts, 0)
        self._depth.clear()
        self._let_go()

    def completed(self) -> int | None:
        """Whole steps since the last mark; None if the state is torn in the middle of one."""
        if any(self._depth.values()):
            return None
        counts = self._counts.values()
        if counts and not all(counts) and any(counts):
            return None  # some optimizers have stepped, others have not
        return min(counts, default=0)

    def reached(self, step: int, previous: int | None, completed: int) -> int:
        """The loop's own number for the step it is at, ``completed`` optimizer steps after ``step``."""
        if previous is None or not self._per_mark:
            return step + completed
        return step + completed * (step - previous) // self._per_mark

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._is_holding:
            self._children.hold()
            self._is_holding = True
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Where a class calls its parent's step, torch runs the hooks of both.
        depth = self._depth[id(optimizer)] = max(0, self._depth.get(id(optimizer), 0) - 1)
        if depth == 0 and id(optimizer) in self._counts:
            self._counts[id(optimizer)] += 1

    def _let_go(self) -> None:
        if self._is_holding:
            self._is_holding = False
            self._children.release()


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
