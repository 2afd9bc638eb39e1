"""Every save of a run, from all tiers at once, and how a person's word for one (``"latest~2"``) finds it.

The catalogue is the union of the tiers' commit points. A tier that can't be listed raises: an error is never "no
checkpoints". Local tiers are read before remote ones, so that a save which leaves the disk because it has reached the
bucket is seen in one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    TransientError,
)
from ckptstore.format.manifest import Parent, Summary
from ckptstore.policy.retention import losses
from ckptstore.repo import names, timelines
from ckptstore.repo.local_save import LocalSave
from ckptstore.repo.record import LOCAL, Damaged, Record
from ckptstore.repo.union import Union
from ckptstore.types import StepLike

__all__ = ["LOCAL", "Catalog", "Damaged", "Record"]

if TYPE_CHECKING:
    from ckptstore.repo.local import LocalTier
    from ckptstore.repo.remote import RemoteTier

_LATEST = re.compile(r"latest(?:~([0-9]{1,9}))?")
_BEST = re.compile(r"best(?::(.+?))?(?::(min|max))?")
_DIGITS = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Catalog:
    """A snapshot of one run.

    Attributes:
        records: Complete saves, oldest first in the order of the run, superseded ones included.
        prepared: Local parts of saves that no tier has committed: to be rolled forward, never to be loaded.
        damaged: Committed saves that can't be described any more.
        unreachable: Remotes left out because they could not be reached, when that was asked for.
    """

    run: str
    records: Sequence[Record] = ()
    prepared: Sequence[LocalSave] = ()
    damaged: Sequence[Damaged] = ()
    unreachable: Mapping[str, TransientError] = field(default_factory=dict)
    _claimed: Callable[[], int] = field(default=lambda: 0, repr=False, compare=False)

    @classmethod
    def read(
        cls,
        local: LocalTier | None,
        remotes: Sequence[RemoteTier],
        run: str,
        *,
        tolerate_unreachable: bool = False,
        elsewhere: Sequence[Summary] = (),
    ) -> Catalog:
        """The union of these tiers, now. One directory listing; two LISTs per remote; summaries only where needed.

        Args:
            local: The local tier; None or an absent store counts as empty.
            remotes: Remote tiers of this run.
            run: Name of the run.
            tolerate_unreachable: Leave out remotes that can't be reached now, provided that the other tiers have
                something to offer: for resuming after the network went, never for deciding that a run is new.
            elsewhere: Saves that are complete on other nodes of this job: their local tiers and this one are one.

        Raises:
            TransientError: a remote can't be reached. Trying again can help.
            CredentialsError, NoStoreError, FormatError, StorageError: a tier can't be listed.
        """
        if local is not None:
            local.exists()  # refuses a newer format; a root that lost its marker still shows its saves
        local_saves = local.saves(run) if local is not None else []
        pins = local.pins(run) if local is not None else set()
        union = Union(run, local_saves, elsewhere)
        pins |= union.read(remotes, tolerate_unreachable=tolerate_unreachable)
        if union.unreachable and not union.summaries:
            raise next(iter(union.unreachable.values()))
        reachable = [remote for remote in remotes if remote.name not in union.unreachable]
        tiers = ([LOCAL] if local is not None else []) + [remote.name for remote in reachable]

        def claimed() -> int:
            """Highest timeline number claimed in any tier."""
            numbers = list(local.timelines(run)) if local is not None else []
            for remote in reachable:
                numbers.extend(remote.timelines())
            return max(numbers, default=0)

        return cls(
            run=run,
            records=union.records(tiers, pins, lambda line: _claim(local, run, line)),
            prepared=[save for save in local_saves if save.state == "prepared" and save.save_id not in union.summaries],
            damaged=union.damaged(),
            unreachable=union.unreachable,
            _claimed=claimed,
        )

    def line(self) -> list[Record]:
        """The current line, oldest first: what counts as checkpoints unless somebody asks for a superseded one."""
        return [record for record in self.records if not record.superseded]

    def latest(self) -> Record | None:
        """The newest save of the current line; None when the run has none."""
        line = self.line()
        return line[-1] if line else None

    def left_out(self) -> tuple[str, ...]:
        """Why something newer than :meth:`latest` may exist: saves that are damaged, remotes that were not asked."""
        latest = self.latest()
        newer = [one for one in self.damaged if latest is None or one.step > latest.step]
        damaged = [f"step {one.step} (save {one.save_id}): {one.reason}" for one in reversed(newer)]
        silent = [f"what only remote {name} has: {error.message}" for name, error in self.unreachable.items()]
        return (*damaged, *silent)

    def best(self, monitor: str, mode: str) -> Record | None:
        """The save of the current line whose metric is best; ties go to the newest.

        A save without the metric, or with NaN, is never best. None when no save qualifies.

        Raises:
            ConfigError: ``mode`` is neither ``min`` nor ``max``.
        """
        if mode not in ("min", "max"):
            raise ConfigError(f"mode is {mode!r}", hint='use "min" or "max"')
        sign = 1.0 if mode == "max" else -1.0
        best: tuple[float, Record] | None = None
        for record in self.line():
            value = record.metric(monitor)
            if value is None or value != value:
                continue
            if best is None or sign * value >= best[0]:
                best = sign * value, record
        return best[1] if best else None

    def only_loss(self) -> str:
        """The one metric of the current line whose name ends in "loss".

        Raises:
            ConfigError: there is none, or there are several.
        """
        metrics = [record.summary.metrics for record in self.line()]
        found = losses(metrics)
        if len(found) != 1:
            known = sorted({name for names in metrics for name in names})
            raise ConfigError(
                f"which metric is best? {len(found) or 'none'} of them end in 'loss'",
                hint=f'say "best:METRIC" or "best:METRIC:max"; the metrics are {", ".join(known) or "none"}',
            )
        return found[0]

    def resolve(self, step: StepLike, monitor: str | None = None, mode: str | None = None) -> Record:
        """The save that ``step`` names: an int, ``"latest"``, ``"latest~2"``, ``"best"``, digits, or a save_id.

        Args:
            step: Steps find saves of the current line only; a save_id finds superseded ones too.
            monitor: Metric for ``"best"``, where the word itself doesn't name one (``"best:val/loss"``); None: the one
                whose name ends in "loss".
            mode: ``"min"`` or ``"max"``, for ``"best"`` (``"best:accuracy:max"``); None: the former.

        Raises:
            ConfigError: it can't be parsed, or it is not clear which metric ``"best"`` is about.
            CheckpointNotFoundError: nothing of this name; the message tells what is nearest.
            IncompleteCheckpointError: a save_id whose parts are not all there.
            IntegrityError: the save is there, but damaged in every tier that has it; or all saves of the run are.
        """
        if isinstance(step, bool) or not isinstance(step, (int, str)):
            raise _unparsable(step)
        if isinstance(step, int) or _DIGITS.fullmatch(step):
            return self._at(int(step))
        if names.is_save_id(step):
            return self._by_id(step)
        if (match := _LATEST.fullmatch(step)) is not None:
            return self._back(int(match[1] or 0))
        if (match := _BEST.fullmatch(step)) is not None:
            if not self.line():
                self._refuse_if_all_damaged()
                raise self._not_found("no checkpoint")
            monitor, mode = match[1] or monitor or self.only_loss(), match[2] or mode or "min"
            found = self.best(monitor, mode)
            if found is None:
                self._refuse_if_all_damaged()
                raise self._not_found(f"no checkpoint with a metric {monitor!r} that is a number")
            return found
        raise _unparsable(step)

    def next_timeline(self) -> int:
        """One more than any timeline number known in any tier. Lists the claims: one LIST per remote.

        Raises:
            CkptError: a tier can't be listed.
        """
        summaries = [record.summary for record in self.records]
        summaries += [save.summary for save in self.prepared if save.summary is not None]
        return 1 + max((self._claimed(), *(summary.timeline for summary in summaries)))

    def parent_for(self, step: int) -> Parent | None:
        """What a timeline that starts by saving ``step`` continues from, if its job did not load anything."""
        return timelines.parent_below([record.summary for record in self.line()], step)

    # ------------------------------------------------------------------ inside

    def _at(self, step: int) -> Record:
        if step < 0:
            raise ConfigError(f"step {step} is negative")
        line = self.line()
        for record in reversed(line):
            if record.step == step:
                return record
        for damaged in self.damaged:
            if damaged.step == step:
                raise _damaged([damaged])
        old = [record.save_id for record in self.records if record.step == step]
        if old:
            raise self._not_found(
                f"no checkpoint at step {step} in its current line",
                hint=f"step {step} was superseded by a newer timeline; name it by save_id: {', '.join(old)}",
            )
        self._refuse_if_all_damaged()
        below = max((r.step for r in line if r.step < step), default=None)
        above = min((r.step for r in line if r.step > step), default=None)
        near = [str(found) for found in (below, above) if found is not None]
        raise self._not_found(f"no checkpoint at step {step}", hint=f"nearest: {' and '.join(near)}" if near else None)

    def _by_id(self, save_id: str) -> Record:
        for record in self.records:
            if record.save_id == save_id:
                return record
        for save in self.prepared:
            if save.save_id == save_id:
                raise IncompleteCheckpointError(
                    f"save {save_id} (step {save.step}) was never completed: parts of it are missing",
                    run=self.run,
                    step=save.step,
                )
        for damaged in self.damaged:
            if damaged.save_id == save_id:
                raise _damaged([damaged])
        latest = self.latest()
        raise self._not_found(
            f"no save {save_id}", hint=f"latest is {latest.save_id} (step {latest.step})" if latest else None
        )

    def _back(self, count: int) -> Record:
        line = self.line()
        if count < len(line):
            return line[-1 - count]
        self._refuse_if_all_damaged()
        if not line:
            raise self._not_found("no checkpoint")
        raise self._not_found(
            f"only {len(line)} checkpoint{'s' if len(line) > 1 else ''}", hint=f"the oldest is step {line[0].step}"
        )

    def _refuse_if_all_damaged(self) -> None:
        """A run whose every save is damaged is not a new run."""
        if self.damaged and not self.records:
            raise _damaged(self.damaged)

    def _not_found(self, what: str, hint: str | None = None) -> CheckpointNotFoundError:
        if hint is None and self.prepared:
            listed = ", ".join(f"step {save.step}" for save in self.prepared)
            hint = f"begun but never completed: {listed}"
        return CheckpointNotFoundError(f"run {self.run!r} has {what}", hint=hint, run=self.run)


def _claim(local: LocalTier | None, run: str, line: timelines.Line) -> timelines.Claim | None:
    """The claim of a line if the local tier still has it and it can be read."""
    record = local.timeline_record(run, line[0]) if local is not None else None
    if record is None:
        return None
    try:
        claim = timelines.Claim.decode(record, what=f"claim of timeline {line[0]}")
    except FormatError:
        return None
    return claim if claim.job == line[1] else None


def _unparsable(step: object) -> ConfigError:
    return ConfigError(
        f"{step!r} does not name a checkpoint", hint='use a step, "latest", "latest~2", "best", or a save_id'
    )


def _damaged(found: Sequence[Damaged]) -> IntegrityError:
    listed = "; ".join(f"step {damaged.step}, save {damaged.save_id} ({damaged.reason})" for damaged in found)
    return IntegrityError(f"damaged in every tier that has it: {listed}", hint="`ckptctl verify` tells what is left")
