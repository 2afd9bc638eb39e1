"""One pass over a state: every tensor gets its name, everything else is encoded into the state tree.

Modules become one flat dict of names, optimizers the dict :mod:`ckptstore.dcp.optimizers` describes, objects with
``state_dict``/``load_state_dict`` what they hand out. Long runs of nothing but tensor names are *fragments*: encoded
once and reused by later saves as long as their keys stay the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckptstore.dcp import arrays, composites, fsdp1, modules, optimizers
from ckptstore.dcp import torch_types as _torch_types  # noqa: F401  # registers torch's small types
from ckptstore.dcp.markers import PerRank, Trainable
from ckptstore.errors import StateError
from ckptstore.format import tree
from ckptstore.format.manifest import Json
from ckptstore.format.names import fqn as name_of_path
from ckptstore.format.types_base import MAX_DEPTH

Kind = Literal["param", "buffer", "optim", "plain", "per_rank"]
Path = tuple[Any, ...]
#: dotted path -> (keys, encoded node)
Fragments = dict[str, tuple[object, Json]]

#: Plain dicts of at least this many tensors are worth a fragment, if their keys are of these types, whose values are
#: equal only where they are the same.
_FRAGMENT_MIN = 8
_FRAGMENT_KEYS = frozenset({str, int})
#: Arrays above this are stored as tensors are.
_LARGE_ARRAY_BYTES = 64 * 1024


class Walk:
    """Collects one state's tensors and encodes what isn't one. Not reusable.

    Attributes:
        names, tensors, kinds: what was found, in order; tied names appear once each.
        slow_path: why some module had to be asked for its state dict.
        has_composites: some tensor was taken apart.

    Args:
        all_plain: none has to be, as far as the caller knows; who turns out to be wrong walks again.
    """

    def __init__(self, rank: int, state: Mapping[str, Any], fragments: Fragments, *, all_plain: bool = False) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.kinds: list[Kind] = []
        self.slow_path: str | None = None
        self.has_composites = False
        self._all_plain = all_plain
        self._rank = rank
        self._state = state
        self._fragments = fragments
        self._used: dict[str, Json] = {}
        self._own: dict[str, object] = {}
        self._taken: set[str] = set()
        self._entries: dict[int, modules.ModuleEntries] = {}
        self._owners: dict[int, optimizers.Owner] | None = None
        self._suffix = ""

    def encode(self) -> Json:
        """The whole state as a tree that refers to tensors by name."""
        return tree.encode(self._state, self._leaf)

    def encode_own(self) -> Json | None:
        """The values marked ``per_rank`` as one tree by key, None if there are none; after :meth:`encode`."""
        if not self._own:
            return None
        self._suffix = f"@rank{self._rank}"
        self._taken = {name.removesuffix(self._suffix) for name in self._taken if name.endswith(self._suffix)}
        try:
            return tree.encode(self._own, self._leaf)
        finally:
            self._suffix = ""

    @property
    def fragments(self) -> Mapping[str, Json]:
        """The encoded nodes that hold nothing but names of tensors, by dotted path."""
        return self._used

    def entries_of(self, module: nn.Module) -> modules.ModuleEntries:
        """The module's tensors, walked once per pass."""
        entries = self._entries.get(id(module))
        if entries is None:
            entries = self._entries[id(module)] = modules.walk(module)
        return entries

    @property
    def owners(self) -> dict[int, optimizers.Owner]:
        """id of each parameter in any module of the state -> where it is registered; the first place wins."""
        if self._owners is None:
            self._owners = {}
            for path, module in modules_in(self._state):
                key = ".".join(map(str, path))
                for fqn, tensor, kind in self.entries_of(module).tensors:
                    if kind == "param":
                        self._owners.setdefault(id(tensor), optimizers.Owner(key, fqn))
        return self._owners

    def fsdp1_of(self, optimizer: Optimizer) -> nn.Module | None:
        """The FSDP1 module this optimizer steps, if any."""
        wrapped = [module for _, module in modules_in(self._state) if self.entries_of(module).has_fsdp1]
        return fsdp1.module_of(optimizer, wrapped)

    # -- leaves ---------------------------------------------------------------------------------------------------

    def _leaf(self, path: Path, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return self._tensor(path, value)
        if isinstance(value, dict):
            return self._dict(path, value)
        if isinstance(value, nn.Module):
            return self._module(path, value)
        if isinstance(value, Optimizer):
            return self._optimizer(path, value)
        if isinstance(value, Trainable):
            return self._module(path, value.module, trainable_only=True)
        if isinstance(value, PerRank):
            return self._keep_own(path, value.value)
        if type(value) is np.ndarray:
            return self._array(path, value)
        if is_stateful(value):
            return value.state_dict()  # type: ignore[attr-defined]
        return value

    def _tensor(self, path: Path, value: torch.Tensor) -> object:
        if type(value) is not torch.Tensor and tree.is_registered(type(value)):
            return value  # its own codec knows more than we do
        return self._refer(".".join(map(str, path[:-1])), path[:-1], path[-1:], value, "plain")

    def _is_named_only(self, value: object) -> bool:
        """Whether nothing but its name would stand for this value in the tree."""
        if type(value) is torch.Tensor:
            return not self._is_composite(value)
        return isinstance(value, torch.Tensor) and not tree.is_registered(type(value)) and not self._is_composite(value)

    def _is_composite(self, tensor: torch.Tensor) -> bool:
        return not self._all_plain and composites.is_composite(tensor)

    def _array(self, path: Path, value: np.ndarray[Any, Any]) -> object:
        """Large arrays are chunked, compared and compressed as tensors are; small ones stay in the tree."""
        if value.nbytes <= _LARGE_ARRAY_BYTES or value.dtype.hasobject:
            return value
        tensor, dtype, shape, is_transposed = arrays.as_tensor(value)
        name = self._add(".".join(map(str, path[:-1])), path[:-1], path[-1:], tensor, "plain")
        return tree.ArrayRef(name, dtype, shape, is_transposed)

    def _refer(
        self, prefix: str, path: Path, keys: Path, value: torch.Tensor, kind: Kind
    ) -> tree.TensorRef | tree.Composite:
        """Note a tensor, or the parts of one that is made of others."""
        if self._all_plain or not composites.is_composite(value):
            return tree.TensorRef(self._add(prefix, path, keys, value, kind))
        self.has_composites = True
        apart = composites.take_apart(".".join(map(str, (*path, *keys))), value)
        parts = {name: self._refer(prefix, path, (*keys, name), part, kind) for name, part in apart.parts.items()}
        return tree.Composite(apart.kind, dict(parts), apart.facts)

    def _add(self, prefix: str, path: Path, keys: Path, value: torch.Tensor, kind: Kind) -> str:
        """Note a tensor at ``(*path, *keys)``, where ``prefix`` is the stock name of ``path``; returns its name."""
        name = ".".join([prefix, *map(str, keys)]) if path else ".".join(map(str, keys))
        if name in self._taken or not name.isascii():
            name = name_of_path((*path, *keys), self._taken)
        self._taken.add(name)
        if self._suffix:
            name, kind = name + self._suffix, "per_rank"
        self.names.append(name)
        self.tensors.append(value)
        self.kinds.append(kind)
        return name

    def _add_all(
        self, prefix: str, path: Path, keys: Iterable[Path], names: list[str], values: list[torch.Tensor], kind: Kind
    ) -> list[str]:
        """As :meth:`_add` for many, whose plain names are ``names``: at once, if none of them needs another."""
        fresh = set(names)
        if (
            path
            and not self._suffix
            and len(fresh) == len(names)
            and self._taken.isdisjoint(fresh)
            and "".join(names).isascii()
        ):
            self._taken |= fresh
            self.names += names
            self.tensors += values
            self.kinds += [kind] * len(names)
            return names
        return [self._add(prefix, path, key, value, kind) for key, value in zip(keys, values, strict=True)]

    def _dict(self, path: Path, value: dict[Any, Any]) -> object:
        kind = type(value)
        if len(value) < _FRAGMENT_MIN or kind not in (dict, OrderedDict) or not path:
            return value
        if kind is dict and type(next(iter(value.values()))) is dict:
            return self._dicts(path, value, "plain")
        for key, item in value.items():
            if type(key) not in _FRAGMENT_KEYS or not self._is_named_only(item):
                return value
        prefix = ".".join(map(str, path))
        keys = list(value)
        plain = [f"{prefix}.{key}" for key in keys]
        names = self._add_all(prefix, path, ((key,) for key in keys), plain, list(value.values()), "plain")
        refs = map(tree.TensorRef, names)
        return self._fragment(path, (kind, keys, names), lambda: kind(zip(keys, refs, strict=True)))

    def _module(self, path: Path, module: nn.Module, *, trainable_only: bool = False) -> object:
        entries = self.entries_of(module)
        if entries.slow is not None:
            self.slow_path = self.slow_path or f"{'.'.join(map(str, path))}: {entries.slow}"
            return self._module_by_state_dict(path, module, entries, trainable_only=trainable_only)
        prefix = ".".join(map(str, path))
        keys: list[str] = []
        names: list[str] = []
        whole: dict[str, object] = {}
        plain = self._all_plain
        for fqn, tensor, kind in entries.tensors:
            if trainable_only and kind == "param" and not tensor.requires_grad:
                continue
            keys.append(fqn)
            if not plain and composites.is_composite(tensor):
                whole[fqn] = self._refer(prefix, path, (fqn,), tensor, kind)
                names.append("")
            else:
                names.append(self._add(prefix, path, (fqn,), tensor, kind))

        def refs() -> dict[str, object]:
            return {key: whole.get(key) or tree.TensorRef(name) for key, name in zip(keys, names, strict=True)}

        if not entries.extra and not whole:
            return self._fragment(path, (keys, names), refs)
        return {**refs(), **{fqn: owner.get_extra_state() for fqn, owner in entries.extra.items()}}

    def _module_by_state_dict(
        self, path: Path, module: nn.Module, entries: modules.ModuleEntries, *, trainable_only: bool
    ) -> dict[str, object]:
        prefix = ".".join(map(str, path))
        kinds = {fqn: kind for fqn, _, kind in entries.tensors}
        frozen = {fqn for fqn, tensor, kind in entries.tensors if kind == "param" and not tensor.requires_grad}
        state: dict[str, object] = {}
        for fqn, value in modules.state_dict_of(module).items():
            if trainable_only and fqn in frozen:
                continue
            if isinstance(value, torch.Tensor):
                value = self._refer(prefix, path, (fqn,), value, kinds.get(fqn, "param"))
            state[fqn] = value
        return state

    def _optimizer(self, path: Path, optimizer: Optimizer) -> object:
        optimizer = optimizers.unwrapped(optimizer)
        if optimizers.has_own_state_dict(optimizer):
            return optimizer.state_dict()
        sharded = self.fsdp1_of(optimizer)
        if sharded is not None:
            return fsdp1.optimizer_state(sharded, optimizer)
        names = optimizers.parameter_names(optimizer, self.owners)
        state, groups = optimizers.read(optimizer, names)
        for i, group in enumerate(groups):
            at = (*path, "param_groups", i, "params")
            group["params"] = self._fragment(at, group["params"], partial(list, group["params"]))
        return {"state": self._dicts((*path, "state"), state, "optim"), "param_groups": groups}

    def _dicts(self, path: Path, state: dict[Any, Any], kind: Kind) -> object:
        """Dicts of nothing but tensors in a dict, as optimizers keep them, are one fragment.

        An empty one is not: no name of a tensor would tell ranks apart that have it from those that don't.
        """
        for fqn, entry in state.items():
            if type(entry) is not dict or not entry or type(fqn) not in _FRAGMENT_KEYS:
                return state
            for key, item in entry.items():
                if type(key) not in _FRAGMENT_KEYS or not self._is_named_only(item):
                    return state
        prefix = ".".join(map(str, path))
        places = [(fqn, key) for fqn, entry in state.items() for key in entry]
        plain = [f"{prefix}.{fqn}.{key}" for fqn, key in places]
        tensors = [item for entry in state.values() for item in entry.values()]
        names = self._add_all(prefix, path, places, plain, tensors, kind)
        keys = [key for _, key in places]
        fqns = list(state)

        def refs() -> dict[Any, dict[Any, object]]:
            name = iter(names)
            return {fqn: {key: tree.TensorRef(next(name)) for key in entry} for fqn, entry in state.items()}

        return self._fragment(path, (fqns, keys, names), refs)

    def _keep_own(self, path: Path, value: object) -> tree.PerRankRef:
        key = name_of_path(path, self._own.keys())
        if self._suffix:
            raise StateError(f"{key!r} is per_rank(...) inside per_rank(...)", hint="one of them is enough", key=key)
        self._own[key] = value
        return tree.PerRankRef(key)

    def _fragment(self, path: Path, looks: object, make: Callable[[], Any]) -> object:
        """The encoded value of ``make()``, which ``looks`` determines."""
        key = ".".join(map(str, path)) + self._suffix
        if key in self._used:
            key = name_of_path(path, self._used) + self._suffix
        kept = self._fragments.get(key)
        if kept is None or kept[0] != looks:
            kept = self._fragments[key] = (looks, tree.encode(make(), _verbatim)["tree"])
        self._used[key] = kept[1]
        return tree.Opaque(key, kept[1])


def _verbatim(_: Path, value: object) -> object:
    return value


def is_stateful(value: object) -> bool:
    """Whether ``value`` is an object that hands out and takes back its state (a scheduler, a scaler, a loader)."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def modules_in(value: object, path: Path = ()) -> Iterator[tuple[Path, nn.Module]]:
    """Every module of a state with its path, through mappings, lists, tuples and markers.

    What is nested deeper than a state may be, as one that contains itself is, is left to who encodes it to refuse.
    """
    if isinstance(value, torch.Tensor) or len(path) > MAX_DEPTH:
        return
    if isinstance(value, nn.Module):
        yield path, value
    elif isinstance(value, Trainable):
        yield path, value.module
    elif isinstance(value, PerRank):
        yield from modules_in(value.value, path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from modules_in(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from modules_in(item, (*path, index))
