"""The store as a ``StorageWriter``, for people who call ``dcp.save`` or ``dcp.async_save`` themselves.

DCP's plan says who would write which bytes; the store has a planner of its own that also knows replicas, tied tensors
and what was stored last time. So the writer takes the state from DCP's planner, in the nesting it was given, and saves
that: with the same durability, commit and upload as any other save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckptstore.errors import ConfigError

#: Saves a state and returns when it has the level that was asked for. Collective.
Save = Callable[[Mapping[str, Any]], None]


class CheckpointStorageWriter(StorageWriter):
    """Saves one step for ``dcp.save(state, storage_writer=...)``; made by ``CheckpointStore.writer``."""

    def __init__(self, save: Save) -> None:
        self._save = save

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """``checkpoint_id`` has no meaning here: the store knows where."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Save the planner's state. Collective; returns once it has the level that was asked for.

        Raises:
            ConfigError: a planner that does not show its state.
            SaveFailedError, StateError: as ``CheckpointStore.save``.
        """
        state = getattr(planner, "state_dict", None)
        if not isinstance(state, Mapping):
            raise ConfigError(
                f"{type(planner).__name__} does not show its state",
                hint="use DefaultSavePlanner or a subclass of it, or CheckpointStore.save",
            )
        self._save(_nested(state, getattr(planner, "mappings", None) or {}))
        sizes = {item.index: _size_of(item) for item in plan.items}
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, None) for index, size in sizes.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The store has committed already."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path or URL: it is made by a store."""
        del checkpoint_id
        return False


def _size_of(item: Any) -> int:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        return 0
    return int(item.tensor_data.chunk.sizes.numel())


class _Level(dict[Any, Any]):
    """A container of the state while it is put together again; a list if its keys are positions."""


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """DCP's flat state in the nesting that was saved."""
    root = _Level()
    for name, value in flat.items():
        below = root
        path = paths.get(name, (name,))
        for key in path[:-1]:
            below = below.setdefault(key, _Level())
        below[path[-1]] = value
    return {str(key): _plain(value) for key, value in root.items()}


def _plain(value: Any) -> Any:
    if not isinstance(value, _Level):
        return value
    if value and all(type(key) is int for key in value):
        return [_plain(value[key]) for key in sorted(value)]
    return {key: _plain(below) for key, below in value.items()}
