"""Reading a module tree directly: the names a plain ``state_dict`` would give, without calling it.

Wrappers that only forward (DDP, ``torch.compile``, activation checkpointing) are transparent, so a wrapped and a plain
model have the same names. Modules whose ``state_dict`` is not torch's own (hooks, overrides, FSDP1) can't be read
this way; :func:`walk` says why, and the caller asks them for their state dict instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ckptstore.dcp.fsdp1 import is_sharded_by_fsdp1

Kind = Literal["param", "buffer"]

EXTRA_STATE = "_extra_state"
#: Segments that wrappers put into names and that mean nothing.
_WRAPPER_SEGMENTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
#: FSDP2 hooks the modules it shards, only to reshard them first; the walk does that itself.
_FSDP2_HOOKS = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_TORCH_STATE_DICT = nn.Module.state_dict
_TORCH_SAVE = nn.Module._save_to_state_dict
_TORCH_EXTRA = nn.Module.get_extra_state


@dataclass
class ModuleEntries:
    """What a module tree holds, in ``state_dict`` order; tied names appear once each.

    Attributes:
        tensors: (fqn, live tensor, kind). Kept as the live object, so later reads see its current storage.
        extra: fqn of ``_extra_state`` -> the module that owns it.
        slow: why the direct walk would not give what ``state_dict`` gives; None when it does.
        has_fsdp1: some of it is wrapped by FullyShardedDataParallel.
    """

    tensors: list[tuple[str, torch.Tensor, Kind]] = field(default_factory=list)
    extra: dict[str, nn.Module] = field(default_factory=dict)
    slow: str | None = None
    has_fsdp1: bool = False


def walk(module: nn.Module) -> ModuleEntries:
    """Everything persistent below ``module``, by name. Local; calls no hook and no user code."""
    entries = ModuleEntries()
    _collect(module, "", entries)
    return entries


def strip_wrappers(name: str) -> str:
    """``name`` without the segments wrappers add; ``module.`` counts only in front, where DDP puts it."""
    return _strip(name, parallel=1)


def _strip(name: str, *, parallel: int) -> str:
    if "_" in name:
        name = ".".join(part for part in name.split(".") if part not in _WRAPPER_SEGMENTS)
    for _ in range(parallel):
        name = name.removeprefix("module.")
    return name


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside any transparent wrappers."""
    while (child := _transparent_child(module)) is not None:
        module = child
    return module


def _transparent_child(module: nn.Module) -> nn.Module | None:
    children = module._modules
    if len(children) != 1:
        return None
    (name,) = children
    if name in _WRAPPER_SEGMENTS or (name == "module" and isinstance(module, _PARALLEL)):
        return children[name]
    return None


def _has_foreign_hooks(module: nn.Module) -> bool:
    return bool(module._state_dict_hooks) or any(
        getattr(hook, "__module__", "") != _FSDP2_HOOKS for hook in module._state_dict_pre_hooks.values()
    )


def _collect(module: nn.Module, prefix: str, entries: ModuleEntries) -> None:
    child = _transparent_child(module)
    if child is not None:
        if "_fsdp_wrapped_module" in module._modules:
            entries.has_fsdp1 = True
            entries.slow = entries.slow or "FSDP1 keeps flat parameters"
        _collect(child, prefix, entries)
        return
    cls = type(module)
    if hasattr(cls, "_get_fsdp_state"):
        module.reshard()  # type: ignore[operator]  # as state_dict() does: what a forward left unsharded is not the state
    if (module._state_dict_hooks or module._state_dict_pre_hooks) and _has_foreign_hooks(module):
        entries.slow = entries.slow or f"{cls.__name__} has state_dict hooks"
    if cls.state_dict is not _TORCH_STATE_DICT or cls._save_to_state_dict is not _TORCH_SAVE:
        entries.slow = entries.slow or f"{cls.__name__} overrides state_dict"
    tensors = entries.tensors
    for name, parameter in module._parameters.items():
        if parameter is not None:
            tensors.append((prefix + name, parameter, "param"))
    if module._buffers:
        hidden = module._non_persistent_buffers_set
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in hidden:
                tensors.append((prefix + name, buffer, "buffer"))
    if cls.get_extra_state is not _TORCH_EXTRA:
        entries.extra[prefix + EXTRA_STATE] = module
    for name, below in module._modules.items():
        if below is not None:
            _collect(below, f"{prefix}{name}.", entries)


def state_dict_of(module: nn.Module) -> dict[str, Any]:
    """The slow path: what the module's own ``state_dict`` says, sharded where FSDP1 shards, names without wrappers.

    Collective for FSDP1. The tensors are live wherever the module hands out live ones.
    """
    if is_sharded_by_fsdp1(module):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(module))
    strip = _stripper(module)
    return {strip(name): value for name, value in module.state_dict().items()}


def load_state_dict_into(module: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`state_dict_of`: hand a complete state dict back. Collective for FSDP1."""
    if is_sharded_by_fsdp1(module):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(module, state)
        return
    strip = _stripper(module)
    theirs = {strip(name): name for name in module.state_dict()}
    module.load_state_dict({theirs.get(name, name): value for name, value in state.items()})


def _stripper(module: nn.Module) -> Callable[[str], str]:
    parallel = 0
    inner: nn.Module | None = module
    while inner is not None:
        parallel += isinstance(inner, _PARALLEL)
        inner = _transparent_child(inner)
    return lambda name: _strip(name, parallel=parallel)
