"""Plans are kept for the structures a job saves in turn, and ranks never write by different ones."""

from __future__ import annotations

from typing import Any

import pytest
from plan_jobs import structures_in_turn
from ranks import run_ranks

#: Collective calls of a save whose plan is known, and of one that is planned: agree, gather the boxes, agree again.
KNOWN, PLANNED = 1, 3


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    results = run_ranks(2, structures_in_turn)
    for result in results:
        assert isinstance(result, dict), result
    return results


def test_a_structure_is_planned_once_when_two_are_saved_in_turn(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        calls, same, *_ = rank["alternate"]
        assert calls == [PLANNED, PLANNED, KNOWN, KNOWN, KNOWN, KNOWN]
        assert all(same)


def test_the_least_recently_used_plan_goes_first(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        _, _, calls, _ = rank["alternate"]
        assert calls == [PLANNED] * 4 + [KNOWN, PLANNED]
    pieces = sorted(name for rank in ranks for name in rank["alternate"][3])
    assert len(pieces) == len(set(pieces)), "a box is written twice"


def test_all_ranks_plan_when_one_has_forgotten_what_the_others_know(ranks: list[dict[str, Any]]) -> None:
    (calls, first), (others, second) = (rank["alternate_where_one_keeps_less"] for rank in ranks)
    assert calls == others == [PLANNED, PLANNED, PLANNED, KNOWN, PLANNED, KNOWN]
    together = [sorted(a + b) for a, b in zip(first, second, strict=True)]
    assert together == [["a", "b"], ["a"], ["a", "b"], ["a", "b"], ["a"], ["a"]]


def test_all_ranks_plan_when_one_alone_changes_its_structure(ranks: list[dict[str, Any]]) -> None:
    (calls, first), (others, second) = (rank["change_one_rank_alone"] for rank in ranks)
    assert calls == others
    assert (calls[0], calls[1], calls[3], calls[5]) == (PLANNED, PLANNED, KNOWN, KNOWN)
    for there, a, b in zip((False, True, False, False, True, True), first, second, strict=True):
        assert sorted(a + b) == (["a", "mine@rank1"] if there else ["a"])


def test_ranks_understand_each_other_when_they_propose_different_plans(ranks: list[dict[str, Any]]) -> None:
    (seen, calls), (others, other_calls) = (rank["propose_different_plans"] for rank in ranks)
    assert (seen, calls) == (others, other_calls)
    assert seen[:2] == ["saved"] * 2
    assert "StateError" in seen[2]
    assert seen[3:] == ["saved"] * 4
    assert calls[3:] == [PLANNED, PLANNED, KNOWN, KNOWN], "what came of a failed save is not relied upon"


def test_every_large_replica_gets_its_turn_when_it_is_in_every_second_save_only(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["differ_in_every_second_save"].startswith("StateError: 'a' should be the same")


def test_joined_states_are_joined_anew_when_a_parameter_changes_its_group(ranks: list[dict[str, Any]]) -> None:
    calls, groups = ranks[0]["regroup_a_pipeline"]
    assert calls == [PLANNED + 1, PLANNED + 1, KNOWN]
    assert groups[0] == [["0.weight", "0.bias", "1.weight", "1.bias"], []]
    assert groups[1] == groups[2] == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
