"""``read``: a checkpoint's state without a target, as plain containers and CPU tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from ckptstore.dcp.boxes import Box
from ckptstore.dcp.loader import fill
from ckptstore.dcp.parts import Slot
from ckptstore.dcp.source import ChunkSource
from ckptstore.dcp.stored import MISSING, StoredState, Stub, substitute
from ckptstore.dcp.views import NewMemory, host_memory
from ckptstore.format.tree import Composite


def read_state(
    source: ChunkSource,
    *,
    only: Iterable[str] = (),
    rank: int = 0,
    threads: int = 4,
    allocate: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] = host_memory,
) -> dict[Any, Any]:
    """The state as it was saved: the same keys, containers and values, tensors on the CPU. Local.

    A module is one flat dict of names, an optimizer ``{"state": ..., "param_groups": ...}`` by parameter name. Tied
    names give the same tensor, and views that overlapped overlap. ``per_rank`` values are those of ``rank``.

    Args:
        only: globs of dotted names; everything else, and what is left empty by that, is left out and not read.
        allocate: gives the memory for each tensor.

    Raises:
        IntegrityError: bytes are damaged and no good copy is left.
        FormatError: the checkpoint holds a type this process doesn't know.
    """
    globs = (only,) if isinstance(only, str) else tuple(only)
    tensors: dict[str, torch.Tensor] = {}
    slots: list[Slot] = []
    memory = NewMemory(source, allocate)

    def tensor(name: str) -> torch.Tensor:
        if name not in tensors:
            meta = source.tensors[name]
            new = tensors[name] = memory.tensor(name)
            slots.append(Slot(name, name, Box(new, meta.shape, (0,) * len(meta.shape), meta.shape)))
        return tensors[name]

    # What is made of tensors may look at their values, so it is made when they are filled.
    if not globs:
        stored = StoredState(source, rank=rank, keys=frozenset())
        for key in stored.keys:
            for name in stored.names(key):
                tensor(name)
        fill(slots, source, threads=threads)
        result = {key: stored.decode(key, tensor) for key in stored.keys}
    else:
        hidden = (*globs, *(f"{glob}.*" for glob in globs))

        def inside(_: Any, name: str) -> object:
            return tensor(name) if _wanted(hidden, name) else Stub(name)

        stored = StoredState(source, rank=rank, keys=None, allocate=inside)
        pruned = {key: _prune(stored, value, str(key), globs, tensor) for key, value in stored.values.items()}
        fill(slots, source, threads=threads)
        result = {key: stored.late(value) for key, value in pruned.items() if value is not MISSING}
    for check in stored.checks:
        check()
    return result


def _prune(stored: StoredState, value: Any, key: str, globs: tuple[str, ...], tensor: Any) -> Any:
    """``value`` without what no glob lets through; MISSING if nothing is left."""
    if isinstance(value, Stub):
        return tensor(value.name) if _wanted(globs, key, value.name) else MISSING
    if isinstance(value, Composite):
        if not _wanted(globs, key):
            return MISSING
        return substitute(
            value,
            lambda stub: tensor(stub.name),
            lambda whole: stored.put_together(key, whole) if isinstance(whole, Composite) else whole,
        )
    cls = type(value)
    if isinstance(value, dict) and value and cls in (dict, OrderedDict, defaultdict):
        kept = {k: _prune(stored, v, f"{key}.{k}", globs, tensor) for k, v in value.items()}
        for k, v in kept.items():
            if v is MISSING:
                del value[k]
            else:
                value[k] = v
        return value if value else MISSING
    if isinstance(value, (list, tuple)) and value:
        items = [_prune(stored, v, f"{key}.{i}", globs, tensor) for i, v in enumerate(value)]
        left = [v for v in items if v is not MISSING]
        if not left:
            return MISSING
        return cls(*items) if hasattr(cls, "_fields") else cls(left)
    return value if _wanted(globs, key) else MISSING


def _wanted(globs: tuple[str, ...], *names: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)
