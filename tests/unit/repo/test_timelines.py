"""Which saves count: the current line against a run that remembers what each of its jobs really did."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.clock import rfc3339
from ckptstore.errors import FormatError
from ckptstore.format.manifest import Parent, Summary
from ckptstore.repo.timelines import Claim, Line, created_at, current_line, in_order, line_of, parent_below, parent_of


def save(
    step: int,
    *,
    timeline: int = 1,
    job: int = 1,
    counter: int | None = None,
    parent: Summary | None = None,
    time: int = 0,
) -> Summary:
    return Summary(
        run="run",
        save_id=f"{job:012x}-{step if counter is None else counter}",
        timeline=timeline,
        parent=parent_of(parent) if parent else None,
        step=step,
        created_at=f"2026-01-01T00:{time // 60:02d}:{time % 60:02d}.000Z",
        job=str(job),
        world_size=1,
    )


def steps(summaries: list[Summary]) -> list[int]:
    return [summary.step for summary in summaries]


def test_nothing_is_current_when_there_is_no_save() -> None:
    assert current_line([]) == []
    assert in_order([]) == []


def test_order_is_numeric_when_text_and_time_say_otherwise() -> None:
    saves = [save(step, time=100 - step) for step in (10, 9, 8, 100, 99)]
    assert steps(in_order(saves)) == [8, 9, 10, 99, 100]
    assert steps(current_line(saves)) == [8, 9, 10, 99, 100]
    later = [save(1, timeline=10, job=2, parent=saves[2]), save(2, timeline=9, job=3, parent=saves[2])]
    assert [s.timeline for s in in_order([*later, *saves])] == [1, 1, 1, 1, 1, 9, 10]


def test_older_future_is_superseded_when_a_job_goes_back() -> None:
    first = [save(step) for step in (100, 500, 900)]
    second = [save(step, timeline=2, job=2, parent=first[1]) for step in (510, 520)]
    line = current_line([*second, *first])
    assert steps(line) == [100, 500, 510, 520]
    assert parent_below(line, 530) == parent_of(second[1])
    assert parent_below(line, 510) == parent_of(first[1])
    assert parent_below(line, 100) is None


def test_everything_older_is_superseded_when_a_run_starts_afresh() -> None:
    old = [save(step) for step in (100, 200)]
    fresh = [save(step, timeline=2, job=2) for step in (0, 50)]
    assert steps(current_line([*old, *fresh])) == [0, 50]


def test_line_runs_through_all_its_ancestors_when_there_are_several_branches() -> None:
    a = [save(step, timeline=1, job=1) for step in (10, 20, 30)]
    b = [save(step, timeline=2, job=2, parent=a[1]) for step in (25, 35)]
    dead_end = [save(step, timeline=3, job=3, parent=b[1]) for step in (36, 99)]
    c = [save(step, timeline=4, job=4, parent=b[0]) for step in (26,)]
    assert steps(current_line([*a, *b, *dead_end, *c])) == [10, 20, 25, 26]


def test_one_job_in_one_step_saves_again_when_it_claims_a_timeline() -> None:
    first = [save(10, counter=1), save(20, counter=2)]
    again = save(20, timeline=2, counter=3, parent=first[0])
    assert [s.save_id for s in current_line([*first, again])] == [first[0].save_id, again.save_id]


def test_lines_are_never_mixed_when_two_jobs_claimed_one_number() -> None:
    root = save(5)
    one = [save(step, timeline=2, job=2, parent=root, time=step) for step in (10, 30)]
    two = [save(step, timeline=2, job=3, parent=root, time=step) for step in (20, 40)]
    assert steps(current_line([root, *one, *two])) == [5, 20, 40]
    assert steps(current_line([root, *one, *two[:1]])) == [5, 10, 30]
    assert steps(in_order([root, *one, *two])) == [5, 10, 30, 20, 40]
    same_time = [save(step, timeline=2, job=job, parent=root) for step, job in ((10, 2), (20, 3))]
    assert steps(current_line([root, *same_time])) == [5, 20]


def test_line_continues_below_the_parent_when_the_parent_was_deleted() -> None:
    first = [save(step) for step in (100, 200, 300)]
    second = [save(250, timeline=2, job=2, parent=first[1])]
    assert steps(current_line([first[0], first[2], *second])) == [100, 250]


def test_claim_leads_on_when_a_whole_line_was_deleted() -> None:
    first = [save(step) for step in (100, 200, 300)]
    pruned = save(150, timeline=2, job=2, parent=first[0])
    third = [save(160, timeline=3, job=3, parent=pruned)]
    claim = Claim(job=f"{2:012x}", step=150, parent=pruned.parent)
    assert steps(current_line([*first, *third], {(2, f"{2:012x}"): claim}.get)) == [100, 160]
    fresh = Claim(job=f"{2:012x}", step=150, parent=None)
    assert steps(current_line([*first, *third], {(2, f"{2:012x}"): fresh}.get)) == [160]


def test_history_is_kept_when_a_whole_line_and_its_claim_are_gone() -> None:
    first = [save(step) for step in (100, 200, 300)]
    pruned = save(310, timeline=2, job=2, parent=first[2])
    third = [save(320, timeline=3, job=3, parent=pruned)]
    assert steps(current_line([*first, *third])) == [100, 200, 300, 320]


def test_nothing_above_the_known_step_is_current_when_the_branch_point_is_guessed() -> None:
    first = [save(step) for step in (100, 200, 300, 400)]
    second = [save(410, timeline=2, job=2, parent=first[3])]
    pruned = save(150, timeline=3, job=3, parent=first[0])
    fourth = [save(160, timeline=4, job=4, parent=pruned)]
    assert steps(current_line([*first, *second, *fourth])) == [100, 160]


def test_walk_ends_when_parents_are_nonsense() -> None:
    loop = save(10, timeline=2, job=2, parent=save(5, timeline=2, job=2))
    future = save(20, timeline=1, job=1, parent=save(5, timeline=9, job=9))
    assert steps(current_line([loop, future])) == [10]


@pytest.mark.parametrize("text", ["", "now", "2026-01-01T00:00:00", "1767225600"])
def test_time_is_refused_when_it_is_none(text: str) -> None:
    with pytest.raises(FormatError):
        created_at(save(1).model_copy(update={"created_at": text}))
    assert rfc3339(created_at(save(1))) == save(1).created_at


# ---------------------------------------------------------------------- any run


@dataclass
class Run:
    """A run whose jobs remember their whole history, as a stack of saves: the truth to compare with."""

    saves: dict[str, Summary] = field(default_factory=dict)
    #: Line -> everything on the path of its newest save, oldest first, deleted ones included.
    histories: dict[Line, list[str]] = field(default_factory=dict)
    claims: dict[Line, Claim] = field(default_factory=dict)
    everything: dict[str, Summary] = field(default_factory=dict)
    timeline: int = 0
    job: int = 0
    counter: int = 0
    clock: int = 0
    loaded: Summary | None = None
    last_step: int | None = None

    def start_job(self, loaded: Summary | None) -> None:
        self.job += 1
        self.counter = 0
        self.loaded = loaded
        self.last_step = None

    def expected(self) -> list[str]:
        """What is on the path of the newest line that still has a save."""
        lines = {line_of(summary) for summary in self.saves.values()}
        return [name for name in self.histories[max(lines)] if name in self.saves] if lines else []

    def save(self, step: int) -> None:
        if self.last_step is None or step <= self.last_step:
            parent = self.loaded
            if self.last_step is not None:
                below = parent_below([self.saves[name] for name in self.expected()], step)
                parent = self.everything[below.save_id] if below else None
            self.timeline += 1
            history = list(self.histories[line_of(parent)]) if parent else []
            if parent:
                history = history[: history.index(parent.save_id) + 1]
            self.start = parent
        self.counter += 1
        self.clock += 1
        summary = save(
            step, timeline=self.timeline, job=self.job, counter=self.counter, parent=self.start, time=self.clock % 3000
        )
        if line_of(summary) not in self.histories:
            self.histories[line_of(summary)] = history
            self.claims[line_of(summary)] = Claim(job=line_of(summary)[1], step=step, parent=summary.parent)
        self.histories[line_of(summary)].append(summary.save_id)
        self.saves[summary.save_id] = self.everything[summary.save_id] = summary
        self.last_step = step

    start: Summary | None = None


def play(data: st.DataObject, *, rollbacks: bool, deletions: bool) -> Run:
    """Any run: jobs that save, save again, restart from any save of the current line or afresh, and retention."""
    run = Run()
    run.start_job(None)
    for _ in range(data.draw(st.integers(1, 25))):
        line = [run.saves[name] for name in run.expected()]
        deed = data.draw(st.sampled_from(["save", "save", "save", "restart", "afresh", "again", "delete"]))
        if deed == "restart" and line:
            run.start_job(data.draw(st.sampled_from(line)) if rollbacks else line[-1])
        elif deed == "afresh" and rollbacks:
            run.start_job(None)
        elif deed == "again" and rollbacks and run.last_step is not None:
            run.save(data.draw(st.integers(0, run.last_step)))
        elif deed == "delete" and deletions and len(line) > 1:
            del run.saves[
                data.draw(st.sampled_from(sorted(run.saves)))
                if rollbacks
                else line[data.draw(st.integers(0, len(line) - 2))].save_id
            ]
        else:
            base = run.last_step if run.last_step is not None else run.loaded.step if run.loaded else -1
            run.save(base + data.draw(st.integers(1, 1000)))
    return run


def current(run: Run, claims: Mapping[Line, Claim]) -> list[str]:
    shuffled = list(run.saves.values())
    random.Random(len(shuffled)).shuffle(shuffled)
    return [summary.save_id for summary in current_line(shuffled, claims.get)]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_current_line_is_the_history_of_the_newest_job_in_any_run(data: st.DataObject) -> None:
    run = play(data, rollbacks=True, deletions=False)
    assert current(run, {}) == run.expected()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_current_line_is_the_history_when_saves_were_deleted_and_claims_are_known(data: st.DataObject) -> None:
    run = play(data, rollbacks=True, deletions=True)
    assert current(run, run.claims) == run.expected()


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_nothing_is_superseded_when_no_job_went_back_whatever_was_deleted(data: st.DataObject) -> None:
    run = play(data, rollbacks=False, deletions=True)
    assert current(run, {}) == run.expected() == [s.save_id for s in in_order(run.saves.values())]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_newest_save_never_changes_when_claims_are_lost(data: st.DataObject) -> None:
    run = play(data, rollbacks=True, deletions=True)
    assert current(run, {})[-1:] == run.expected()[-1:]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.builds(save, st.integers(0, 20), timeline=st.integers(1, 4), job=st.integers(1, 3), time=st.integers(0, 3)),
        unique_by=lambda s: (s.save_id, s.timeline),
    )
)
def test_order_and_line_do_not_depend_on_the_order_of_the_input(saves: list[Summary]) -> None:
    once, twice = in_order(saves), in_order(reversed(saves))
    assert once == twice
    assert [s.timeline for s in once] == sorted(s.timeline for s in once)
    line = current_line(saves)
    assert line == current_line(list(reversed(saves)))
    assert [s for s in once if s in line] == line
    assert parent_below(line, 10**9) == (parent_of(line[-1]) if line else None)
    assert all(isinstance(parent_of(s), Parent) for s in line)
