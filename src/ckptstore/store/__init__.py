"""`CheckpointStore`: save, load, read, checkpoints, wait, close.

Owns: the calls a training script makes, what they promise, and how ranks and agents agree on one save.
Must not know: how bytes are laid out, encoded or sent.
"""

from ckptstore.store.handle import SaveHandle
from ckptstore.store.store import CheckpointStore

__all__ = ["CheckpointStore", "SaveHandle"]
