"""Everything ranks must settle before a save's first byte is copied, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.binder import Binder, Binding
from ckptstore.dcp.planner import Plan, plan
from ckptstore.dcp.replicas import Mode, ReplicaCheck
from ckptstore.dcp.union import joined, with_joined
from ckptstore.errors import CkptError, SaveFailedError
from ckptstore.format.manifest import Json


@dataclass(frozen=True)
class Prepared:
    """A save that all ranks agreed on.

    Attributes:
        binding: the live state of this rank.
        plan: what this rank writes; the same object as long as the structure of the job stays.
        is_new_plan: the plan was made just now, so the arena needs a new layout.
        flags: names of the flags that at least one rank raised.
    """

    binding: Binding
    plan: Plan
    is_new_plan: bool
    flags: frozenset[str] = field(default_factory=frozenset)


class Preparer:
    """Binds, agrees and plans for one store; keeps the plan between saves.

    Steady state costs one bind and one small all-reduce. Not thread-safe.
    """

    def __init__(self, agreement: Agreement, *, check_replicas: Mode = "sample") -> None:
        self._agreement = agreement
        self._check = check_replicas
        self._binder = Binder(rank=agreement.rank)
        self._plan: Plan | None = None
        self._union: dict[str, Json] = {}
        self._replicas: ReplicaCheck | None = None

    def prepare(
        self,
        state: Mapping[str, Any],
        *,
        step: int,
        counter: int,
        flags: Mapping[str, bool] | None = None,
        error: CkptError | None = None,
    ) -> Prepared:
        """Bind ``state`` and settle with all ranks that it is saved as ``step``. Collective.

        Args:
            counter: number of the save; ranks must agree on it.
            flags: names any rank may raise, such as "busy"; the same names on all ranks. Reported, not interpreted.
            error: a reason this rank already has not to save: raised on all ranks.

        Raises:
            StateError: something can't be stored, or differs between ranks that should hold the same.
            SaveFailedError: a peer was lost, or ranks save different steps.
            CkptError: ``error``, of whichever rank had one.
        """
        binding: Binding | None = None
        if error is None:
            try:
                binding = self._binder.bind(state)
            except CkptError as refused:
                error = refused
        is_new_plan = False
        while True:
            current = self._plan
            fits = binding is not None and current is not None and current.fingerprint == binding.fingerprint
            outcome = self._agreement.agree(
                same={"step": step, "counter": counter, "plan": current.key if current else 0},
                flags={
                    "failed": error is not None,
                    "changed": not fits,
                    **{f"user.{k}": v for k, v in (flags or {}).items()},
                },
                sets=self._digests(binding, current if fits else None, counter),
            )
            if "failed" in outcome.raised:
                self._agreement.raise_together(error, what="preparing the save")
            if outcome.differing & {"step", "counter"}:
                self._raise_different_saves(step, counter)
            if "changed" not in outcome.raised and "plan" not in outcome.differing:
                break
            assert binding is not None
            self._plan = None
            made = plan(binding, self._agreement)
            self._union = {}
            if made.extra:
                everyone = self._agreement.gather(dict(binding.fragments), what="joining the states of the ranks")
                self._union = joined(everyone, made.extra)
            self._plan = made
            self._replicas = ReplicaCheck(binding, self._plan, self._agreement.rank, self._check)
            is_new_plan = True
        assert binding is not None
        assert self._plan is not None
        if outcome.unequal_sets:
            assert self._replicas is not None
            self._replicas.explain(binding, self._agreement, outcome.unequal_sets, counter)
        if self._agreement.rank == 0 and len(self._plan.aliases) > len(binding.aliases):
            binding = replace(binding, aliases=self._plan.aliases)
        if self._agreement.rank == 0 and self._union:
            binding = replace(binding, tree=with_joined(binding.tree, binding.fragments, self._union))
        raised = frozenset(name.removeprefix("user.") for name in outcome.raised if name.startswith("user."))
        return Prepared(binding, self._plan, is_new_plan, raised)

    def _digests(self, binding: Binding | None, current: Plan | None, counter: int) -> list[int | None]:
        """As many values as the agreed plan has sets, whatever this rank has."""
        if self._agreement.world_size == 1 or self._plan is None or self._replicas is None:
            return []
        if binding is None or current is None:
            return [None] * len(self._replicas)
        return self._replicas.digests(binding, counter)

    def _raise_different_saves(self, step: int, counter: int) -> None:
        everyone = self._agreement.gather((step, counter), what="comparing steps")
        steps = sorted({each[0] for each in everyone})
        if len(steps) > 1:
            ranks = {s: [r for r, each in enumerate(everyone) if each[0] == s] for s in steps}
            said = ", ".join(
                f"step {s} on rank{'s' if len(r) > 1 else ''} {', '.join(map(str, r))}" for s, r in ranks.items()
            )
            raise SaveFailedError(
                f"ranks save different steps: {said}", hint="every rank calls save with the same step"
            )
        raise SaveFailedError(
            f"ranks are at different saves: {[each[1] for each in everyone]}",
            hint="every rank makes the same save and load calls in the same order",
        )
