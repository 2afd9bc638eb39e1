"""Optimizer state by parameter name, read without a step, a hook or a new entry in ``optimizer.state``.

The shape is the one DCP's ``get_optimizer_state_dict`` gives::

    {"state": {fqn: {"step": ..., "exp_avg": ...}}, "param_groups": [{"lr": ..., "params": [fqn, ...]}]}

Parameters are matched by identity over all modules of the state. A parameter that belongs to none of them is called
``param_groups.<group>.params.<index>``. When one optimizer works on several modules whose names collide, all its names
carry the module's key in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

_STATE_DICT = Optimizer.state_dict
#: Positional companions of ``params``: they follow the parameters, not the hyperparameters.
POSITIONAL = frozenset({"params", "param_names"})


@dataclass(frozen=True)
class Owner:
    """Where a parameter is registered: dotted key of its module in the state, and its fqn there."""

    module_key: str
    fqn: str

    @property
    def full(self) -> str:
        return f"{self.module_key}.{self.fqn}" if self.module_key else self.fqn


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside a thin wrapper such as Accelerate's."""
    while type(optimizer).state_dict is not _STATE_DICT:
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def has_own_state_dict(optimizer: Optimizer) -> bool:
    """Whether the class defines its own ``state_dict``: then only that knows what its state is."""
    return type(optimizer).state_dict is not _STATE_DICT


def parameter_names(optimizer: Optimizer, owners: Mapping[int, Owner]) -> dict[int, str]:
    """id of each parameter of the optimizer -> its name there, in ``param_groups`` order."""
    found = [
        (parameter, owners.get(id(parameter)), group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    ]
    fqns = [owner.fqn for _, owner, _, _ in found if owner is not None]
    ambiguous = len(set(fqns)) != len(fqns)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for parameter, owner, group_index, index in found:
        name = "" if owner is None else owner.full if ambiguous else owner.fqn
        if owner is None or name in taken:  # modules at "a.b" and at "a", "b" are called the same
            name = f"param_groups.{group_index}.params.{index}"
        names[id(parameter)] = name
        taken.add(name)
    return names


def read(optimizer: Optimizer, names: Mapping[int, str]) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """(state by name, param groups by name). The values are the live ones; empty entries are left out."""
    state: dict[Any, Any] = {}
    live = optimizer.state
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = live.get(parameter)
            if entry:
                state[names[id(parameter)]] = entry
    if len(state) < len(live):
        state.update({key: value for key, value in live.items() if not isinstance(key, torch.Tensor)})
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return state, groups
