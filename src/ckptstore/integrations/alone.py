"""A store for one rank: for libraries that call a hook on rank 0 only."""

from __future__ import annotations

import os

import torch.distributed as dist

from ckptstore.config import StoreConfig
from ckptstore.store import CheckpointStore
from ckptstore.store.remotes import RemoteArgument


def store_of_this_rank(
    local: str | os.PathLike[str], remote: RemoteArgument, run: str | None, config: StoreConfig | None
) -> CheckpointStore:
    """A store whose saves involve no other rank. Local: others need not call this."""
    group = None
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        group = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    return CheckpointStore(local, remote, run=run, config=config, process_group=group)
