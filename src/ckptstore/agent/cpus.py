"""How much of the node's CPUs the agent may use. Training comes first."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache


@cache
def _allowed() -> tuple[int, ...]:
    """The CPUs this process was started with."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def keep_to(count: int | None) -> None:
    """Run on at most ``count`` CPUs from now on, the last of those allowed; None: on all of them.

    Where the system can't, nothing changes.
    """
    chosen = _allowed()[-count:] if count is not None else _allowed()
    if not chosen:
        return
    with suppress(OSError):
        os.sched_setaffinity(0, chosen)  # threads to come take it from the one that starts them
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), chosen)
