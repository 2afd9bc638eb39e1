"""The manager's arguments, checked and completed: argument > environment > ``ckptstore.toml`` > default."""

from __future__ import annotations

import os
import re
import signal as signals
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError
from ckptstore.ops.settings import Settings
from ckptstore.policy import AnyOf, BeforeEnd, EveryEpochs, EverySeconds, EverySteps, OnSignal, SavePolicy
from ckptstore.policy.retention import Retention
from ckptstore.store import CheckpointStore
from ckptstore.store.remotes import RemoteArgument

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NOT_IN_RUN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
#: Before a known end of the allocation, one save is taken this many graces ahead.
END_GRACES = 2.0


def default_policy(steps: int, seconds: float, epochs: int, grace_s: float | None) -> SavePolicy:
    """The policy of the three ``save_*`` arguments, signals and a known end of the allocation; 0 turns a rule off."""
    rules: list[SavePolicy] = []
    if steps:
        rules.append(EverySteps(steps))
    if seconds:
        rules.append(EverySeconds(seconds))
    if epochs:
        rules.append(EveryEpochs(epochs))
    if grace_s is not None:
        rules.append(BeforeEnd(grace_s * END_GRACES))
    return AnyOf((*rules, OnSignal()))


def open_store(
    save_dir: str | os.PathLike[str] | None,
    *,
    run: str | None,
    model_name: str | None,
    remote: RemoteArgument,
    config: StoreConfig | None,
    process_group: ProcessGroup | None,
    settings: Settings | None = None,
) -> CheckpointStore:
    """A store of the manager's own.

    Each argument counts before the environment, that before ``ckptstore.toml``; of ``config`` the fields that were
    given. Ranks save with rank 0's configuration.

    Raises:
        ConfigError: no ``save_dir`` anywhere, or values that can't be right.
    """
    settings = Settings.read() if settings is None else settings
    root = save_dir if save_dir is not None else settings.get("local")
    if root is None:
        raise ConfigError("a manager takes either save_dir or store", hint='CheckpointManager("checkpoints")')
    return CheckpointStore(
        root,
        remote if remote is not None else settings.get("remote"),
        run=run_name(run, model_name, settings),
        config=settings.config(config),
        process_group=process_group,
    )


def run_name(run: str | None, model_name: str | None, settings: Settings) -> str | None:
    """The run: as given, else ``$CKPTSTORE_RUN`` or the file's, else the model's name, made to fit."""
    given = run if run is not None else settings.get("run")
    if given is not None or model_name is None:
        return given
    return _NOT_IN_RUN_NAMES.sub("-", model_name).lstrip("._-")[:128] or None


def remote_retention(given: Retention | Mapping[str, Any] | None, local: Retention) -> Retention:
    """The remotes' retention: the same as the local one unless given."""
    if given is None:
        return local
    if isinstance(given, Retention):
        return given
    try:
        return Retention(**{"monitor": local.monitor, "mode": local.mode, **given})
    except TypeError as error:
        raise ConfigError(f"keep_remote: {error}", hint='keep_remote={"keep_last": 20, "keep_best": 3}') from None


def check_signals(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each of a signal that can be caught.

    Raises:
        ConfigError: it isn't.
    """
    if isinstance(names, str):
        names = (names,)
    for name in names:
        if not re.fullmatch(r"SIG[A-Z0-9]+", name) or not hasattr(signals, name) or name in ("SIGKILL", "SIGSTOP"):
            raise ConfigError(f"save_on_signal: {name!r} is not a signal that can be caught", hint='("SIGTERM",)')
    return tuple(dict.fromkeys(names))
