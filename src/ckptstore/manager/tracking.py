"""What belongs to the training state, and how each kind of it is kept.

    in place    modules, optimizers, schedulers, scalers, tensors: saved and filled in place
    own         loaders, samplers, generators, dicts, lists, sets, arrays: the same, each rank its own
    asked       callables: called at each save; their value comes back in ``point.state``
    compared    config: saved; at resume compared with the one given now, and differences are said
    files       tokenizers: what ``save_pretrained`` writes, saved as files and compared

What can't be kept is refused when it is tracked, not at the first save.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, MutableSet
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from ckptstore.dcp.markers import PerRank, Trainable
from ckptstore.dcp.target import has_fillable
from ckptstore.errors import ConfigError, StateError
from ckptstore.manager import compare, files

#: Top-level key of the manager's own part of a checkpoint.
OWN_KEY = "ckptstore"
#: Names whose values are settings, whatever their type.
CONFIG_NAMES = frozenset({"config", "cfg", "args", "hparams", "hyperparameters"})

_IMMUTABLE = (int, float, complex, str, bytes, tuple, frozenset, type(None))


class Tracked:
    """Everything a checkpoint of this job consists of, by name."""

    def __init__(self) -> None:
        self.in_place: dict[str, Any] = {}
        self.asked: dict[str, Callable[[], Any]] = {}
        self.compared: dict[str, Any] = {}
        self.files: dict[str, files.FileSet] = {}

    def __bool__(self) -> bool:
        return bool(self.in_place or self.asked)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted([*self.in_place, *self.asked, *self.compared, *self.files])

    def add(self, objects: Mapping[str, Any]) -> None:
        """Track these; a name tracked before now means the new object. None is left out.

        Raises:
            StateError: something can't be kept; names it and says what to track instead.
            ConfigError: a reserved name.
        """
        sorted_out = [(name, *sort(name, value)) for name, value in objects.items() if value is not None]
        for name, kind, value in sorted_out:
            for other in (self.in_place, self.asked, self.compared, self.files):
                other.pop(name, None)
            getattr(self, kind)[name] = value

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers among them."""
        return [value for value in self.in_place.values() if isinstance(value, Optimizer)]

    @property
    def modules(self) -> Iterable[nn.Module]:
        """The modules among them."""
        for value in self.in_place.values():
            if isinstance(value, nn.Module):
                yield value
            elif isinstance(value, Trainable):
                yield value.module

    def values(self) -> dict[str, Any]:
        """The plain values as they are now."""
        return {
            **{name: compare.plain(value) for name, value in self.compared.items()},
            **{name: ask() for name, ask in self.asked.items()},
        }

    def filed(self) -> dict[str, dict[str, torch.Tensor]]:
        """The files of tokenizers and the like, as tensors of bytes."""
        return {name: entry.tensors() for name, entry in self.files.items()}


def sort(name: str, value: Any) -> tuple[str, Any]:
    """The kind a value is kept as, and what to keep.

    Raises:
        StateError, ConfigError: as for :meth:`Tracked.add`.
    """
    if name == OWN_KEY:
        raise ConfigError(f"{name!r} is the manager's own key", hint="track it under another name")
    if isinstance(value, (nn.Module, Optimizer, Trainable, PerRank, torch.Tensor)):
        return "in_place", value
    if name in CONFIG_NAMES or compare.is_config(value):
        return "compared", value
    if isinstance(value, torch.Generator):
        return "in_place", PerRank(value)
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        return "in_place", PerRank(_Generator(value))
    if isinstance(value, np.ndarray):
        return "in_place", PerRank(_Array(value))
    if _is_stateful(value):
        return "in_place", PerRank(value) if _is_loader(value) else value
    if callable(getattr(value, "save_pretrained", None)):
        return "files", files.FileSet(name, value)
    if isinstance(value, (DataLoader, Sampler)):
        raise StateError(
            f"{name!r} is a {type(value).__name__} without state: its place in the epoch would be lost",
            hint="track ckptstore.manager.ResumableLoader(loader), or torchdata's StatefulDataLoader",
            key=name,
        )
    if isinstance(value, _IMMUTABLE):
        raise StateError(
            f"{name!r} is an immutable {type(value).__name__}, whose later values the manager would not see",
            hint=f"pass a callable: track({name}=lambda: {name})",
            key=name,
        )
    if isinstance(value, (MutableMapping, MutableSequence, MutableSet)):
        # With tensors or modules in it the store fills it in place; plain contents are each rank's own.
        return "in_place", value if has_fillable(value) else PerRank(_Contents(value))
    if is_dataclass(value) and not isinstance(value, type):
        return "in_place", PerRank(_Fields(value))
    if callable(value):
        return "asked", value
    raise StateError(
        f"{name!r}, of type {type(value).__name__}, has no state_dict/load_state_dict and no save_pretrained",
        hint=f"give it those, or pass a callable: track({name}=lambda: ...)",
        key=name,
    )


def _is_stateful(value: Any) -> bool:
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def _is_loader(value: Any) -> bool:
    """Loaders and samplers hand out this rank's share of the data."""
    return isinstance(value, (DataLoader, Sampler)) or hasattr(value, "__iter__")


class _Generator:
    """A Python or NumPy generator, put back in place."""

    def __init__(self, generator: random.Random | np.random.Generator | np.random.RandomState) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self._generator, random.Random):
            return {"state": self._generator.getstate()}
        if isinstance(self._generator, np.random.RandomState):
            return {"state": self._generator.get_state(legacy=False)}
        return {"state": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self._generator, random.Random):
            self._generator.setstate(state["state"])
        elif isinstance(self._generator, np.random.RandomState):
            self._generator.set_state(state["state"])
        else:
            self._generator.bit_generator.state = state["state"]


class _Array:
    """A NumPy array, filled in place."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def state_dict(self) -> dict[str, Any]:
        return {"array": self._array}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        np.copyto(self._array, state["array"])


class _Contents:
    """A dict, list or set of plain values: the same object gets the stored contents."""

    def __init__(self, container: Any) -> None:
        self._container = container

    def state_dict(self) -> dict[str, Any]:
        return {"contents": self._container}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stored = state["contents"]
        if stored is self._container:
            return
        self._container.clear()
        if isinstance(self._container, MutableSequence):
            self._container.extend(stored)
        elif isinstance(self._container, MutableSet):
            for item in stored:
                self._container.add(item)
        else:
            self._container.update(stored)


class _Fields:
    """A mutable dataclass that holds progress: its fields are put back in place."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self._instance))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self._instance, name, value)
