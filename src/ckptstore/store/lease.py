"""What a rank is lent by its agent: memory in the layout of one plan, of which a save takes a free generation."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from ckptstore.agent.arena import Arena
from ckptstore.agent.client import AgentClient
from ckptstore.agent.pages import Pages
from ckptstore.config import StoreConfig
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.planner import Plan
from ckptstore.dcp.stage import Stage
from ckptstore.errors import CkptError, StorageError, TransientError
from ckptstore.repo.durable import raise_for_errno
from ckptstore.store.link import AgentLink

log = logging.getLogger("ckptstore")


def as_ckpt_error(error: Exception) -> CkptError:
    """The error as peers hear of it, who would wait for this rank otherwise; what nobody foresaw stops no training."""
    if isinstance(error, CkptError):
        return error
    try:
        if isinstance(error, OSError):
            raise_for_errno(error, "this rank can't save")
        raise StorageError(f"unexpected {type(error).__name__}: {error}") from error
    except CkptError as foreign:
        return foreign


class Taken(NamedTuple):
    """A generation to copy into; whoever has it seals it or gives it back."""

    generation: int
    image: memoryview
    pages: Pages
    stage: Stage
    layout_id: str


class Lease:
    """One rank's arena, and how long it is waited for. Not thread-safe.

    Attributes:
        plan: whose layout the arena has or is to get; the same on all ranks.
        arena: what is lent; None before the first save and after another agent or plan.
    """

    def __init__(self, link: AgentLink, agreement: Agreement, config: StoreConfig) -> None:
        self.plan: Plan | None = None
        self.arena: Arena | None = None
        self._link, self._agreement, self._config = link, agreement, config
        self._stage: Stage | None = None
        self._lender: AgentClient | None = None
        self._generation: int | None = None

    @property
    def is_busy(self) -> bool:
        """Whether all generations are still being written, as far as was waited."""
        return self.plan is not None and self._generation is None

    def ask(self, save_id: str) -> None:
        """Local. Take a free generation in the layout of the plan, if there is one; waits for one turn.

        Raises:
            NoSpaceError: not enough memory.
            TransientError: the agent was lost.
        """
        if self.plan is None:
            return
        timeout = self._turns[1]
        client = self._link.client
        if self._lender is not client:
            self._forget()  # it went with its agent
        if self.arena is None:
            self._lender = client
            try:
                self.arena = client.layout(self.plan.pieces, timeout_s=timeout)
            except TransientError as error:
                if "is_busy" not in error.context:
                    raise
                return
            self._stage = Stage(self.plan, self.arena.starts)
            if self.arena.is_on_disk:
                log.warning("memory is short: saves are staged through the disk and hold training up meanwhile")
        self._generation = client.reserve(timeout, save_id=save_id)

    def settle(self, plan: Plan, save_id: str, *, is_busy: bool) -> bool:
        """Collective. A free generation on every rank, in turns of waiting; False if one of them still has none.

        Args:
            plan: of this save.
            is_busy: whether some rank has none after :meth:`ask`.

        Raises:
            CkptError: of whichever rank had one; there is no plan any more.
        """
        turns = self._turns[0]
        if plan is not self.plan:  # on all ranks, or on none: another structure needs another image
            self.release()
            self._forget()
            self.plan = plan
        elif not is_busy:
            return True
        else:
            turns -= 1  # one was waited for before
        for _ in range(turns):
            error: CkptError | None = None
            try:
                if self._generation is None:
                    self.ask(save_id)
            except Exception as failure:
                error = as_ckpt_error(failure)
            try:
                outcome = self._agreement.agree(same={}, flags={"failed": error is not None, "busy": self.is_busy})
                if "failed" in outcome.raised:
                    self._agreement.raise_together(error, what="laying out the arena")
            except BaseException:
                self.plan = None
                raise
            if "busy" not in outcome.raised:
                return True
        return False

    @property
    def _turns(self) -> tuple[int, float]:
        """How often, and how many seconds each time, a rank waits for its arena before its peers hear of it again.

        By the policy for back-pressure; a turn is well within the deadline of peers that wait for nothing.
        """
        if self._config.back_pressure != "wait":
            return 1, 0.0
        turn = min(self._config.back_pressure_timeout_s, self._config.deadline_s / 3)
        return math.ceil(self._config.back_pressure_timeout_s / turn), turn

    def take(self) -> Taken:
        """Local. The generation that was settled on; from here on it is the caller's."""
        generation, self._generation = self._generation, None
        if self.arena is None or self._stage is None or generation is None:
            raise AssertionError("agreed to copy without an arena")
        arena = self.arena
        return Taken(generation, arena.generations[generation], arena.pages[generation], self._stage, arena.layout_id)

    def release(self) -> None:
        """Local. Give a generation back that was not taken."""
        generation, self._generation = self._generation, None
        if generation is not None:
            self._link.release(generation)

    def _forget(self) -> None:
        if self._stage is not None:
            self._stage.forget()
        self.arena = self._stage = None
