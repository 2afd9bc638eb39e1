"""Distributed checkpointing with cloud backup for PyTorch.

Importing this package has no side effects and reaches neither torch nor an SDK; names are resolved on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ckptstore import errors
from ckptstore._version import __version__
from ckptstore.errors import Preempted

if TYPE_CHECKING:
    from ckptstore.config import StoreConfig
    from ckptstore.dcp.markers import per_rank, trainable
    from ckptstore.format.tree import register_type
    from ckptstore.manager import CheckpointManager
    from ckptstore.store import CheckpointStore, SaveHandle
    from ckptstore.types import CheckpointInfo

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointStore",
    "Preempted",
    "SaveHandle",
    "StoreConfig",
    "__version__",
    "errors",
    "per_rank",
    "register_type",
    "trainable",
]

_HOMES = {
    "CheckpointInfo": "ckptstore.types",
    "CheckpointManager": "ckptstore.manager",
    "CheckpointStore": "ckptstore.store",
    "SaveHandle": "ckptstore.store",
    "StoreConfig": "ckptstore.config",
    "per_rank": "ckptstore.dcp.markers",
    "register_type": "ckptstore.format.tree",
    "trainable": "ckptstore.dcp.markers",
}

logging.getLogger("ckptstore").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptstore' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise errors.ConfigError(f"{name} needs PyTorch", hint="pip install 'ckptstore[torch]'") from None
