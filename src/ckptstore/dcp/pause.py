"""No garbage collection while training waits: a full collection looks at everything that torch has made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Leave cycles alone for the time being; they are few, and found afterwards.

    Saves and loads make many short-lived objects, so they would set off collections all along. Each one stops every
    thread, for 0.1 s where there is a large model: a sixth of a load's CPU time was that. Process-wide; of several at a
    time the first to end lets collections happen again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
