"""Before an exception ends the job: which step it is at, and that every wait has time left."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from ckptstore.manager import ending
from ckptstore.manager.children import ChildWatch
from ckptstore.manager.emergency import OptimizerGuard
from ckptstore.manager.parts import Parts


class NoChildren:
    def hold(self) -> None: ...
    def release(self) -> None: ...


def test_the_stride_of_the_loop_is_known_when_a_mark_had_no_optimizer_step() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    guard = OptimizerGuard(cast(ChildWatch, NoChildren()))
    guard.watch([optimizer])
    optimizer.step()
    guard.mark()  # step(24)
    guard.mark()  # and a save at once, or a step that a scaler passed over
    optimizer.step()
    assert guard.reached(24, 16, guard.completed() or 0) == 32


class Handle:
    remotes = ()

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, level: str, timeout_s: float) -> None:
        self.waits.append(timeout_s)


def test_a_save_after_an_exception_has_time_left_when_others_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now, meetings = [0.0], []

    def meet(agreement: Any, step: int, timeout_s: float) -> bool:
        meetings.append(timeout_s)
        now[0] += timeout_s
        return True

    monkeypatch.setattr(ending, "all_are_here", meet)
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    before, after = Handle(), Handle()
    progress = SimpleNamespace(step=7, previous_step=6, epoch=None, handle=before, is_saved=lambda step: False)
    parts = SimpleNamespace(
        progress=progress,
        voice=SimpleNamespace(say=lambda *_: None),
        tracked=True,
        guard=SimpleNamespace(completed=lambda: 0, reached=lambda *_: 7),
        store=SimpleNamespace(agreement=None, config=SimpleNamespace(deadline_s=30.0)),
        safety=SimpleNamespace(sentence=lambda: "safe"),
    )
    saver: Any = SimpleNamespace(save=lambda occasion: setattr(progress, "handle", after))
    ending.rescue(cast(Parts, parts), saver, ValueError(), grace_s=20.0)
    assert (before.waits, meetings, after.waits) == ([5.0], [10.0], [20.0])
