"""Accelerate: everything that was prepared, tracked in one call.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
manager = track_prepared(CheckpointManager("checkpoints"), accelerator)
"""

from __future__ import annotations

from typing import Any

from ckptstore.errors import ConfigError
from ckptstore.manager import CheckpointManager

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ConfigError("Accelerate is not installed", hint='pip install "ckptstore[accelerate]"') from error


def track_prepared(manager: CheckpointManager, accelerator: Accelerator) -> CheckpointManager:
    """Track the models, optimizers, schedulers, scaler and registered objects of an Accelerator, after ``prepare``.

    Prepared loaders have no state unless ``use_stateful_dataloader`` is set; then they are tracked too. Without it
    track a ``ResumableLoader`` around yours.
    """
    # What Accelerator.save_state() itself goes through.
    manager.track(**_named("model", accelerator._models), **_named("optimizer", accelerator._optimizers))
    manager.track(**_named("scheduler", accelerator._schedulers), scaler=accelerator.scaler)
    manager.track(**_named("custom", accelerator._custom_objects))
    loaders = [each for each in accelerator._dataloaders if hasattr(each, "state_dict")]
    return manager.track(**_named("dataloader", loaders if _is_stateful(accelerator) else []))


def _is_stateful(accelerator: Accelerator) -> bool:
    configuration = getattr(accelerator, "dataloader_config", None)
    return bool(getattr(configuration, "use_stateful_dataloader", False))


def _named(name: str, objects: list[Any]) -> dict[str, Any]:
    return {name: objects[0]} if len(objects) == 1 else {f"{name}_{i}": each for i, each in enumerate(objects)}
