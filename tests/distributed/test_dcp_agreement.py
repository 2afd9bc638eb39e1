"""All ranks save the same thing or all are told why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dcp_jobs import (
    break_in_the_middle,
    damage_for_one_rank,
    fail_then_go_on,
    late_once,
    lose_a_peer,
    mismatched_target,
    prepare_all,
    replan,
    words,
)
from ranks import DEAD, run_ranks

from ckptstore.errors import SaveFailedError, StateError


def test_words_reach_every_rank_whatever_the_default_device() -> None:
    gathered = [{"r": r, "pad": "x" * r} for r in range(3)]
    assert run_ranks(3, words) == [(["b"], ["x"], (1,), gathered, "from 1")] * 3


def test_all_ranks_raise_the_same_when_one_has_something_that_cannot_be_stored() -> None:
    results = run_ranks(2, fail_then_go_on)
    assert results[0] == results[1]
    message, new_plans = results[0]
    assert "rank 1" in message
    assert "x" in message
    assert new_plans == [True, False]


def test_every_rank_plans_anew_when_one_changes_its_structure() -> None:
    assert run_ranks(2, replan) == [[True, False, True, False]] * 2


def test_all_ranks_raise_when_steps_differ() -> None:
    for result in run_ranks(2, prepare_all, [{"a": 1}, {"a": 1}], [5, 6]):
        assert isinstance(result, SaveFailedError)
        assert "step 5 on rank 0" in str(result)
        assert "step 6 on rank 1" in str(result)


@pytest.mark.parametrize(
    ("odd", "key"),
    [
        pytest.param({"w": torch.tensor([1.0, 2.0]), "n": {"e": 1}}, "w", id="tensor"),
        pytest.param({"w": torch.ones(2), "n": {"e": 2}}, "n.e", id="plain value"),
    ],
)
def test_a_state_error_names_key_and_rank_when_replicas_differ(odd: dict[str, object], key: str) -> None:
    common = {"w": torch.ones(2), "n": {"e": 1}}
    for result in run_ranks(3, prepare_all, [common, odd, common], [1, 1, 1]):
        assert isinstance(result, StateError)
        assert result.context["key"] == key
        assert result.context["ranks"] == [1]
        assert repr(key) in str(result)


@pytest.mark.parametrize(
    ("mode", "saves", "found"), [("full", 1, True), ("sample", 1, False), ("sample", 3, True), ("off", 3, False)]
)
def test_large_replicas_are_compared_in_rotation_or_all_or_never(mode: str, saves: int, found: bool) -> None:
    def state(odd: float) -> dict[str, torch.Tensor]:
        # The rotation looks at one of them per save: the odd one comes third.
        return {"a": torch.zeros(40_000), "b": torch.zeros(40_000), "c": torch.full((40_000,), odd)}

    results = run_ranks(2, prepare_all, [state(0.0), state(1.0)], [1, 1], mode, saves)
    assert [isinstance(result, StateError) for result in results] == [found, found]


def test_shapes_that_differ_are_named_with_their_ranks() -> None:
    for result in run_ranks(2, prepare_all, [{"w": torch.ones(2)}, {"w": torch.ones(3)}], [1, 1]):
        assert isinstance(result, StateError)
        assert result.context["key"] == "w"
        assert result.context["ranks"] == [0, 1]


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_name_the_rank_when_it_dies(victim: int) -> None:
    results = run_ranks(3, lose_a_peer, victim, "die", 15.0)
    assert results.pop(victim) == DEAD
    for message, ranks, seconds in results:
        assert message.startswith("SaveFailedError")
        assert ranks == [victim]
        assert f"rank {victim}" in message
        assert seconds < 10, "a closed connection is noticed at once"


def test_survivors_name_the_rank_when_it_hangs() -> None:
    results = run_ranks(3, lose_a_peer, 1, "hang", 3.0)
    results.pop(1)
    for message, ranks, seconds in results:
        assert message.startswith("SaveFailedError")
        assert ranks == [1]
        assert seconds < 9


def test_the_next_save_works_when_a_rank_was_late_once() -> None:
    for seen in run_ranks(2, late_once, 2.0):
        assert seen[0] == seen[2] == "saved"
        assert seen[1] == "SaveFailedError"


def test_all_hear_of_what_broke_on_one_rank_and_meet_again_when_it_was_interrupted() -> None:
    seen = run_ranks(2, break_in_the_middle, 2.0)
    told = "StateError: rank 1: reading the state failed: RuntimeError: no"
    assert [saves[:2] for saves in seen] == [["saved", told]] * 2
    assert seen[0][2].startswith("SaveFailedError")
    assert seen[1][2].startswith("KeyboardInterrupt")
    assert [saves[5:] for saves in seen] == [["saved", "saved"]] * 2


def test_no_rank_is_touched_when_the_target_of_one_does_not_fit(tmp_path: Path) -> None:
    for message, untouched in run_ranks(2, mismatched_target, tmp_path):
        assert "b" in message
        assert "rank 1" in message
        assert untouched


def test_every_rank_is_told_what_it_has_changed_when_damage_is_found_by_another(tmp_path: Path) -> None:
    for (message, changed), expected in zip(
        run_ranks(2, damage_for_one_rank, tmp_path), [["a", "b"], ["b"]], strict=True
    ):
        assert "rank 1: b is damaged" in message
        assert changed == expected
