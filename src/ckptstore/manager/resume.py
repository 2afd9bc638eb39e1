"""Finding where a run left off, and getting there."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import CkptError, ConfigError, IntegrityError
from ckptstore.policy.retention import SUSPECT
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.types import CheckpointInfo, StepLike

#: How long a question may stay unanswered; then the newest checkpoint is resumed, which loses nothing.
ASK_S = 300.0
_ASK_SLICE_S = 5.0


@dataclass(frozen=True)
class ResumePoint:
    """Where training goes on.

    Attributes:
        step: optimizer steps done; 0 when the run is new.
        epoch: epoch of the last step; 0 when the run is new.
        epoch_finished: that epoch was complete: go on with the next one.
        history: the ``loss_history`` that was saved, else one entry per save: step, epoch and its metrics.
        state: name -> plain value that was tracked by a callable; config and tokenizer files as they were saved.
        info: the checkpoint; None when the run is new.
    """

    step: int = 0
    epoch: int = 0
    epoch_finished: bool = False
    history: list[Any] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    info: CheckpointInfo | None = None

    def __bool__(self) -> bool:
        return self.info is not None

    @property
    def next_epoch(self) -> int:
        """The epoch to go on with: the next one if that of the checkpoint was complete."""
        return self.epoch + 1 if self and self.epoch_finished else self.epoch


@dataclass(frozen=True)
class Candidates:
    """What rank 0 found: saves to try, best first, and what there is to say."""

    save_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    start_over: bool = False


def find(catalog: Catalog, step: StepLike, monitor: str | None, mode: str) -> Candidates:
    """Saves to try in turn. With "auto": the current line from its newest, suspect ones left out.

    Raises:
        CheckpointNotFoundError, ConfigError: as ``Catalog.resolve``, for an explicit step.
        IntegrityError: there are checkpoints, but none that can be resumed from.
    """
    if step != "auto":
        return Candidates((catalog.resolve(step, monitor=monitor, mode=mode).save_id,))
    line = catalog.line()
    sound = [record for record in reversed(line) if SUSPECT not in record.summary.tags]
    suspect = [record.step for record in line if SUSPECT in record.summary.tags]
    newest = sound[0].step if sound else -1
    notes = tuple(
        f"passed over step {each}: its state has values that are not finite" for each in suspect if each > newest
    )
    if line and not sound:
        raise IntegrityError(
            f"every checkpoint of run {catalog.run!r} holds values that are not finite",
            hint=f'resume={line[-1].step} resumes one all the same; resume="never" starts over',
            run=catalog.run,
        )
    notes += tuple(f"passed over {each}" for each in catalog.left_out())
    if not line:
        catalog_is_empty(catalog)
    return Candidates(tuple(record.save_id for record in sound), notes)


def catalog_is_empty(catalog: Catalog) -> None:
    """Nothing for a run without checkpoints; a run whose checkpoints are all damaged is not a new one.

    Raises:
        IntegrityError: names them.
    """
    if catalog.damaged:
        catalog.resolve("latest")


def ask(agreement: Agreement, records: Sequence[Record], found: Candidates, out: Callable[[str], None]) -> Candidates:
    """Let a person at rank 0's terminal choose. Collective; nobody waits longer than a while."""
    answer: str | None = None
    begun = time.monotonic()
    if agreement.rank == 0:
        out("found checkpoints:")
        for record in records[-5:]:
            out("  " + describe(record.info()))
        out("resume from the newest? [Y]es, [n]o (start over), or a step:")
    while True:
        if agreement.rank == 0:
            answer = _answer(_ASK_SLICE_S)
            if answer is None and time.monotonic() - begun > ASK_S:
                out("no answer: resuming from the newest")
                answer = ""
        answer = agreement.broadcast(answer, what="waiting for an answer at rank 0's terminal")
        if answer is None:
            continue
        choice = _chosen(answer, records, found)
        if choice is not None:
            return choice
        out(f"{answer!r} is none of the steps; yes, no, or a step:")
        answer = None


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    try:
        return sys.stdin is not None and sys.stdin.isatty()
    except ValueError:
        return False


def _answer(timeout_s: float) -> str | None:
    ready, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return sys.stdin.readline().strip() if ready else None


def _chosen(answer: str, records: Sequence[Record], found: Candidates) -> Candidates | None:
    if answer.lower() in ("", "y", "yes"):
        return found
    if answer.lower() in ("n", "no"):
        return Candidates(start_over=True)
    matches = [record.save_id for record in records if str(record.step) == answer]
    return Candidates(tuple(matches[-1:])) if matches else None


def describe(info: CheckpointInfo) -> str:
    """``step 12400  epoch 3  4 min ago  loss 0.52``."""
    parts = [f"step {info.step}"]
    if info.epoch is not None:
        parts.append(f"epoch {info.epoch}")
    parts.append(age(info.created_at))
    parts += [f"{name} {value:.4g}" for name, value in list(info.metrics.items())[:4]]
    parts += list(info.tags) + (["emergency"] if info.emergency else [])
    return "  ".join(parts)


def age(when: datetime) -> str:
    """``3 min ago``."""
    seconds = max(0.0, (datetime.now(timezone.utc) - when).total_seconds())
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def source(info: CheckpointInfo) -> str:
    """Where most bytes came from; ``memory`` is the node agent's."""
    taken = dict(info.report.bytes_by_source) if info.report else {}
    place = max(taken, key=lambda name: taken[name]) if taken else next(iter(info.tiers), "nowhere")
    return "memory" if place == "arena" else place


def check_mode(resume: StepLike) -> StepLike:
    """The value given as ``resume=``.

    Raises:
        ConfigError: nothing a checkpoint could be called.
    """
    if isinstance(resume, bool) or not isinstance(resume, (int, str)) or resume == "":
        raise ConfigError(f"resume is {resume!r}", hint='use "auto", "ask", "never" or a step')
    return resume


def together(agreement: Agreement, choose: Callable[[], Candidates], what: str) -> Candidates:
    """Rank 0's choice on every rank, or its error. Collective."""
    found: Candidates | None = None
    error: CkptError | None = None
    if agreement.rank == 0:
        try:
            found = choose()
        except CkptError as failure:
            error = failure
    agreement.together(error, what=what)
    found = agreement.broadcast(found, what=what)
    if found is None:
        raise AssertionError("rank 0 chose nothing and raised nothing")
    return found
