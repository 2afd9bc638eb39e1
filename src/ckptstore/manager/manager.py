"""The object a training loop holds."""

from __future__ import annotations

import logging
import math
import os
import signal as signals
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import (
    CkptError,
    ConfigError,
    Preempted,
    SaveFailedError,
    SaveTimeoutError,
    StateError,
    StorageError,
)
from ckptstore.manager import health, rng
from ckptstore.manager import resume as resuming
from ckptstore.manager.emergency import OptimizerGuard, all_are_here
from ckptstore.manager.grace import end_of_allocation, grace_of
from ckptstore.manager.keeper import Keeper
from ckptstore.manager.loading import Loading
from ckptstore.manager.news import NewsDesk
from ckptstore.manager.progress import Progress
from ckptstore.manager.resume import ResumePoint
from ckptstore.manager.safety import Safety
from ckptstore.manager.scalars import Scalars
from ckptstore.manager.signals import SignalWatch
from ckptstore.manager.tracking import OWN_KEY, Tracked
from ckptstore.manager.voice import Voice, print_line
from ckptstore.dcp.markers import PerRank
from ckptstore.policy import retention as keep
from ckptstore.policy.retention import Retention
from ckptstore.policy.save import AnyOf, BeforeEnd, EveryEpochs, EverySeconds, EverySteps, Moment, Never, OnSignal, SavePolicy
from ckptstore.store import CheckpointStore, SaveHandle
from ckptstore.types import StepLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ckptstore.dcp.agreement import Agreement

#: What is kept of the grace for printing, unwinding and exiting.
EXIT_RESERVE_S = 0.5
