"""The manager on several ranks: one decision for all, and the same state for each."""

from __future__ import annotations

from pathlib import Path

from manager_jobs import (
    bereaved,
    drifting,
    fall_back,
    overhead,
    raising,
    resized,
    signalled,
    struck,
    timed,
    told_apart,
    train,
)
from ranks import DEAD, run_ranks


def test_twice_n_steps_equal_n_and_a_restore_and_n_on_two_ranks(tmp_path: Path) -> None:
    straight = run_ranks(2, train, tmp_path / "a", 18, (9,), 0, False)
    assert isinstance(straight[0], dict), straight
    run_ranks(2, train, tmp_path / "b", 9, (9,), 0, False)
    resumed = run_ranks(2, train, tmp_path / "b", 18, (9,), 5, True)
    assert resumed == straight
    assert straight[0]["rng"] != straight[1]["rng"]


def test_all_ranks_go_to_the_next_older_when_one_finds_damage_while_loading(tmp_path: Path) -> None:
    assert run_ranks(2, fall_back, tmp_path) == [(1, True), (1, True)]


def test_all_ranks_save_the_same_step_when_one_gets_the_signal(tmp_path: Path) -> None:
    results = run_ranks(2, signalled, tmp_path, 1, 0.01)
    assert [code for code, *_ in results] == [143, 143], results
    (_, step0, took0, done0), (_, step1, took1, done1) = results
    assert step0 == step1 == done0 == done1
    assert max(took0, took1) < 8


def test_rank_zeros_clock_decides_when_clocks_differ(tmp_path: Path) -> None:
    first, second = run_ranks(2, timed, tmp_path)
    assert first == second, (first, second)
    assert 2 <= len(first) <= 6


def test_a_rank_that_evaluates_alone_throws_nobody_out(tmp_path: Path) -> None:
    assert run_ranks(2, drifting, tmp_path) == [[50, 100], [50, 100]]


def test_an_exception_on_all_ranks_saves_their_last_step(tmp_path: Path) -> None:
    for message, seconds, latest in run_ranks(2, raising, tmp_path, (0, 1)):
        assert (message, latest) == ("loss is bad", 7)
        assert seconds < 10


def test_an_exception_on_one_rank_leaves_the_last_save_and_ends_in_time(tmp_path: Path) -> None:
    result = run_ranks(2, raising, tmp_path, (1,))
    assert result[0] == DEAD
    message, seconds, latest = result[1]
    assert (message, latest) == ("loss is bad", 5)
    assert seconds < 22


def test_a_rank_whose_peer_died_still_obeys_sigterm(tmp_path: Path) -> None:
    result = run_ranks(2, bereaved, tmp_path)
    assert result[1] == DEAD
    code, seconds, latest = result[0]
    assert (code, latest) == (143, 20)
    assert seconds < 5


def test_new_ranks_keep_their_own_randomness_when_the_world_grows(tmp_path: Path) -> None:
    before = run_ranks(2, resized, tmp_path, False)
    after = run_ranks(3, resized, tmp_path, True)
    assert [seen for seen, _ in after] == [[0], [1], [0]]
    assert [drawn for _, drawn in after[:2]] == [drawn for _, drawn in before]
    assert len({tuple(drawn) for _, drawn in after}) == 3


def test_asking_the_ranks_costs_next_to_nothing(tmp_path: Path) -> None:
    results = run_ranks(4, overhead, tmp_path, 0.02, 200)
    for median, mean, every in results:
        assert every > 8
        assert median < 0.0005
        assert mean < 0.001, results


def test_rank_zeros_configuration_counts_and_remotes_of_one_rank_only_are_refused(tmp_path: Path) -> None:
    for chunk_elements, message in run_ranks(2, told_apart, tmp_path):
        assert chunk_elements == 2048
        assert "rank 0 has the remotes ['file'], this rank []" in message


def test_ranks_meet_for_the_emergency_save_when_the_signal_also_hits_their_loader_workers(tmp_path: Path) -> None:
    results = run_ranks(2, struck, tmp_path)
    assert [(code, alive) for code, _, alive, _ in results] == [(143, 2)] * 2, results
    assert len({(newest, done) for _, newest, _, done in results}) == 1
    assert results[0][1] == results[0][3] >= 30
