"""Loading into an optimizer: by parameter name, in place, without a step.

State tensors the optimizer doesn't have yet are allocated like the parameter they belong to (sharded alike) and
attached once they are filled; those it has keep their memory. A parameter that had no state when the checkpoint was
saved has none afterwards. Hyperparameters go to whichever group now holds the parameters of a stored group, so groups
may be reordered or split.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ckptstore.dcp import composites, fsdp1, modules, optimizers
from ckptstore.dcp.boxes import Box, dtype_of
from ckptstore.dcp.geometry import boxes_of_run
from ckptstore.dcp.stored import MISSING, Stub
from ckptstore.format import tree

if TYPE_CHECKING:
    from ckptstore.dcp.target import Matcher

Path = tuple[Any, ...]

#: Options of groups that learning rate schedulers put there.
_OF_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "min_momentum", "swa_lr"}
)


def match_optimizer(matcher: Matcher, path: Path, optimizer: Optimizer, stored: Any) -> None:
    """Match an optimizer with what is stored under its key."""
    optimizer = optimizers.unwrapped(optimizer)
    if optimizers.has_own_state_dict(optimizer):
        matcher.fill_stateful(path, optimizer, stored)
        return
    key = ".".join(map(str, path))
    groups = stored.get("param_groups") if isinstance(stored, Mapping) else None
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        matcher.mismatch(key, "what is stored is not an optimizer's state")
        return
    sharded = matcher.walk.fsdp1_of(optimizer)
    runs = fsdp1.local_runs(sharded) if sharded is not None else {}
    if sharded is not None and runs is None:
        _match_fsdp1(matcher, key, sharded, optimizer, stored, groups)
        return
    match = _Match(matcher, key, optimizer, stored, groups, runs or {})
    match.kind()
    match.states()
    match.groups()


def _match_fsdp1(
    matcher: Matcher,
    key: str,
    module: nn.Module,
    optimizer: Optimizer,
    stored: Mapping[str, Any],
    groups: list[dict[str, Any]],
) -> None:
    if not matcher.wants(key, key + ".*"):
        return
    mine = {name for group in fsdp1.optimizer_state(module, optimizer)["param_groups"] for name in group["params"]}
    theirs = {name for group in groups for name in group["params"]}
    for name in sorted(mine - theirs):
        matcher.note_missing(f"{key}.state.{name}")
    for name in sorted(theirs - mine, key=str):
        matcher.unexpected(f"{key}.state.{name}")
    if mine == theirs:
        state = matcher.read_into_new(key, dict(stored))
        matcher.found.actions.append((key, partial(fsdp1.load_optimizer_state, module, optimizer, state)))


class _Match:
    def __init__(
        self,
        matcher: Matcher,
        key: str,
        optimizer: Optimizer,
        stored: Mapping[str, Any],
        groups: list[dict[str, Any]],
        runs: Mapping[int, fsdp1.Run],
    ) -> None:
        self._m = matcher
        self._runs = runs
        self._key = key
        self._optimizer = optimizer
        self._state: dict[Any, Any] = dict(stored.get("state") or {})
        self._groups = groups
        owners = matcher.walk.owners
        self._names = optimizers.parameter_names(optimizer, owners)
        self._stored_names = _Names([name for group in groups for name in group["params"]], matcher.renamed)
        #: id of the target's parameter -> its stored name
        self._stored_as: dict[int, Any] = {}
        position = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found = self._stored_names.find(self._names[id(parameter)], owners.get(id(parameter)), position)
                if found is not MISSING:
                    self._stored_as[id(parameter)] = found
                position += 1

    def kind(self) -> None:
        """Warn where the stored state is another kind of optimizer's: loaded as torch does, it may be of no use."""
        stored = {option for group in self._groups for option in _hyperparameters(group)}
        has = {option for group in self._optimizer.param_groups for option in group} | self._optimizer.defaults.keys()
        theirs, mine = sorted(stored - has - _OF_SCHEDULERS), sorted(self._optimizer.defaults.keys() - stored)
        # Only both together tell of another kind: newer versions of torch have options that older ones lacked.
        if theirs and mine and self._m.wants(self._key, f"{self._key}.*"):
            entries = [entry for entry in self._state.values() if isinstance(entry, dict)]
            fields = sorted({str(field) for entry in entries for field in entry})
            this = f"{self._key!r} is of class {type(self._optimizer).__name__}"
            self._m.found.warnings.append(
                f"{this}, what is stored is another kind of optimizer's: "
                f"state {', '.join(fields) or 'none'}; options {', '.join(theirs)} instead of {', '.join(mine)}"
            )

    def states(self) -> None:
        """The moments of every parameter."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names[id(parameter)]
                if id(parameter) not in self._stored_as:
                    self._m.note_missing(f"{self._key}.state.{name}")
                    if id(parameter) not in self._m.walk.owners:
                        self._m.found.hints.append(
                            f"pass the model along with {self._key!r}: parameters have their names from it"
                        )
                    continue
                self._one(parameter, group, name, self._state.pop(self._stored_as[id(parameter)], None))
        names, state = set(self._stored_names.all), self._optimizer.state
        for left, entry in self._state.items():
            if left in names:
                self._m.unexpected(f"{self._key}.state.{left}")
            else:  # an optimizer's own bookkeeping
                self._m.put(f"{self._key}.state.{left}", entry, partial(state.__setitem__, left))

    def _one(self, parameter: torch.Tensor, group: dict[str, Any], name: str, entry: Any) -> None:
        key = f"{self._key}.state.{name}"
        state = self._optimizer.state
        live = state.get(parameter) or {}
        run = self._runs.get(id(parameter))
        if run is not None and not run.numel:
            return  # FSDP1 keeps nothing where it has no element
        if not isinstance(entry, dict) or not entry:
            if live and self._m.wants(key, key + ".*"):
                self._m.found.actions.append((key, lambda: state.pop(parameter, None)))
            return
        pending: dict[Any, Any] = {}
        for field, stored in entry.items():
            new = self._field(f"{key}.{field}", parameter, group, field, live.get(field), stored)
            if new is not MISSING:
                pending[field] = new
        for field in live:
            if field not in entry:
                self._m.note_missing(f"{key}.{field}")
        if pending:
            self._m.found.actions.append((key, partial(self._attach, parameter, pending)))

    def _attach(self, parameter: torch.Tensor, pending: dict[Any, Any]) -> None:
        pending = {field: self._m.late(value) for field, value in pending.items()}
        for field, value in pending.items():
            if isinstance(value, torch.Tensor) and composites.is_composite(value):
                pending[field] = value.to(parameter.device)
        self._optimizer.state[parameter].update(pending)

    def _field(
        self, key: str, parameter: torch.Tensor, group: dict[str, Any], field: Any, current: Any, stored: Any
    ) -> Any:
        """Match one field; returns what must be put into the entry, MISSING if it is filled in place."""
        m = self._m
        run = self._runs.get(id(parameter))
        if run is not None and isinstance(stored, Stub) and m.source.tensors[stored.name].shape == run.shape:
            return self._run(key, parameter, run, current, stored)
        if isinstance(stored, Stub):
            if isinstance(current, torch.Tensor):
                m.slot(key, current, stored)
                return MISSING
            flags = {**group, **self._group_of(parameter)}
            meta = m.source.tensors[stored.name]
            new = _like(parameter, flags, str(field), meta.shape, dtype_of(meta.dtype))
            return new if m.slot(key, new, stored) else MISSING
        if isinstance(stored, tree.Composite):
            if isinstance(current, torch.Tensor):
                entry = self._optimizer.state[parameter]
                m.fill_tensor(key, current, stored, lambda new: entry.__setitem__(field, new.to(current.device)))
                return MISSING
            return m.read_into_new(key, stored)
        if not m.wants(key):
            return MISSING
        if field == "step" and isinstance(current, torch.Tensor) and isinstance(stored, (int, float)):
            # Counters were plain numbers once; a captured one has to stay the tensor it is.
            m.found.actions.append((key, lambda: _fill(current, stored)))
            return MISSING
        return m.read_into_new(key, stored)

    def _run(self, key: str, parameter: torch.Tensor, run: fsdp1.Run, current: Any, stored: Stub) -> Any:
        """As :meth:`_field`, for a field shaped like a parameter that FSDP1 cut: its run is filled box by box."""
        m = self._m
        if not m.wants(key, stored.name):
            return MISSING
        meta = m.source.tensors[stored.name]
        is_new = not isinstance(current, torch.Tensor)
        local = torch.empty_like(parameter.detach(), dtype=dtype_of(meta.dtype)) if is_new else current
        if tuple(local.shape) != (run.numel,):
            m.mismatch(key, f"FSDP1 has {run.numel} elements here, the target {list(local.shape)}; reshard it first")
            return MISSING
        at = 0
        for offsets, shape in boxes_of_run(run.shape, run.start, run.numel):
            part = local[at : at + prod(shape)].view(shape)
            at += prod(shape)
            if not m.slot_box(key, Box(part, meta.shape, offsets, shape), stored):
                return MISSING
        return local if is_new else MISSING

    def _group_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._groups[self._stored_names.group(self._stored_as[id(parameter)], self._groups)]

    def groups(self) -> None:
        """Hyperparameters, from the stored group of each group's parameters."""
        for number, group in enumerate(self._optimizer.param_groups):
            names = [self._stored_as[id(p)] for p in group["params"] if id(p) in self._stored_as]
            sources = sorted({self._stored_names.group(name, self._groups) for name in names})
            if not sources:
                if not group["params"] and number < len(self._groups) and not self._groups[number]["params"]:
                    sources = [number]
                else:
                    continue
            first = _hyperparameters(self._groups[sources[0]])
            key = f"{self._key}.param_groups.{number}"
            if any(_hyperparameters(self._groups[other]) != first for other in sources[1:]):
                self._m.mismatch(key, f"its parameters are in stored groups {sources}, whose hyperparameters differ")
                continue
            for option, stored in first.items():
                self._option(f"{key}.{option}", group, option, stored)

    def _option(self, key: str, group: dict[str, Any], option: str, stored: Any) -> None:
        current = group.get(option)
        if isinstance(current, torch.Tensor):
            if isinstance(stored, Stub):
                self._m.slot(key, current, stored)
                return
            if isinstance(stored, (int, float)) and self._m.wants(key):
                self._m.found.actions.append((key, lambda: _fill(current, stored)))
                return
        self._m.put(key, stored, lambda value: group.__setitem__(option, value))


class _Names:
    """Finds the stored name of a parameter: by name, by position, or through a rename."""

    def __init__(self, names: list[Any], renamed: Mapping[str, str]) -> None:
        self.all = names
        self._known = set(names)
        self._by_position = bool(names) and all(type(name) is int for name in names)
        self._bare: dict[str, Any] = {modules.strip_wrappers(str(name)): name for name in names}
        self._renamed_from = {new: old for old, new in renamed.items()}
        self._groups: dict[Any, int] | None = None

    def find(self, name: str, owner: optimizers.Owner | None, position: int) -> Any:
        """The stored name, or MISSING."""
        if self._by_position:
            return self.all[position] if position < len(self.all) else MISSING
        candidates = [name]
        if owner is not None:
            candidates += [owner.fqn, owner.full]
            old = self._renamed_from.get(owner.full)
            while old:
                candidates.append(old)
                old = old.partition(".")[2]
        for candidate in candidates:
            if candidate in self._known:
                return candidate
            bare = modules.strip_wrappers(candidate)
            if bare in self._bare:
                return self._bare[bare]
        return MISSING

    def group(self, name: Any, groups: list[dict[str, Any]]) -> int:
        """Number of the stored group that holds ``name``."""
        if self._groups is None:
            self._groups = {each: i for i, group in enumerate(groups) for each in group["params"]}
        return self._groups[name]


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in group.items() if option not in optimizers.POSITIONAL}


def _like(
    parameter: torch.Tensor, flags: Mapping[str, Any], field: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """New memory for a state tensor, where torch would have put it."""
    parameter = parameter.detach()
    if shape == tuple(parameter.shape) and not (field == "step" and shape == ()):
        return torch.empty_like(parameter, dtype=dtype)
    on_device = shape != () or flags.get("capturable") or flags.get("fused")
    return torch.empty(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _fill(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.fill_(value)
