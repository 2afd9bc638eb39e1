"""Loader workers that leave the end of the job to the trainer.

torchrun, SLURM and a terminal signal every process of the job. A worker that dies of it leaves its rank without data in
the middle of a step, so that the ranks never come to the step at which they would all save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class outlive_signals:  # noqa: N801  # reads as what it does: worker_init_fn=outlive_signals()
    """A ``worker_init_fn`` for a DataLoader: SIGTERM, SIGINT and SIGUSR1 don't end its workers while the trainer lives.

    Workers end as always when the loader is done with them, when the trainer exits (then SIGTERM ends them again), and
    within seconds of its death. ``ResumableLoader`` does this by itself.

    torch asks a worker that is stuck when its loader is done to end by SIGTERM, which looks like everybody's: such a
    worker stays until the trainer exits, unless :meth:`let_go` came first. ``ResumableLoader`` calls it for an epoch
    that is left early; a worker that gets stuck after its last batch stays.

    Args:
        worker_init_fn: one of yours, called first.
    """

    def __init__(self, worker_init_fn: Callable[[int], Any] | None = None) -> None:
        self._inner = worker_init_fn
        self._is_over = RawValue("b", 0)
        # Before multiprocessing terminates and joins what is left of its daemons; and when the loader is gone.
        util.Finalize(self, _note, args=(self._is_over,), exitpriority=10)

    def __call__(self, worker_id: int) -> None:
        """In the worker."""
        if self._inner is not None:
            self._inner(worker_id)
        for number in _SIGNALS:
            # Not ignored: whatever the worker starts would inherit that.
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._handle)

    def let_go(self) -> None:
        """In the trainer: from now on SIGTERM ends the workers."""
        _note(self._is_over)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        trainer = multiprocessing.parent_process()
        if number == signal.SIGTERM and (self._is_over.value or trainer is None or not trainer.is_alive()):
            os._exit(0)  # as torch's workers answer their trainer's SIGTERM: no reason for its SIGCHLD handler to raise


def _note(is_over: Any) -> None:
    """From now on SIGTERM ends the workers."""
    is_over.value = 1
