"""Decisions: when to save, what to keep, whether there is room.

Owns: frozen values and pure functions over plain facts. Must not know: files, buckets, clocks, processes, torch.
"""

from ckptstore.policy.retention import Decision, Retention
from ckptstore.policy.save import (
    AnyOf,
    AtSteps,
    BeforeEnd,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    Moment,
    Never,
    OnSignal,
    SavePolicy,
)
from ckptstore.policy.space import Forecast, forecast

__all__ = [
    "AnyOf",
    "AtSteps",
    "BeforeEnd",
    "Decision",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "Forecast",
    "Moment",
    "Never",
    "OnSignal",
    "Retention",
    "SavePolicy",
    "forecast",
]
