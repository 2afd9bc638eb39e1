"""Matching a target with a checkpoint: what goes where, before a byte moves.

A :class:`Matcher` walks the target next to the stored tree and writes down *slots* (memory to be filled with a stored
tensor) and *actions* (values to be put into containers, states to be handed back). Whatever doesn't fit is collected,
so one error can list all of it. Until :meth:`Matcher.finish` nothing in the target has changed but slot memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckptstore.dcp import composites, modules
from ckptstore.dcp.boxes import Box, box_of, check_memory, dtype_name
from ckptstore.dcp.composite_target import described, match_composite
from ckptstore.dcp.containers import Flat, Replace, in_place, replace_tuple, replacer
from ckptstore.dcp.markers import PerRank, Trainable
from ckptstore.dcp.optimizer_target import match_optimizer
from ckptstore.dcp.parts import Slot
from ckptstore.dcp.source import ChunkSource
from ckptstore.dcp.stored import MISSING, StoredState, Stub, dotted, flatten, look_up, substitute
from ckptstore.dcp.views import NewMemory
from ckptstore.dcp.walk import Walk, is_stateful
from ckptstore.errors import FormatError, StateError
from ckptstore.format import tree

Path = tuple[Any, ...]
_FILLABLE = (torch.Tensor, nn.Module, Optimizer, Trainable, PerRank)


@dataclass
class Matched:
    """What matching found."""

    slots: list[Slot] = field(default_factory=list)
    actions: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    cast: dict[str, tuple[str, str]] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Matcher:
    """Matches one target; not reusable.

    Args:
        state: the target.
        source: the checkpoint.
        only: globs of dotted names, target's or stored; nothing else is loaded. Empty: everything.
    """

    def __init__(
        self,
        state: Mapping[Any, Any],
        source: ChunkSource,
        *,
        rank: int = 0,
        only: Iterable[str] = (),
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> None:
        self.source = source
        self.strict = strict
        self.walk = Walk(rank, state, {})
        self.found = Matched()
        self._state = state
        self._only = (only,) if isinstance(only, str) else tuple(only)
        self._matched_any = False
        self._new: dict[str, torch.Tensor] = {}
        self._memory = NewMemory(source)
        keys = frozenset(state) | frozenset(map(str, state))
        self._stored = StoredState(source, rank=rank, keys=keys, rename=rename, allocate=self._allocate_hidden)
        self.renamed = self._stored.renamed

    def match(self) -> Matched:
        """Walk everything the target names."""
        for key in list(self._state):
            stored = self._stored.values
            value = stored[key] if key in stored else stored.get(str(key), MISSING)
            self.fill((key,), self._state[key], value, replacer(self._state, key))
        if self._stored.checks:
            self.found.actions.insert(0, ("the state", self._check))
        if self._only and not self._matched_any:
            self.found.mismatched.append(f"only={list(self._only)} matches nothing in this checkpoint and target")
        return self.found

    def _check(self) -> None:
        for check in self._stored.checks:
            check()

    def check_at_last(self, check: Callable[[], None]) -> None:
        """Call ``check`` when everything is filled, before anything is put in its place."""
        self._stored.checks.append(check)

    def _allocate_hidden(self, key: Any, name: str) -> object:
        # The object they are in may be what was asked for.
        wanted = self.wants(str(key), name) or any(fnmatchcase(name, f"{glob}.*") for glob in self._only)
        return self._allocate(str(key), name) if wanted else Stub(name)

    def wants(self, *names: str) -> bool:
        """Whether ``only`` lets one of these through."""
        if not self._only:
            return True
        wanted = any(fnmatchcase(name, glob) for name in names for glob in self._only)
        self._matched_any |= wanted
        return wanted

    # -- one value ----------------------------------------------------------------------------------------------------

    def fill(self, path: Path, target: Any, stored: Any, replace: Replace) -> None:
        """Match one value of the target with what is stored there."""
        key = dotted(path)
        if isinstance(target, PerRank):
            self.fill(path, target.value, stored, lambda value: setattr(target, "value", value))
        elif stored is MISSING:
            self.miss(path, target)
        elif isinstance(target, torch.Tensor):
            self.fill_tensor(key, target, stored, replace)
        elif isinstance(target, nn.Module):
            self._fill_module(path, target, stored, trainable_only=False)
        elif isinstance(target, Trainable):
            self._fill_module(path, target.module, stored, trainable_only=True)
        elif isinstance(target, Optimizer):
            match_optimizer(self, path, target, stored)
        elif isinstance(target, Mapping):
            self._fill_mapping(path, target, stored, replace)
        elif is_stateful(target):
            self.fill_stateful(path, target, stored)
        elif isinstance(target, (list, tuple)) and has_fillable(target):
            self._fill_sequence(path, target, stored, replace)
        else:
            self.put(key, stored, in_place(target, replace))

    def slot(self, key: str, tensor: torch.Tensor, stub: Stub) -> bool:
        """Fill ``tensor`` with a stored one if shapes and dtypes agree. Returns whether it will be."""
        if not self.wants(key, stub.name):
            return False
        meta = self.source.tensors[stub.name]
        try:
            box = box_of(key, tensor.detach() if type(tensor) is nn.Parameter else tensor)
            check_memory(key, box.local)
        except StateError as error:
            self.found.mismatched.append(f"{key}: {error.message}")
            return False
        if box.global_shape != meta.shape:
            self.found.mismatched.append(
                f"{key}: stored shape {list(meta.shape)}, target shape {list(box.global_shape)}"
            )
            return False
        return self.slot_box(key, box, stub)

    def slot_box(self, key: str, box: Box, stub: Stub) -> bool:
        """Fill a box of memory with a stored tensor of its global shape, if the dtypes agree."""
        meta = self.source.tensors[stub.name]
        dtype = dtype_name(box.local.dtype)
        if dtype != meta.dtype:
            if self.strict:
                self.found.mismatched.append(f"{key}: stored as {meta.dtype}, target is {dtype}")
                return False
            self.found.cast[key] = (meta.dtype, dtype)
        self.found.slots.append(Slot(key, stub.name, box))
        return True

    def put(self, key: str, stored: Any, replace: Replace) -> None:
        """Put a stored value in place once all is read, tensors in it included."""
        if not isinstance(stored, Stub) and not self.wants(key):
            return
        value = self.read_into_new(key, stored)
        if value is not MISSING:
            self.found.actions.append((key, lambda: replace(self.late(value))))

    def late(self, value: Any) -> Any:
        """The value itself, with objects in it that hold tensors made of the filled ones. For actions."""
        return self._stored.late(value)

    def read_into_new(self, key: str, stored: Any, allowed: type | None = None) -> Any:
        """``stored`` with new CPU tensors for its stubs; MISSING if it is a tensor nobody wants.

        Args:
            allowed: a tensor class that may be rebuilt because the target has one.
        """

        def allocate(stub: Stub) -> Any:
            return self._allocate(key, stub.name) if self.wants(key, stub.name) else MISSING

        def compose(whole: tree.Composite | tree.Opaque) -> Any:
            if isinstance(whole, tree.Composite):
                return self._stored.put_together(key, whole, allowed)
            if self._stored.is_late(whole) or not self.wants(key):
                return whole
            raise FormatError(
                f"{key!r} holds a {whole.name}, which this process doesn't know",
                hint="import the module that defines or registers it",
                key=key,
            )

        return substitute(stored, allocate, compose)

    def _allocate(self, key: str, name: str) -> torch.Tensor:
        if name in self._new:  # tied when it was saved, and so again
            return self._new[name]
        meta = self.source.tensors[name]
        new = self._new[name] = self._memory.tensor(name)
        self.found.slots.append(Slot(key, name, Box(new, meta.shape, (0,) * len(meta.shape), meta.shape)))
        return new

    def miss(self, path: Path, target: Any) -> None:
        """The checkpoint has nothing for this."""
        if isinstance(target, nn.Module):
            for fqn, _, _ in modules.walk(target).tensors:
                self.note_missing(dotted((*path, fqn)))
        elif isinstance(target, Mapping) and target:
            for key, below in target.items():
                self.miss((*path, key), below)
        else:
            self.note_missing(dotted(path))

    def note_missing(self, key: str) -> None:
        """The checkpoint has nothing under this name."""
        if self.wants(key):
            self.found.missing.append(key)

    def unexpected(self, key: str) -> None:
        """The target has nothing for this."""
        if self.wants(key):
            self.found.unexpected.append(key)

    # -- kinds --------------------------------------------------------------------------------------------------------

    def fill_tensor(self, key: str, target: torch.Tensor, stored: Any, replace: Replace) -> None:
        """Fill a tensor in place, or ``replace`` it where that can't be."""
        if isinstance(stored, tree.Composite):
            match_composite(self, key, target, stored, replace)
        elif isinstance(stored, tree.Opaque):
            self.put(key, stored, replace)
        elif not isinstance(stored, Stub):
            self.mismatch(key, f"stored is a {type(stored).__name__}, the target is a tensor")
        elif composites.is_composite(target):
            self.mismatch(key, f"stored is a plain tensor, the target is {described(target)}")
        elif (
            target.layout is torch.strided
            and not target.is_contiguous()
            and torch._debug_has_internal_overlap(target) == 1
        ):
            self.put(key, stored, replace)  # an expanded tensor can't be written to
        else:
            self.slot(key, target, stored)

    def mismatch(self, key: str, problem: str) -> None:
        """Note a structural difference that no leniency makes fit."""
        if self.wants(key):
            self.found.mismatched.append(f"{key}: {problem}")

    def _fill_module(self, path: Path, module: nn.Module, stored: Any, *, trainable_only: bool) -> None:
        if not isinstance(stored, Mapping):
            self.mismatch(dotted(path), f"stored is a {type(stored).__name__}, the target is a module")
            return
        entries = self.walk.entries_of(module)
        flat = Flat(flatten(stored))
        skipped: set[str] = set()
        if trainable_only:
            skipped = {fqn for fqn, t, kind in entries.tensors if kind == "param" and not t.requires_grad}
        if entries.slow is not None:
            state = modules.state_dict_of(module)
            for fqn in list(state):
                if fqn not in skipped and not self._fill_flat(path, fqn, state[fqn], flat, replacer(state, fqn)):
                    self.note_missing(dotted((*path, fqn)))
            self.found.actions.append((dotted(path), lambda: modules.load_state_dict_into(module, state)))
        else:
            absent = [
                (fqn, id(tensor))
                for fqn, tensor, _ in entries.tensors
                if fqn not in skipped and not self._fill_flat(path, fqn, tensor, flat, None)
            ]
            missing = {fqn for fqn, _ in absent}
            filled = {id(tensor) for fqn, tensor, _ in entries.tensors if fqn not in missing}
            for fqn, identity in absent:
                if identity not in filled:  # a tied name may come under its other name
                    self.note_missing(dotted((*path, fqn)))
            for fqn, owner in entries.extra.items():
                if not self._fill_flat(path, fqn, None, flat, owner.set_extra_state):
                    self.note_missing(dotted((*path, fqn)))
        for name in skipped:
            flat.take(name)
        for name in flat.left():
            self.unexpected(dotted((*path, name)))

    def _fill_flat(self, path: Path, fqn: str, target: Any, flat: Flat, replace: Replace | None) -> bool:
        """Fill one entry of a module; False if nothing is stored for it."""
        key = dotted((*path, fqn))
        stored = flat.take(fqn)
        if stored is MISSING:
            return False
        if isinstance(target, torch.Tensor):
            self.fill_tensor(key, target, stored, replace or partial(composites.overwrite, target))
        elif replace is not None:
            self.put(key, stored, replace)
        return True

    def _fill_mapping(self, path: Path, target: Mapping[Any, Any], stored: Any, replace: Replace) -> None:
        key = dotted(path)
        if not isinstance(stored, Mapping):
            self.put(key, stored, replace) if not has_fillable(target) else self.mismatch(
                key, f"stored is a {type(stored).__name__}, the target is a mapping"
            )
            return
        if not target or (not isinstance(target, MutableMapping) and not has_fillable(target)):
            self.put(key, stored, in_place(target, replace))
            return
        used: set[Any] = set()
        for name in list(target):
            below, came_from = look_up(stored, name)
            used.update(came_from)
            self.fill((*path, name), target[name], below, replacer(target, name))
        for name in stored:
            if name not in used:
                self.unexpected(dotted((*path, name)))

    def _fill_sequence(self, path: Path, target: Any, stored: Any, replace: Replace) -> None:
        if not isinstance(stored, (list, tuple)):
            self.mismatch(dotted(path), f"stored is a {type(stored).__name__}, the target is a {type(target).__name__}")
            return
        new: list[Any] = target if isinstance(target, list) else list(target)
        for index, below in enumerate(target):
            item = stored[index] if index < len(stored) else MISSING
            self.fill((*path, index), below, item, replacer(new, index))
        for index in range(len(target), len(stored)):
            self.unexpected(dotted((*path, index)))
        if new is not target:
            self.found.actions.append((dotted(path), lambda: replace_tuple(target, new, replace)))

    def fill_stateful(self, path: Path, target: Any, stored: Any) -> None:
        key = dotted(path)
        if not self.wants(key, key + ".*"):
            return
        only, self._only = self._only, ()
        try:
            value = self._adopt(key, stored, target.state_dict())
        finally:
            self._only = only
        self.found.actions.append((key, lambda: target.load_state_dict(self.late(value))))

    def _adopt(self, key: str, stored: Any, current: Any) -> Any:
        """The stored state, with the object's own sharded tensors where it has some, new tensors elsewhere."""
        if isinstance(stored, Stub):
            if isinstance(current, DTensor) and tuple(current.shape) == self.source.tensors[stored.name].shape:
                self.slot(key, current, stored)
                return current
            return self.read_into_new(key, stored)
        if isinstance(stored, dict) and isinstance(current, Mapping):
            for name in stored:
                stored[name] = self._adopt(f"{key}.{name}", stored[name], current.get(name))
            return stored
        if isinstance(stored, list) and isinstance(current, (list, tuple)):
            for i, item in enumerate(stored):
                stored[i] = self._adopt(f"{key}.{i}", item, current[i] if i < len(current) else None)
            return stored
        return self.read_into_new(key, stored)


def has_fillable(value: Any) -> bool:
    """Whether there is anything in ``value`` to fill in place."""
    if isinstance(value, _FILLABLE):
        return True
    if isinstance(value, Mapping):
        return any(has_fillable(below) for below in value.values())
    if isinstance(value, (list, tuple)):
        return any(has_fillable(below) for below in value)
    return is_stateful(value)
