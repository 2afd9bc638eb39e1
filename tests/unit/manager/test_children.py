"""Deaths of children are told where the state is whole, and nowhere else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore.manager.children import ChildWatch
from ckptstore.manager.emergency import OptimizerGuard


class Loader:
    """Handles SIGCHLD as torch's DataLoader does, with whatever handler was there before."""

    def __init__(self) -> None:
        self.told = 0
        previous = signal.getsignal(signal.SIGCHLD)

        def handler(number: int, frame: Any) -> None:
            self.told += 1
            if callable(previous):
                previous(number, frame)
            raise RuntimeError("DataLoader worker exited unexpectedly")

        self.handler: Callable[..., Any] = handler
        signal.signal(signal.SIGCHLD, handler)


def child_dies() -> None:
    os.kill(os.getpid(), signal.SIGCHLD)


@pytest.fixture
def watch() -> Iterator[ChildWatch]:
    before = signal.getsignal(signal.SIGCHLD)
    watch = ChildWatch()
    watch.begin()
    yield watch
    watch.close()
    signal.signal(signal.SIGCHLD, before)


def test_a_death_is_told_when_the_hold_is_over(watch: ChildWatch) -> None:
    loader = Loader()
    done = []
    watch.hold()
    with watch:
        child_dies()
        child_dies()
    done.append("inner")
    child_dies()
    done.append("outer")
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        watch.release()
    assert done == ["inner", "outer"]
    assert loader.told == 1
    with pytest.raises(RuntimeError):
        child_dies()


def test_an_error_under_a_hold_is_not_replaced(watch: ChildWatch) -> None:
    loader = Loader()
    with pytest.raises(KeyError), watch:  # noqa: PT012  # the death comes first
        child_dies()
        raise KeyError
    assert loader.told == 0


def test_nothing_is_told_any_more_when_the_job_is_ending(watch: ChildWatch) -> None:
    loader = Loader()
    with watch:
        pass
    watch.end()
    child_dies()
    with watch:
        child_dies()
    assert loader.told == 0


def test_a_handler_that_is_put_over_ours_is_held_back_too(watch: ChildWatch) -> None:
    first = Loader()
    with watch:
        pass
    second = Loader()
    watch.hold()
    child_dies()
    assert second.told == 0
    with pytest.raises(RuntimeError):
        watch.release()
    assert (first.told, second.told) == (1, 1)


def test_nothing_is_told_at_the_first_instruction_of_an_ending(watch: ChildWatch) -> None:
    loader = Loader()

    def leave() -> None:
        child_dies()  # as late as the function's own hold can't be earlier

    watch.shelter(leave)
    with watch:
        pass
    leave()
    assert loader.told == 0
    with pytest.raises(RuntimeError):
        child_dies()


def test_the_handler_is_given_back(watch: ChildWatch) -> None:
    loader = Loader()
    with watch:
        assert signal.getsignal(signal.SIGCHLD) is not loader.handler
    watch.close()
    assert signal.getsignal(signal.SIGCHLD) is loader.handler


def test_nothing_is_installed_when_nobody_handles_deaths(watch: ChildWatch) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with watch:
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_a_step_is_finished_before_a_death_is_told(watch: ChildWatch) -> None:
    """The scheduler's part, and whatever else the loop does before it says that the step is complete, included."""

    class Dying(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            child_dies()
            super().step(closure)

    Loader()
    guard = OptimizerGuard(watch)
    model = nn.Linear(2, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)  # from now on torch runs the hooks of Dying.step and of SGD.step
    optimizer = Dying(model.parameters(), lr=0.1)
    guard.watch([optimizer])
    optimizer.step()
    child_dies()
    assert guard.completed() == 1
    with pytest.raises(RuntimeError):
        guard.mark()
    assert guard.completed() == 0
    guard.release()


def test_the_loops_own_number_is_found_for_steps_it_has_not_told(watch: ChildWatch) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = OptimizerGuard(watch)
    guard.watch([optimizer])

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.step()

    steps(3)
    assert guard.reached(10, None, guard.completed() or 0) == 13, "nothing is known of the loop's way of counting"
    guard.mark()
    steps(1)
    guard.mark()
    steps(1)
    assert guard.reached(32, 24, guard.completed() or 0) == 40, "it counts samples, eight a step"
    guard.mark()
    steps(8)
    guard.mark()
    steps(3)
    assert guard.reached(16, 8, guard.completed() or 0) == 19, "it tells every eighth step"
    guard.release()
