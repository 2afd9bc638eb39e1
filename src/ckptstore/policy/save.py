"""When to save: small frozen rules that combine with ``|``.

    EverySteps(500) | EverySeconds(1800) | EveryEpochs(1) | AtSteps((10, 100)) | OnSignal()

A rule sees one :class:`Moment` and says why a save is due, or None. It remembers nothing: what happened before is part
of the moment. So the same moment gives the same answer on every rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from ckptstore.errors import ConfigError


@dataclass(frozen=True)
class Moment:
    """What a save policy may look at.

    Attributes:
        step: optimizer steps done.
        last_step: step of the last save of any kind; at the start of a job, the step it started from.
        previous_step: step of the previous moment, so that a step that is jumped over is not missed.
        seconds_since_save: since the last save of any kind, or the start of the job.
        is_epoch_end: an epoch has just ended.
        epochs_since_save: epochs ended since the last save made at the end of one, this one included.
        seconds_left: until the end of the allocation, where that is known.
        is_end_saved: a save was already made because the end is near.
        signal: name of a signal that has arrived.
    """

    step: int
    last_step: int = 0
    previous_step: int | None = None
    seconds_since_save: float = 0.0
    is_epoch_end: bool = False
    epochs_since_save: int = 0
    seconds_left: float = math.inf
    is_end_saved: bool = False
    signal: str | None = None


class SavePolicy(ABC):
    """A rule that says when a save is due."""

    @abstractmethod
    def due(self, moment: Moment) -> str | None:
        """Why a save is due at this moment; None if it is not."""

    def __or__(self, other: SavePolicy) -> AnyOf:
        return AnyOf((*self.rules(), *other.rules()))

    def rules(self) -> Iterator[SavePolicy]:
        """The rules this one is made of."""
        yield self

    @property
    def is_timed(self) -> bool:
        """Whether the answer depends on a clock, which ranks have to be asked about."""
        return any(isinstance(rule, (EverySeconds, BeforeEnd)) for rule in self.rules())


@dataclass(frozen=True)
class AnyOf(SavePolicy):
    """Due when any of its rules is; the first one gives the reason."""

    parts: tuple[SavePolicy, ...]

    def due(self, moment: Moment) -> str | None:
        for part in self.parts:
            if (reason := part.due(moment)) is not None:
                return reason
        return None

    def rules(self) -> Iterator[SavePolicy]:
        for part in self.parts:
            yield from part.rules()


@dataclass(frozen=True)
class Never(SavePolicy):
    """Never due: for loops that save explicitly."""

    def due(self, moment: Moment) -> str | None:
        return None


@dataclass(frozen=True)
class EverySteps(SavePolicy):
    """At least ``steps`` steps after the last save of any kind."""

    steps: int

    def __post_init__(self) -> None:
        _require(isinstance(self.steps, int) and self.steps >= 1, "EverySteps", "a whole number >= 1", self.steps)

    def due(self, moment: Moment) -> str | None:
        passed = moment.step - moment.last_step
        return f"{passed} steps since the last save" if passed >= self.steps else None


@dataclass(frozen=True)
class EverySeconds(SavePolicy):
    """At least ``seconds`` seconds after the last save of any kind."""

    seconds: float

    def __post_init__(self) -> None:
        _require(self.seconds > 0, "EverySeconds", "a number > 0", self.seconds)

    def due(self, moment: Moment) -> str | None:
        passed = moment.seconds_since_save
        return f"{passed:.0f} s since the last save" if passed >= self.seconds else None


@dataclass(frozen=True)
class EveryEpochs(SavePolicy):
    """At the end of every ``epochs``-th epoch, whatever the loss did."""

    epochs: int = 1

    def __post_init__(self) -> None:
        _require(isinstance(self.epochs, int) and self.epochs >= 1, "EveryEpochs", "a whole number >= 1", self.epochs)

    def due(self, moment: Moment) -> str | None:
        return "end of epoch" if moment.is_epoch_end and moment.epochs_since_save >= self.epochs else None


@dataclass(frozen=True)
class AtSteps(SavePolicy):
    """At these steps, or at the first step after one that was jumped over."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(sorted(self.steps)))
        _require(all(isinstance(s, int) and s >= 0 for s in self.steps), "AtSteps", "whole numbers >= 0", self.steps)

    def due(self, moment: Moment) -> str | None:
        before = moment.step - 1 if moment.previous_step is None else moment.previous_step
        for step in self.steps:
            if before < step <= moment.step and moment.last_step < step:
                return f"step {step} was asked for"
        return None


@dataclass(frozen=True)
class BeforeEnd(SavePolicy):
    """Once, when no more than ``seconds`` seconds of the allocation are left."""

    seconds: float

    def __post_init__(self) -> None:
        _require(self.seconds > 0, "BeforeEnd", "a number > 0", self.seconds)

    def due(self, moment: Moment) -> str | None:
        if moment.is_end_saved or moment.seconds_left > self.seconds:
            return None
        return f"the allocation ends in {max(0.0, moment.seconds_left):.0f} s"


@dataclass(frozen=True)
class OnSignal(SavePolicy):
    """When a signal has arrived."""

    def due(self, moment: Moment) -> str | None:
        return f"{moment.signal} arrived" if moment.signal else None


def _require(is_right: bool, name: str, wanted: str, given: object) -> None:
    if not is_right:
        raise ConfigError(f"{name} takes {wanted}, not {given!r}")
