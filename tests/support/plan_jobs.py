"""What ranks do in the tests of jobs that save several structures in turn."""

from __future__ import annotations

from typing import Any

import torch
from dcp_jobs import make, train
from torch import nn

from ckptstore.dcp import agreement as agreement_module
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.markers import per_rank
from ckptstore.dcp.prepare import PLANS_KEPT, Prepared, Preparer
from ckptstore.errors import CkptError
from ckptstore.format import tree


class Turns:
    """Prepares save after save; notes of each how many collective calls it made."""

    def __init__(self, **options: Any) -> None:
        self.agreement = Agreement(deadline_s=10)
        self.preparer = Preparer(self.agreement, **options)
        self.calls: list[int] = []
        self.prepared: list[Prepared] = []

    def save(self, state: Any) -> Prepared:
        before, counter = self.agreement.calls, len(self.calls) + 1
        prepared = self.preparer.prepare(state, step=counter, counter=counter)
        self.calls.append(self.agreement.calls - before)
        self.prepared.append(prepared)
        return prepared

    def try_to_save(self, state: Any) -> str:
        """What came of it: "saved", or the error."""
        try:
            self.save(state)
        except CkptError as error:
            self.calls.append(0)
            return f"{type(error).__name__}: {error}"
        return "saved"


def alternate(rank: int) -> Any:
    """A whole state and its model in turn, then more structures than are kept."""
    model, optimizer, scheduler = make("ddp", 0)
    train(model, optimizer, scheduler)
    states = [{"model": model, "optimizer": optimizer}, {"model": model}]
    turns = Turns()
    for _ in range(3):
        for state in states:
            turns.save(state)
    whole, part, *_ = turns.prepared
    same = [prepared.plan is (whole, part)[i % 2].plan for i, prepared in enumerate(turns.prepared)]
    alternating, turns.calls = turns.calls, []
    many = [{"model": model, "x": torch.ones(i + 1)} for i in range(PLANS_KEPT)]
    for state in (*many, many[0], states[0]):
        turns.save(state)
    return alternating, same, turns.calls, [piece.fqn for piece in turns.prepared[-1].plan.pieces]


def alternate_where_one_keeps_less(rank: int) -> Any:
    """Rank 1 has forgotten what rank 0 still knows."""
    turns = Turns(plans_kept=1 if rank == 1 else PLANS_KEPT)
    states: list[Any] = [{"a": torch.ones(3), "b": torch.ones(4)}, {"a": torch.ones(3)}]
    for which in (0, 1, 0, 0, 1, 1):
        turns.save(states[which])
    written = [sorted(piece.fqn for piece in prepared.plan.pieces) for prepared in turns.prepared]
    return turns.calls, written


def change_one_rank_alone(rank: int) -> Any:
    """Rank 1's structure goes forth and back, rank 0's stays."""
    turns = Turns()
    for there in (False, True, False, False, True, True):
        turns.save({"a": torch.ones(3), "mine": per_rank(torch.ones(2) if there and rank == 1 else 5)})
    return turns.calls, [[piece.fqn for piece in prepared.plan.pieces] for prepared in turns.prepared]


def propose_different_plans(rank: int) -> Any:
    """Ranks save different ones of the structures all know, whose replicas are in different numbers of sets."""
    agreement_module._VOTES_MULTIPLE = 1  # nothing makes up for votes that one rank has and the other lacks
    turns = Turns()
    states: list[Any] = [
        {"mine": per_rank(torch.ones(2)), "n": 1},
        {"mine": per_rank(torch.ones(2)), "a": torch.ones(3)},
    ]
    seen = [turns.try_to_save(states[which]) for which in (0, 1, rank, 0, 1, 0, 1)]
    return seen, turns.calls


def differ_in_every_second_save(rank: int) -> str:
    """One of two large replicas differs; both are in the whole state only, which is saved at every second save."""
    turns = Turns()
    whole = {"a": torch.full((40_000,), float(rank)), "b": torch.zeros(40_000)}
    seen = [turns.try_to_save(state) for state in (whole, {"n": 1}, whole)]
    return next((what for what in seen if what != "saved"), "saved")


def regroup_a_pipeline(rank: int) -> Any:
    """Two stages of a pipeline; then one parameter of each changes its group, and no tensor changes."""
    model = nn.ModuleDict({str(rank): nn.Linear(2, 2)})
    weight, bias = model.parameters()
    optimizer = torch.optim.SGD([{"params": [weight, bias]}, {"params": [], "lr": 1.0}], lr=0.1, momentum=0.9)
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    optimizer.step()
    turns = Turns()
    turns.save({"m": model, "o": optimizer})
    for group, parameter in zip(optimizer.param_groups, (weight, bias), strict=True):
        group["params"] = [parameter]
    turns.save({"m": model, "o": optimizer})
    turns.save({"m": model, "o": optimizer})
    trees = [tree.decode(prepared.binding.tree, lambda ref: ref) for prepared in turns.prepared]
    return turns.calls, [[group["params"] for group in each["o"]["param_groups"]] for each in trees]


def structures_in_turn(rank: int) -> dict[str, Any]:
    """All of the above in one job."""
    jobs = (
        alternate, alternate_where_one_keeps_less, change_one_rank_alone, differ_in_every_second_save,
        regroup_a_pipeline, propose_different_plans,
    )  # fmt: skip
    return {job.__name__: job(rank) for job in jobs}
