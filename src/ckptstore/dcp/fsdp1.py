"""``FullyShardedDataParallel``: parameters live in flat ones, so only FSDP itself can say what the state is.

The slow path of a deprecated wrapper: it unshards while saving. With ``use_orig_params=True`` an optimizer is loaded in
place, run by run; otherwise its whole state is read on every rank before FSDP cuts it. FSDP2 needs none of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.optim import Optimizer


def is_sharded_by_fsdp1(module: nn.Module) -> bool:
    """Whether any part of ``module`` is wrapped by FullyShardedDataParallel."""
    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules())


def module_of(optimizer: Optimizer, candidates: Iterable[nn.Module]) -> nn.Module | None:
    """The first of these FSDP1 modules whose parameters this optimizer steps, if there is one."""
    for module in candidates:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in mine for parameter in module.parameters()):
            return module
    return None


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """State by parameter name, sharded as the parameters are. Collective; makes no state where there is none."""
    with _state_dict_type(module, full=False):
        return dict(FullyShardedDataParallel.optim_state_dict(module, optimizer))


class Run(NamedTuple):
    """What this rank has of a parameter: ``numel`` elements of the flattened global tensor from ``start``."""

    shape: tuple[int, ...]
    start: int
    numel: int


def local_runs(module: nn.Module) -> dict[int, Run] | None:
    """id of each sharded parameter -> its run here, by FSDP1's own books; None where parameters are flat ones
    (``use_orig_params=False``), whose states only FSDP1 can tell apart."""
    runs: dict[int, Run] = {}
    for part in FullyShardedDataParallel.fsdp_modules(module):
        handle: Any = part._handle
        if handle is None:
            continue
        if not handle._use_orig_params:
            return None
        if handle.uses_sharded_strategy:
            flat = handle.flat_param
            for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                runs[id(parameter)] = Run(tuple(shape), info.intra_param_start_idx or 0, info.numel_in_shard or 0)
    return runs


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take back a state of whole CPU tensors by parameter name. Collective."""
    with _state_dict_type(module, full=True):
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, state))


def local_shard(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]] | None:
    """(memory, global shape, offsets) of a ShardedTensor with at most one shard here; None for anything else."""
    if not isinstance(tensor, ShardedTensor):
        return None
    metadata: Any = tensor.metadata()
    shape = tuple(metadata.size)
    shards = tensor.local_shards()
    if not shards:
        return torch.empty(0, dtype=metadata.tensor_properties.dtype, device="cpu"), shape, (0,) * len(shape)
    if len(shards) > 1:
        return None
    return shards[0].tensor, shape, tuple(shards[0].metadata.shard_offsets)


@contextmanager
def _state_dict_type(module: nn.Module, *, full: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if full:
            kind = StateDictType.FULL_STATE_DICT
            configs: tuple[Any, Any] = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=False)
        else:
            kind = StateDictType.SHARDED_STATE_DICT
            configs = ShardedStateDictConfig(), ShardedOptimStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(module, kind, *configs):
            yield
