"""The object a training loop holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError
from ckptstore.manager import resume as resuming
from ckptstore.manager.agenda import Agenda
from ckptstore.manager.block import Block
from ckptstore.manager.grace import end_of_allocation, grace_of
from ckptstore.manager.live import Live
from ckptstore.manager.loading import Loading
from ckptstore.manager.options import check_signals, default_policy, open_store, remote_retention
from ckptstore.manager.parts import Parts
from ckptstore.manager.plainly import plainly
from ckptstore.manager.resume import ResumePoint
from ckptstore.manager.saving import Occasion, OnFailure, Saver
from ckptstore.manager.scalars import Scalars, SummaryWriter
from ckptstore.manager.tracking import Tracked
from ckptstore.manager.voice import Voice
from ckptstore.policy import SavePolicy
from ckptstore.policy.retention import BEST, Retention
from ckptstore.store import CheckpointStore, SaveHandle
from ckptstore.types import StepLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CheckpointManager:
    """Saves when it is due, resumes where the run left off, and loses nothing when the job is ended.

    Creating one is free and local. ``resume``, ``step``, ``epoch_end``, ``save_checkpoint``, ``load_checkpoint`` and
    ``has_checkpoints`` are Collective: every rank calls them in the same order, with the same step.

    Args:
        save_dir: Root of the local tier; or ``store``.
        store: A store of yours, which is yours to close.
        run: Names what outlives jobs; None: ``$CKPTSTORE_RUN``, else ``model_name``, else "default".
        model_name: Used as the run's name; characters a run name can't have become "-".
        remote: URL or URLs as for CheckpointStore; None: ``$CKPTSTORE_REMOTE``.
        logger: Where the manager's lines go; without any logging handler they go to rank 0's stderr.
        summary_writer: A TensorBoard ``SummaryWriter``, or anything with ``add_scalar``.
        save_every_steps: Save when this many steps have passed since the last save of any kind; 0: off.
        save_every_seconds: The same in seconds.
        save_freq: Save at the end of every so many epochs, whatever the loss did; 0: off.
        policy: A save policy of your own instead of these three.
        keep_last: Checkpoints that stay: the newest N, ...
        keep_best: ... the K best by ``monitor``, ...
        keep_every_steps: ... one every M steps, ...
        keep_newer_seconds: ... those saved at most so long before the newest; 0 turns a rule off, ...
        keep_tags: ... and what bears one of these tags. Pinned ones stay anyway.
        keep_remote: Retention of the remotes; None: the same.
        monitor: Metric that tells which is best; None: the one whose name ends in "loss".
        mode: "min" or "max".
        resume: "auto", "ask" (at rank 0's terminal), "never" (a new timeline), or a step.
        save_on_signal: Signals that end the job with an emergency save.
        grace_seconds: Time between the signal and the kill; None: 25.
        save_on_exception: Save before an exception leaves the ``with`` block, if the state is whole.
        on_save_failure: "warn" and train on, "raise", or "stop" the job in order.
        max_save_failures: With "warn": raise after so many failures in a row.
        remind_restore_seconds: Warn when no restore was verified for so long; 0: never.

    Raises:
        ConfigError: arguments that can't be right together.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        store: CheckpointStore | None = None,
        run: str | None = None,
        model_name: str | None = None,
        remote: str | Sequence[str] | Mapping[str, str] | None = None,
        config: StoreConfig | None = None,
        process_group: ProcessGroup | None = None,
        logger: logging.Logger | None = None,
        summary_writer: SummaryWriter | None = None,
        save_every_steps: int = 500,
        save_every_seconds: float = 1800,
        save_freq: int = 1,
        policy: SavePolicy | None = None,
        keep_last: int = 5,
        keep_best: int = 1,
        keep_every_steps: int = 0,
        keep_newer_seconds: float = 0,
        keep_tags: Sequence[str] = (),
        keep_remote: Retention | Mapping[str, Any] | None = None,
        monitor: str | None = None,
        mode: str = "min",
        resume: StepLike = "auto",
        save_on_signal: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1"),
        grace_seconds: float | None = None,
        save_on_exception: bool = True,
        on_save_failure: OnFailure = "warn",
        max_save_failures: int = 5,
        remind_restore_seconds: float = 7 * 86400,
    ) -> None:
        if save_dir is not None and store is not None:
            raise ConfigError("a manager takes either save_dir or store", hint='CheckpointManager("checkpoints")')
        if store is not None and any(each is not None for each in (run, remote, config, process_group)):
            raise ConfigError(
                "run, remote, config and process_group belong to the store you passed",
                hint="give them to CheckpointStore(...), or pass save_dir instead",
            )
        if on_save_failure not in ("warn", "raise", "stop") or max_save_failures < 1:
            raise ConfigError('on_save_failure is "warn", "raise" or "stop"; max_save_failures is >= 1')
        self._resume = resuming.check_mode(resume)
        self._grace_s = grace_of(grace_seconds, os.environ)
        self._end = end_of_allocation(os.environ)
        self._policy = policy or default_policy(
            save_every_steps, save_every_seconds, save_freq, (self._grace_s if self._end else None)
        )
        retention = Retention(keep_last, keep_best, keep_every_steps, monitor, mode, keep_newer_seconds, keep_tags)
        remote_rules = remote_retention(keep_remote, retention)
        names = check_signals(save_on_signal)
        self.store = store or open_store(
            save_dir, run=run, model_name=model_name, remote=remote, config=config, process_group=process_group
        )
        self.point = ResumePoint()
        parts = Parts.of(
            self.store,
            Scalars(summary_writer),
            Voice(logger),
            owns_store=store is None,
            local=retention,
            remote=remote_rules,
            remind_s=remind_restore_seconds,
        )
        self._tracked, self._progress, self._voice = parts.tracked, parts.progress, parts.voice
        self._scalars, self._children, self._guard = parts.scalars, parts.children, parts.guard
        self._children.shelter(CheckpointManager.__exit__)
        self._saver = Saver(parts, on_failure=on_save_failure, max_failures=max_save_failures)
        self._loading = Loading(parts, monitor=monitor, mode=mode)
        self._block = Block(
            parts, self._saver, names=names, grace_s=self._grace_s, saves_on_exception=save_on_exception
        )
        self._agenda: Agenda | None = None
        self._live = Live(self.store.local, self.store.run, lambda: self._tracked.optimizers)

    def __repr__(self) -> str:
        return f"CheckpointManager({self.store!r}, tracked={self._tracked.names}, step={self._progress.step})"

    # -- what is saved --------------------------------------------------------------------------------------------

    def track(self, **objects: Any) -> CheckpointManager:
        """Name what belongs to the training state: ``track(model=model, optimizer=opt, best=lambda: best)``.

        Modules, optimizers, schedulers, scalers, EMA, tensors, dicts and lists are filled in place at resume. Loaders,
        samplers and generators are kept per rank. A callable is asked at each save, and its value comes back in
        ``point.state``. ``config`` and tokenizers are compared at resume, and differences are said. None is left out.

        Raises:
            StateError: something can't be kept; names it and what to track instead.
        """
        self._tracked.add(objects)
        if self._block.phase == "inside":
            self._guard.watch(self._tracked.optimizers)
        return self

    def draw(self, writer: SummaryWriter) -> CheckpointManager:
        """Draw stall, lag and durable step there, unless ``summary_writer`` was given."""
        self._scalars.offer(writer)
        return self

    # -- finding the way back -------------------------------------------------------------------------------------

    @plainly
    def resume(self, step: StepLike | None = None) -> ResumePoint:
        """Fill what is tracked from the checkpoint that ``resume=`` asks for, random state included. Collective.

        With "auto" that is the newest sound one in any tier; damaged ones are passed over, and said. A run without
        checkpoints gives a point that is false, with step 0.

        Args:
            step: Instead of the constructor's ``resume``.

        Raises:
            CheckpointNotFoundError: the step asked for isn't there.
            IntegrityError: there are checkpoints, and none is whole: never a silent start from zero.
            LoadMismatchError: the checkpoint is of another model; nothing was changed.
        """
        point = self._loading.resume(self._tracked, resuming.check_mode(step) if step is not None else self._resume)
        self._adopt(point)
        return point

    @plainly
    def has_checkpoints(self) -> bool:
        """Whether the run has checkpoints in any tier, damaged ones included. Collective.

        Raises:
            StorageError: a tier can't be listed; that is never "none".
        """
        return self._loading.exists()

    @plainly
    def load_checkpoint(
        self,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        *,
        latest: bool = True,
        best: bool = False,
        step: StepLike | None = None,
        **others: Any,
    ) -> tuple[int, int]:
        """Fill these objects, or what is tracked, and return (epoch, step): (0, 0) when the run is new. Collective.

        ``manager.point`` tells the rest: history, plain values, whether the epoch was finished. Random state is
        restored when the latest is loaded, to train on; not with ``best=True`` or ``step=``.

        Args:
            latest: The newest sound checkpoint.
            best: The best one by ``monitor``, or the newest saved with ``is_best=True``.
            step: This one.
        """
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **others}
        target = self._tracked
        if any(value is not None for value in given.values()):
            target = Tracked()
            target.add(given)
        is_resuming = step is None and not best
        if not (latest or best or step is not None):
            raise ConfigError("load_checkpoint: which one?", hint="latest=True, best=True or step=...")
        which = step if step is not None else "best" if best else "auto"
        point = self._loading.load(target, which, is_resuming=is_resuming)
        if is_resuming:
            self._adopt(point)
        self.point = point
        return point.epoch, point.step

    # -- saving ---------------------------------------------------------------------------------------------------

    def step(
        self, step: int, *, epoch: int | None = None, metrics: Mapping[str, Any] | None = None
    ) -> SaveHandle | None:
        """Tell that optimizer step ``step`` is complete; saves if that is due. Collective.

        The first call also has the store prepared, so that the first save waits for little beyond its copy.

        Args:
            step: Optimizer steps done.
            epoch: The epoch this step belongs to.
            metrics: Name -> one number; only read when a save is taken, so a loss tensor may be passed as it is. Plain
                numbers, and tensors on the host, also show in the dashboard as they come, about one a second.

        Returns:
            The save that was taken, or None.

        Raises:
            Preempted: after the emergency save that SIGTERM or SIGUSR1 asked for. KeyboardInterrupt after SIGINT.
            SaveFailedError: as ``on_save_failure`` says.
        """
        with self._children:
            self._progress.advance(step, epoch, metrics)
            self._guard.mark()
            agenda = self._agenda or self._begin()
            block = self._block
            signal, reason = agenda.at_step(block.pending, is_watching=block.watch is not None)
            if signal is not None:
                block.stop(signal, metrics, can_save=agenda.can_save)
            handle = None
            if reason is not None and not self._progress.is_saved(step):
                handle = self._save(Occasion(step, self._progress.epoch, metrics, reason=reason))
            elif not self._saver.is_ready:
                self._saver.rehearse(Occasion(step, self._progress.epoch))
            self._scalars.flush()
            if self.store.agreement.rank == 0:
                self._live.note(step, self._progress.epoch, metrics)
            return handle

    def epoch_end(self, epoch: int, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """Tell that an epoch is complete; saves if due, with ``metrics`` or else the last step's. Collective."""
        progress = self._progress
        step = progress.step or 0
        progress.epoch = epoch
        progress.epochs_since_save += 1
        reason = self._policy.due(progress.moment(is_epoch_end=True, timed=False))
        if reason is None or progress.is_saved(step):
            return None
        with self._children:
            told = metrics if metrics is not None else progress.metrics
            return self._save(Occasion(step, epoch, told, is_epoch_end=True, reason=reason))

    def save_checkpoint(
        self,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        epoch: int | None = None,
        global_step: int | None = None,
        loss_history: Any = None,
        metrics: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        config: Any = None,
        is_best: bool = False,
        is_emergency: bool = False,
        *,
        epoch_finished: bool | None = None,
        **others: Any,
    ) -> SaveHandle | None:
        """Save now. What is passed is tracked from here on. Collective.

        Args:
            global_step: Optimizer steps done; None: the last step that was told, else the epoch.
            metrics: As for :meth:`step`; None: what was told with that step.
            loss_history: Any list of yours; comes back as ``point.history``.
            is_best: Marks the checkpoint for ``load_checkpoint(best=True)`` and ``keep_best``.
            is_emergency: Marks it as made because the job is ending.
            epoch_finished: Whether ``epoch`` is complete; None: yes, unless it is an emergency.
            others: Whatever else belongs to the state, as for :meth:`track`.

        Returns:
            The save; None if it failed and ``on_save_failure`` says to go on.
        """
        self.track(
            **{
                "model": model,
                "optimizer": optimizer,
                "scheduler": scheduler,
                "tokenizer": tokenizer,
                "config": config,
                **others,
            }
        )
        if loss_history is not None:
            self._tracked.add({"loss_history": lambda: loss_history})
        progress = self._progress
        step = global_step if global_step is not None else progress.step if progress.step is not None else epoch or 0
        if progress.step != step:
            progress.advance(step, epoch)
        progress.epoch = epoch if epoch is not None else progress.epoch
        is_end = epoch_finished if epoch_finished is not None else epoch is not None and not is_emergency
        tags = (BEST,) if is_best else ()
        with self._children:
            self._guard.mark()
            told = metrics if metrics is not None else progress.metrics
            handle = self._save(
                Occasion(step, progress.epoch, told, tags, is_emergency, is_epoch_end=is_end, reason="asked for")
            )
            self._scalars.flush()
            return handle

    # -- beginning and end ----------------------------------------------------------------------------------------

    def __enter__(self) -> CheckpointManager:
        self._block.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._block.leave(error)
        finally:
            self._live.close()

    def close(self, timeout_s: float = 600) -> None:
        """Wait for what is on its way, then let go. Idempotent; leaving the ``with`` block does it.

        Raises:
            SaveFailedError: the last save failed.
            SaveTimeoutError: uploads are not finished; the agent goes on with them.
        """
        self._live.close()
        self._block.close(timeout_s)

    # -- inner ----------------------------------------------------------------------------------------------------

    def _begin(self) -> Agenda:
        """Only now is it sure that ``torch.distributed`` is initialised, if it ever is."""
        self._agenda = Agenda(
            self._policy,
            self._progress,
            self.store.agreement,
            end=self._end,
            grace_s=self._grace_s,
            voice=self._voice,
        )
        return self._agenda

    def _save(self, occasion: Occasion) -> SaveHandle | None:
        handle = self._saver.save(occasion)
        if handle is not None and self._agenda is not None:
            self._agenda.met()
        return handle

    def _adopt(self, point: ResumePoint) -> None:
        self.point = point
        if (info := point.info) is not None:
            self._scalars.loaded(info)
            self._voice.say(f"resumed step {info.step} ({resuming.source(info)}, {resuming.age(info.created_at)})")
