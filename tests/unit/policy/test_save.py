"""When a save is due."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import ConfigError
from ckptstore.policy import (
    AnyOf,
    AtSteps,
    BeforeEnd,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    Moment,
    Never,
    OnSignal,
)


@given(every=st.integers(1, 50), steps=st.lists(st.integers(1, 9), min_size=1, max_size=80))
def test_no_more_than_n_steps_pass_between_saves(every: int, steps: list[int]) -> None:
    policy, step, last = EverySteps(every), 0, 0
    for stride in steps:
        step += stride
        if policy.due(Moment(step=step, last_step=last)):
            assert step - last >= every
            last = step
        assert step - last < every


@given(asked=st.sets(st.integers(1, 60), max_size=8), strides=st.lists(st.integers(1, 5), max_size=40))
def test_steps_asked_for_are_saved_once_when_the_loop_jumps_over_them(asked: set[int], strides: list[int]) -> None:
    policy, step, last, saved = AtSteps(tuple(asked)), 0, 0, []
    for stride in strides:
        previous, step = step, step + stride
        if policy.due(Moment(step=step, last_step=last, previous_step=previous)):
            last = step
            saved.append(step)
    reached = {a for a in asked if a <= step}
    assert len(saved) <= len(reached)
    for a in reached:
        assert any(a <= s < a + 5 for s in saved)


def test_an_epoch_counts_when_the_loss_did_not_improve() -> None:
    policy = EveryEpochs(2)
    assert policy.due(Moment(step=9, is_epoch_end=True, epochs_since_save=1)) is None
    assert policy.due(Moment(step=9, is_epoch_end=True, epochs_since_save=2)) == "end of epoch"
    assert policy.due(Moment(step=9, is_epoch_end=False, epochs_since_save=2)) is None


def test_the_end_of_the_allocation_saves_once_when_it_is_near() -> None:
    policy = BeforeEnd(50)
    assert policy.due(Moment(step=1, seconds_left=51)) is None
    assert "ends in 50 s" in str(policy.due(Moment(step=1, seconds_left=50)))
    assert policy.due(Moment(step=1, seconds_left=10, is_end_saved=True)) is None
    assert policy.due(Moment(step=1, seconds_left=math.inf)) is None


def test_rules_combine_when_joined_with_a_bar() -> None:
    policy = EverySteps(500) | EverySeconds(1800) | EveryEpochs(1) | AtSteps((10,)) | OnSignal()
    assert isinstance(policy, AnyOf)
    assert len(policy.parts) == 5
    assert policy.due(Moment(step=1)) is None
    assert policy.due(Moment(step=10, previous_step=9)) == "step 10 was asked for"
    assert policy.due(Moment(step=1, seconds_since_save=1800)) == "1800 s since the last save"
    assert policy.due(Moment(step=1, signal="SIGTERM")) == "SIGTERM arrived"
    assert policy.is_timed
    assert not (EverySteps(1) | OnSignal()).is_timed
    assert Never().due(Moment(step=1, signal="SIGTERM")) is None
    assert hash(policy) == hash(EverySteps(500) | EverySeconds(1800) | EveryEpochs(1) | AtSteps((10,)) | OnSignal())


@pytest.mark.parametrize(
    "make", [lambda: EverySteps(0), lambda: EverySeconds(0), lambda: EveryEpochs(-1), lambda: AtSteps((-1,))]
)
def test_a_rule_refuses_numbers_that_make_no_sense(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]
