"""Filling what is tracked from a checkpoint, and putting the rest of the job back where it was."""

from __future__ import annotations

import logging
from typing import Any

from ckptstore.dcp.markers import PerRank
from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    LoadMismatchError,
    NoStoreError,
)
from ckptstore.manager import compare, resume, rng
from ckptstore.manager.files import file_bytes
from ckptstore.manager.parts import Parts
from ckptstore.manager.resume import Candidates, ResumePoint
from ckptstore.manager.tracking import OWN_KEY, Tracked
from ckptstore.ops import history
from ckptstore.ops.words import counted
from ckptstore.repo.catalog import Catalog
from ckptstore.types import CheckpointInfo, StepLike

_DAMAGED = (IntegrityError, FormatError, IncompleteCheckpointError, CheckpointNotFoundError)


class Loading:
    """The way back of one job. Its methods are Collective."""

    def __init__(self, parts: Parts, *, monitor: str | None, mode: str) -> None:
        self._store, self._progress, self._keeper = parts.store, parts.progress, parts.keeper
        self._safety, self._voice, self._proof = parts.safety, parts.voice, parts.proof
        self._monitor, self._mode = monitor, mode

    def exists(self) -> bool:
        """Whether the run has checkpoints, damaged ones included. Collective."""
        agreement = self._store.agreement
        self._store.settle()

        def look() -> Candidates:
            catalog = self._catalog()
            return Candidates(("some",) if catalog is not None and (catalog.records or catalog.damaged) else ())

        return bool(resume.together(agreement, look, "looking for checkpoints").save_ids)

    def resume(self, tracked: Tracked, step: StepLike) -> ResumePoint:
        """Resume as told: "auto", "ask", "never", or a step.

        Raises:
            CheckpointNotFoundError: the step asked for isn't there.
            IntegrityError: there are checkpoints, and none is whole.
            LoadMismatchError: the checkpoint is of another model; nothing was changed.
        """
        self._store.settle()
        if step == "never":
            return self._start_over()
        found = self._choose("auto" if step == "ask" else step, is_asking=step == "ask")
        if found.start_over:
            return self._start_over()
        if not found.save_ids:
            self._voice.say(f"no checkpoint of run {self._store.run!r} yet: starting from the beginning")
            return self._new()
        for note in found.notes:
            self._voice.say(note, logging.WARNING)
        if not tracked:
            raise ConfigError(
                "resume() before track(): there is nothing to fill", hint="manager.track(model=model, ...)"
            )
        return self.fill(tracked, found, is_resuming=True)

    def fill(self, tracked: Tracked, found: Candidates, *, is_resuming: bool) -> ResumePoint:
        """Fill what is tracked from the first of these saves that is whole."""
        passed: list[str] = []
        for save_id in found.save_ids:
            try:
                info, own, files = self._load(tracked, save_id)
            except _DAMAGED as error:
                if len(found.save_ids) == 1:
                    raise
                passed.append(f"save {save_id}: {error.message}")
                self._voice.say(f"passed over {passed[-1]}", logging.WARNING)
                continue
            return self._put_back(tracked, info, own, files, is_resuming=is_resuming)
        raise IntegrityError(
            f"no checkpoint of run {self._store.run!r} can be loaded: " + "; ".join(passed),
            hint='`ckptctl verify --all` tells what is left; resume="never" starts over',
            run=self._store.run,
        )

    def load(self, target: Tracked, step: StepLike, *, is_resuming: bool) -> ResumePoint:
        """Fill ``target`` from the save that ``step`` names; "auto" for the newest that is sound, if there is any."""
        self._store.settle()
        found = self._choose(step, is_asking=False)
        if not found.save_ids:
            return ResumePoint()
        if not target:
            self._voice.say(
                "load_checkpoint() found nothing to fill: only epoch and step are returned; pass model=, optimizer=, "
                "... or call track() first",
                logging.WARNING,
            )
        return self.fill(target, found, is_resuming=is_resuming)

    # -- inner ----------------------------------------------------------------------------------------------------

    def _choose(self, step: StepLike, *, is_asking: bool) -> Candidates:
        agreement = self._store.agreement
        catalogs: list[Catalog] = []

        def look() -> Candidates:
            catalog = self._catalog()
            if catalog is None:
                if step == "auto":
                    return Candidates()
                raise CheckpointNotFoundError(f"there is no store yet, so no checkpoint {step!r}", run=self._store.run)
            catalogs.append(catalog)
            return resume.find(catalog, step, self._monitor, self._mode)

        found = resume.together(agreement, look, "looking for checkpoints")
        if catalogs and self._keeper is not None:
            self._keeper.learn(catalogs[0])
        if is_asking and found.save_ids:
            if agreement.broadcast(
                resume.is_terminal() if agreement.rank == 0 else None, what="looking for a terminal"
            ):
                records = catalogs[0].line() if catalogs else []
                return resume.ask(agreement, records, found, self._voice.ask)
            self._voice.say('resume="ask" without a terminal: resuming from the newest checkpoint')
        return found

    def _catalog(self) -> Catalog | None:
        try:
            return self._store.catalog()
        except NoStoreError as error:
            if "bucket" in error.context:
                raise
            return None

    def _load(self, tracked: Tracked, save_id: str) -> tuple[CheckpointInfo, dict[str, Any], dict[str, Any]]:
        own: PerRank[dict[str, Any]] = PerRank({})
        files: dict[str, Any] = {}
        state: dict[str, Any] = {**tracked.in_place, OWN_KEY: {"own": own, "files": files}}
        try:
            info = self._store.load(state, save_id)
        except LoadMismatchError as error:
            missing = error.context.get("missing", [])
            others = error.context.get("mismatched", []) or error.context.get("unexpected", [])
            if others or not missing or not all(str(name).startswith(f"{OWN_KEY}.") for name in missing):
                raise LoadMismatchError(
                    f"the checkpoint does not fit what is tracked now: {error.message}",
                    hint='change it back, start over with resume="never", or begin another run with what fits of '
                    "this one: CheckpointStore(...).load(..., strict=False)",
                    **error.context,
                ) from None
            info = self._store.load(tracked.in_place, save_id)  # saved without a manager
        if info is None:
            raise AssertionError("a load that must find something found nothing")
        return info, state[OWN_KEY]["own"].value, state[OWN_KEY]["files"]

    def _put_back(
        self, tracked: Tracked, info: CheckpointInfo, own: dict[str, Any], files: dict[str, Any], *, is_resuming: bool
    ) -> ResumePoint:
        values = dict(own.get("values", {}))
        self._report(tracked, info, own, values, files)
        epoch = own.get("epoch", info.epoch)
        history = values.get("loss_history", own.get("history", []))
        point = ResumePoint(
            step=info.step,
            epoch=epoch if epoch is not None else 0,
            epoch_finished=bool(own.get("epoch_finished", False)),
            history=list(history) if isinstance(history, (list, tuple)) else history,
            state={**values, **{name: file_bytes(stored) for name, stored in files.items()}},
            info=info,
        )
        self._note_proof(tracked, info, own, files)
        if is_resuming:
            self._progress.started_from(info.step, epoch, own.get("epochs_since_save", 0))
            self._progress.history[:] = own.get("history", [])
            self._safety.resumed(info)
            if own.get("rng") is not None:
                self._restore_random_state(own["rng"], info)
        return point

    def _note_proof(self, tracked: Tracked, info: CheckpointInfo, own: dict[str, Any], files: dict[str, Any]) -> None:
        """Remember that this checkpoint came back whole, if all of it was asked for. Collective."""
        agreement = self._store.agreement
        read = {name for name, size in info.report.bytes_by_source.items() if size} if info.report else set()
        sources = set().union(*agreement.gather(read, what="comparing what was read")) - {"peer"}  # the peer's own say
        in_place = set(own.get("names", [])) - set(own.get("values", {})) - set(files)
        is_all = "names" in own and in_place <= set(tracked.in_place) and info.world_size <= agreement.world_size
        if is_all and agreement.rank == 0:
            self._proof.restored(info, sources)
        if self._keeper is not None:
            is_kept = is_all and history.is_of_tiers(sources)
            self._keeper.verified = self._proof.verified() | ({info.save_id} if is_kept else set())

    def _restore_random_state(self, state: dict[str, Any], info: CheckpointInfo) -> None:
        rank = self._store.agreement.rank
        if rank >= info.world_size:
            return  # a rank that did not exist keeps the seed the program gave it, instead of doubling another's
        for problem in rng.restore(state):
            self._voice.warn(problem)

    def _report(
        self, tracked: Tracked, info: CheckpointInfo, own: dict[str, Any], values: dict[str, Any], files: dict[str, Any]
    ) -> None:
        """Say in plain words what is not as it was."""
        for name, current in tracked.compared.items():
            if name in values and (changes := compare.differences(values[name], compare.plain(current))):
                self._voice.say(f"{name} has changed since step {info.step}: {'; '.join(changes)}", logging.WARNING)
        for name, entry in tracked.files.items():
            if name in files and (changes := entry.differences(files[name])):
                self._voice.say(f"{name} has changed since step {info.step}: {'; '.join(changes)}", logging.WARNING)
        world_size = self._store.agreement.world_size
        if info.world_size != world_size:
            more = f"; ranks {info.world_size} and up keep their own seeds" if world_size > info.world_size else ""
            self._voice.say(
                f"saved by {counted(info.world_size, 'rank')}, resumed by {world_size}: random state and loader "
                f"positions are per rank, so the order of samples changes{more}",
                logging.WARNING,
            )
        untouched = sorted(set(own.get("names", [])) - set(tracked.names) - set(values) - set(files))
        if untouched:
            self._voice.say(f"in the checkpoint but not tracked now: {', '.join(untouched)}", logging.WARNING)

    def _start_over(self) -> ResumePoint:
        self._store.start_over()
        self._voice.say("starting over in a new timeline; earlier checkpoints stay until it has its own")
        return self._new()

    def _new(self) -> ResumePoint:
        self._progress.started_from(0, None, 0)
        return ResumePoint()
