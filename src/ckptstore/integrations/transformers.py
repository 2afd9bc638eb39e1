"""transformers: each checkpoint the Trainer writes also goes into a store, and comes back as a folder it resumes from.

store = CheckpointStore("store", remote="s3://bucket/prefix")
trainer = Trainer(..., callbacks=[CkptstoreCallback(store)])
trainer.train(resume_from_checkpoint=resume_path(store, "scratch"))
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptstore.errors import CkptError, ConfigError
from ckptstore.manager.scalars import Scalars, SummaryWriter
from ckptstore.manager.voice import Voice
from ckptstore.policy.retention import Retention
from ckptstore.store import CheckpointStore

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ConfigError("transformers is not installed", hint='pip install "ckptstore[transformers]"') from error

KEY = "transformers"


class CkptstoreCallback(TrainerCallback):
    """Keeps what the Trainer saves: power-cut safe, verified, deduplicated, and uploaded in the background.

    The Trainer decides when (``save_steps``). Its files are taken as they are, so every kind of model it can save can
    be kept. Rank 0 takes the whole folder: with several nodes the output directory must be shared.

    Args:
        store: Yours to close. In a job of several ranks: ``alone.store_of_this_rank(...)``.
        keep: Retention of the store's local and remote tiers; None: nothing is deleted.
        summary_writer: A TensorBoard ``SummaryWriter`` for stall, lag and durable step; may be the Trainer's own.
    """

    def __init__(
        self, store: CheckpointStore, *, keep: Retention | None = None, summary_writer: SummaryWriter | None = None
    ) -> None:
        self.store = store
        self._keep = keep
        self._scalars = Scalars(summary_writer)
        self._voice = Voice(None)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer has written ``checkpoint-<step>``: keep it. A failure is said, and training goes on."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        last = state.log_history[-1] if state.log_history else {}
        metrics = {name: value for name, value in last.items() if isinstance(value, (int, float)) and name != "step"}
        try:
            files = {KEY: read_folder(folder)}
            epoch = int(state.epoch) if state.epoch is not None else None
            begun = time.monotonic()
            handle = self.store.save(files, state.global_step, epoch=epoch, metrics=metrics)
            self._scalars.watch(handle, time.monotonic() - begun, time.monotonic)
            self._scalars.flush()
            if self._keep is not None:
                self._prune()
        except CkptError as error:
            self._voice.warn(f"step {state.global_step} was not kept: {error}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait until everything is on the disk; the node agent goes on with uploads."""
        if state.is_world_process_zero:
            self.store.wait("local")
            self._scalars.flush()

    def _prune(self) -> None:
        assert self._keep is not None
        infos = self.store.checkpoints(include_superseded=True)
        for info in self._keep.decide(infos, "local").drop:
            self.store.delete(info.save_id)


def resume_path(store: CheckpointStore, folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint as ``<folder>/checkpoint-<step>`` for ``resume_from_checkpoint``; None when the run is new.

    Every byte is verified. An incomplete folder of an earlier try is replaced.

    Raises:
        IntegrityError: it is damaged in every tier.
    """
    store.settle()
    info = store.latest()
    if info is None:
        catalog = store.catalog()
        if catalog.damaged:
            catalog.resolve("latest")  # raises: a damaged run is not a new one
        return None
    files = store.read(info.save_id)[KEY]
    target = Path(folder) / f"checkpoint-{info.step}"
    temporary = target.with_name(f".{target.name}.tmp")
    for leftover in (temporary, target):
        if leftover.exists():
            shutil.rmtree(leftover)
    write_folder(files, temporary)
    temporary.rename(target)
    return str(target)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Relative path -> its bytes."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = path.relative_to(folder).as_posix()
            found[name] = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    if not found:
        raise ConfigError(f"{folder} holds no files: is output_dir shared with rank 0?")
    return found


def write_folder(files: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the files below ``folder``; names that would leave it are refused."""
    for name, data in files.items():
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or not parts:
            raise ConfigError(f"the checkpoint has a file of the name {name!r}")
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.numpy().tobytes())
