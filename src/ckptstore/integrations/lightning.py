"""Lightning: a callback for all strategies, and a CheckpointIO for what Lightning saves itself.

    Trainer(callbacks=[CkptstoreCallback("checkpoints", save_every_steps=500)], enable_checkpointing=False).fit(model)

The callback resumes by itself when ``fit`` starts: no ``ckpt_path``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError, NotFoundError
from ckptstore.integrations.alone import store_of_this_rank
from ckptstore.manager import CheckpointManager
from ckptstore.store import CheckpointStore
from ckptstore.store.remotes import RemoteArgument

try:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ConfigError("Lightning is not installed", hint='pip install "ckptstore[lightning]"') from error


class CkptstoreCallback(Callback):
    """Saves when due, resumes at the start of ``fit``, and ends in order on signals and exceptions.

    Model, optimizers, schedulers, precision, the loops' place (loaders with state included) and the states of the other
    callbacks are kept. Metrics are those that were logged. Stall, lag and durable step go to the Trainer's loggers.

    Args:
        save_dir: As for CheckpointManager; or ``manager``.
        manager: One of yours; what it tracks already is kept too.
        **options: CheckpointManager's other arguments.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        manager: CheckpointManager | None = None,
        **options: Any,
    ) -> None:
        if manager is not None and (save_dir is not None or options):
            raise ConfigError("CkptstoreCallback takes a manager, or a manager's arguments, not both")
        self.manager = manager or CheckpointManager(save_dir, **options)
        self._is_inside = False
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill everything from where the run left off."""
        manager = self.manager
        if trainer.loggers and trainer.is_global_zero:
            manager.draw(_Loggers(trainer))
        manager.track(model=trainer.strategy.model, **_numbered("optimizer", trainer.optimizers))
        manager.track(**_numbered("scheduler", [config.scheduler for config in trainer.lr_scheduler_configs]))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        manager.track(scaler=scaler)
        manager.track(loops=lambda: trainer.fit_loop.state_dict(), callbacks=lambda: self._states(trainer))
        point = manager.resume()
        if point:
            trainer.fit_loop.load_state_dict(point.state["loops"])
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if callback is not self and (state := point.state["callbacks"].get(callback.state_key)):
                    callback.load_state_dict(state)
        self._last_step = point.step
        manager.__enter__()
        self._is_inside = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if due, once per optimizer step."""
        step = trainer.global_step
        if step != self._last_step:
            self._last_step = step
            self.manager.step(step, epoch=trainer.current_epoch, metrics=trainer.callback_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for what is on its way."""
        self._leave(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the state is whole; never hides the exception."""
        self._leave(exception)

    def _leave(self, error: BaseException | None) -> None:
        if self._is_inside:
            self._is_inside = False
            self.manager.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _states(self, trainer: Trainer) -> dict[str, Any]:
        return {
            each.state_key: state
            for each in trainer.callbacks  # type: ignore[attr-defined]
            if each is not self and (state := each.state_dict())
        }


class _Loggers:
    """The Trainer's loggers, as a place to draw curves in."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics({tag: float(scalar_value)}, step=global_step)


class CkptstoreCheckpointIO(CheckpointIO):
    """Where Lightning's own checkpoints go, for one device and DDP: into a store, with a small file in their place.

    ``Trainer(plugins=[CkptstoreCheckpointIO("store", remote=...)])``. What ``ModelCheckpoint`` would write to
    ``epoch=0-step=10.ckpt`` is saved, verified at load, and uploaded; the file names it. Deleting the file through
    Lightning deletes the checkpoint.
    """

    def __init__(
        self,
        local: str | os.PathLike[str],
        remote: RemoteArgument = None,
        *,
        run: str | None = None,
        config: StoreConfig | None = None,
    ) -> None:
        self._arguments = (local, remote, run, config)
        self._opened: CheckpointStore | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save, and leave the name at ``path`` once it is on the disk."""
        store = self._store()
        handle = store.save({"lightning": _plain(checkpoint)}, int(checkpoint.get("global_step", 0)), wait="local")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps({"ckptstore": str(store.local), "run": store.run, "save_id": handle.save_id}))
        os.replace(temporary, path)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """The checkpoint that ``path`` names, on the CPU; every byte is verified."""
        return self._store().read(self._named(path))["lightning"]

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint and its name."""
        with suppress(NotFoundError):
            self._store().delete(self._named(path))
        Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        """Wait for the uploads."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _store(self) -> CheckpointStore:
        if self._opened is None:
            self._opened = store_of_this_rank(*self._arguments)
        return self._opened

    @staticmethod
    def _named(path: str | Path) -> str:
        try:
            return str(json.loads(Path(path).read_text())["save_id"])
        except (ValueError, KeyError, UnicodeDecodeError):
            raise ConfigError(
                f"{path} is not a checkpoint that CkptstoreCheckpointIO wrote", hint="load it without this plugin"
            ) from None


def _numbered(name: str, objects: list[Any]) -> dict[str, Any]:
    """``{"optimizer": o}`` for one, ``{"optimizer_0": ...}`` for several."""
    return {name: objects[0]} if len(objects) == 1 else {f"{name}_{i}": each for i, each in enumerate(objects)}


def _plain(value: Any) -> Any:
    """Lightning's own dict types as dicts; tensors and leaves as they are."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value
