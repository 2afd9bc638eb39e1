"""`CheckpointManager`: the training loop's side. When to save, what, what to keep, and what happens at the end.

Owns: triggers, tracking, resume, signals, retention, random state. Must not know: how a save is written or read.
"""

from ckptstore.manager.loader import ResumableLoader
from ckptstore.manager.manager import CheckpointManager
from ckptstore.manager.resume import ResumePoint
from ckptstore.manager.workers import outlive_signals

__all__ = ["CheckpointManager", "ResumableLoader", "ResumePoint", "outlive_signals"]
