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
from ckptstore.errors import CkptError, SaveFailedError, StateError
from ckptstore.format.manifest import Json

#: How many plans are kept: of a whole state, of one without its optimizer, and so on.
PLANS_KEPT = 4


@dataclass(frozen=True)
class Prepared:
    """A save that all ranks agreed on.

    Attributes:
        binding: the live state of this rank.
        plan: what this rank writes; the same object for each save of a structure, as long as its plan is kept. Where it
            is another than at the save before, it is so on all ranks.
        is_new_plan: the plan was made just now.
        flags: names of the flags that at least one rank raised.
    """

    binding: Binding
    plan: Plan
    is_new_plan: bool
    flags: frozenset[str] = field(default_factory=frozenset)


@dataclass
class _Planned:
    """A plan, and what belongs to it.

    Attributes:
        fragments: this rank's, if they are in ``union``: they may change where no tensor does.
        union: rank 0's fragments joined with those of the others.
        saves: how many saves it has served; the same on all ranks.
    """

    plan: Plan
    replicas: ReplicaCheck
    fragments: Mapping[str, Json]
    union: Mapping[str, Json]
    saves: int = 0

    def fits(self, binding: Binding) -> bool:
        return self.plan.fingerprint == binding.fingerprint and (
            not self.union or self.fragments == binding.fragments  # mostly the same objects
        )


class Preparer:
    """Binds, agrees and plans for one store; keeps the plans of the structures it saw last.

    Steady state, also of a job that alternates between structures, costs one bind and one small all-reduce. Not
    thread-safe.

    A rank proposes the last used of its plans that fits its binding. All have to propose the same key, which stands for
    the boxes of all ranks, so it doesn't matter which other plans each of them has. These are nevertheless the same:
    they change with what all ranks know, and where a save failed they are forgotten.

    Args:
        agreement: the ranks.
        check_replicas: how much of the replicas is compared.
        plans_kept: the least recently used of more goes.
    """

    def __init__(self, agreement: Agreement, *, check_replicas: Mode = "sample", plans_kept: int = PLANS_KEPT) -> None:
        self._agreement = agreement
        self._check = check_replicas
        self._binder = Binder(rank=agreement.rank)
        self._plans_kept = plans_kept
        self._plans: dict[int, _Planned] = {}  # by key, the last used last

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
        try:
            if error is None:
                try:
                    binding = self._binder.bind(state)
                except CkptError as refused:
                    error = refused
                except Exception as broken:  # of a state_dict of the user's, say: the peers must hear of that too
                    error = StateError(f"reading the state failed: {type(broken).__name__}: {broken}")
                    error.__cause__ = broken
            return self._settle(binding, step, counter, flags or {}, error)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Local. Rely on no plan that is kept: all ranks plan anew at the next save, whoever of them asked for it.

        That is the way on from whatever failed, as it may have failed on some ranks only.
        """
        self._plans.clear()

    def _settle(
        self, binding: Binding | None, step: int, counter: int, flags: Mapping[str, bool], error: CkptError | None
    ) -> Prepared:
        is_new_plan = False
        while True:
            current = self._fitting(binding)
            outcome = self._agreement.agree(
                same={
                    "step": step,
                    "counter": counter,
                    "plan": current.plan.key if current else 0,
                    "saves": current.saves if current else 0,
                },
                flags={
                    "failed": error is not None,
                    "changed": current is None,
                    **{f"user.{k}": v for k, v in flags.items()},
                },
                sets=self._digests(binding, current),
            )
            if "failed" in outcome.raised:
                self._agreement.raise_together(error, what="preparing the save")
            if outcome.differing & {"step", "counter"}:
                self._raise_different_saves(step, counter)
            assert binding is not None
            if current is not None and "changed" not in outcome.raised and not outcome.differing:
                break
            self._keep(self._planned(binding))
            is_new_plan = True
        if outcome.unequal_sets:
            current.replicas.explain(binding, self._agreement, outcome.unequal_sets, current.saves)
        current.saves += 1
        self._keep(current)
        if self._agreement.rank == 0:
            binding = _of_all_ranks(binding, current)
        raised = frozenset(name.removeprefix("user.") for name in outcome.raised if name.startswith("user."))
        return Prepared(binding, current.plan, is_new_plan, raised)

    def _fitting(self, binding: Binding | None) -> _Planned | None:
        """The last used plan that this rank could write by."""
        if binding is None:
            return None
        return next((each for each in reversed(self._plans.values()) if each.fits(binding)), None)

    def _planned(self, binding: Binding) -> _Planned:
        """A plan for what the ranks hold now. Collective."""
        made = plan(binding, self._agreement)
        union: dict[str, Json] = {}
        if made.extra:
            everyone = self._agreement.gather(dict(binding.fragments), what="joining the states of the ranks")
            union = joined(everyone, made.extra)
        replicas = ReplicaCheck(binding, made, self._agreement.rank, self._check)
        return _Planned(made, replicas, dict(binding.fragments) if union else {}, union)

    def _keep(self, planned: _Planned) -> None:
        """Note the plan as the last used, in place of what was known by its key."""
        self._plans.pop(planned.plan.key, None)
        self._plans[planned.plan.key] = planned
        while len(self._plans) > self._plans_kept:
            del self._plans[next(iter(self._plans))]

    def _digests(self, binding: Binding | None, current: _Planned | None) -> list[int | None]:
        """As many values as any plan has sets: ranks may propose different ones and yet must understand each other."""
        if self._agreement.world_size == 1:
            return []
        count = max((len(each.replicas) for each in self._plans.values()), default=0)
        mine = current.replicas.digests(binding, current.saves) if binding is not None and current is not None else []
        return [*mine, *[None] * (count - len(mine))]

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


def _of_all_ranks(binding: Binding, planned: _Planned) -> Binding:
    """Rank 0's binding with what only the others have: it stores the tree and the ties of all."""
    if len(planned.plan.aliases) > len(binding.aliases):
        binding = replace(binding, aliases=planned.plan.aliases)
    if planned.union:
        binding = replace(binding, tree=with_joined(binding.tree, binding.fragments, planned.union))
    return binding
