"""The pure parts: curves, tables, verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dashboard_views import JOB, assess, record, view

from ckptstore.clock import ManualClock
from ckptstore.dashboard import costs, curves, detail, marks, table
from ckptstore.dashboard.agents import AgentWatch, Uploading
from ckptstore.dashboard.answers import encoded
from ckptstore.dashboard.journals import Journals
from ckptstore.dashboard.source import RemoteLook
from ckptstore.errors import CredentialsError
from ckptstore.format import tree
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier

TRAINING = {"ranks_attached": [0], "saves": [], "remotes": {}}
BOTH = {"local": "complete", "s3": "complete"}
HERE = {"local": "complete", "s3": "absent"}


def test_what_is_lost_grows_with_time_when_it_trains() -> None:
    seen = view(record(100, age_s=600, tiers=BOTH), record(200, age_s=60, tiers=HERE), remotes=("s3",))
    training = assess(seen, agent={}, agent_run=TRAINING)
    assert [(level.name, level.step, level.lost_s, level.lost_steps) for level in training.levels] == [
        ("local", 200, 60.0, 0),
        ("s3", 100, 600.0, 100),
    ]
    stopped = assess(seen)
    assert [level.lost_s for level in stopped.levels] == [0.0, 540.0]


def test_a_staged_save_counts_when_all_its_ranks_have_sealed() -> None:
    jobs = [{"save_id": "x", "step": 300, "stage": "writing", "ranks_missing": []}]
    seen = view(record(200, age_s=60))
    found = assess(seen, agent={}, agent_run={**TRAINING, "saves": jobs})
    assert [(level.name, level.step) for level in found.levels] == [("staged", 300), ("local", 200)]
    assert found.levels[1].lost_steps == 100
    gathering = [{**jobs[0], "stage": "gathering"}]
    assert assess(seen, agent={}, agent_run={**TRAINING, "saves": gathering}).levels[0].name == "local"


def test_nothing_known_of_a_remote_is_not_nothing_there() -> None:
    seen = view(record(100), remotes=("s3",), unknown_remotes=frozenset({"s3"}))
    found = assess(seen)
    assert (found.levels[1].state, found.levels[1].lost_s) == ("unknown", None)
    assert not [alarm for alarm in found.alarms if "not on s3" in alarm.title]


def test_verdicts() -> None:
    assert assess(view()).verdict == "empty"
    assert assess(view(record(100, tiers=BOTH), remotes=("s3",))).verdict == "safe"
    assert assess(view(record(100, tiers=HERE, age_s=99), remotes=("s3",))).verdict == "at risk"
    assert assess(view(record(100)), disk=(500, 10**6)).verdict == "not safe"
    assert assess(view(record(100)), disk=(2500, 10**6)).verdict == "at risk"
    assert assess(view(record(100, metrics={"loss": "nan"}))).verdict == "at risk"
    assert assess(view(record(100, tags=("suspect",)))).verdict == "at risk"


def upload(**fields: Any) -> Uploading:
    row = {"save_id": f"{JOB}-100", "step": 100, "state": "uploading", "error": None}
    plain: dict[str, Any] = {
        "remote": "s3", "waiting": (row,), "lag_s": 5.0, "remaining_bytes": 10, "rate_bytes_per_s": 2.0, "eta_s": 5.0,
        "is_refused": False, "error": None,
    }  # fmt: skip
    return Uploading(**{**plain, **fields})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"uploads": [upload()]}, "safe"),
        ({"uploads": [upload(lag_s=5000.0)]}, "at risk"),
        ({"uploads": [upload(error="no")]}, "at risk"),
        ({"uploads": [upload(error="no", is_refused=True)]}, "not safe"),
        ({"uploads": [upload()], "looks": [RemoteLook("s3", "s3://b", 3.0, CredentialsError("no"))]}, "at risk"),
        ({"uploads": [upload()], "agent_run": {**TRAINING, "failures": 2}}, "at risk"),
    ],
)
def test_uploads_and_remotes_are_watched(changes: dict[str, Any], verdict: str) -> None:
    seen = view(record(100, tiers=HERE), remotes=("s3",))
    found = assess(seen, **{"agent": {}, "agent_run": TRAINING, **changes})
    assert found.verdict == verdict, found.alarms
    assert all(alarm.hint and alarm.command for alarm in found.alarms)


def test_a_missing_save_is_noticed_when_one_is_overdue() -> None:
    seen = view(*(record(i * 10, age_s=1000 - i * 100) for i in range(5)))
    assert assess(seen, agent={}, agent_run=TRAINING).interval_s == 100
    assert "no checkpoint for" in str(assess(seen, agent={}, agent_run=TRAINING).alarms)
    assert "no checkpoint for" not in str(assess(seen).alarms)


def test_series_marks_the_best_and_survives_nan() -> None:
    seen = view(
        record(1, metrics={"val/loss": 2.0, "acc": 0.1}),
        record(2, metrics={"val/loss": "nan", "acc": 0.3}, pinned=True),
        record(3, metrics={"val/loss": 1.0, "acc": 0.2}, emergency=True),
        record(4, metrics={"val/loss": 0.1}, superseded=True),
    )
    found = curves.series(seen)
    assert found["best"] == {"val/loss": f"{JOB}-3", "acc": f"{JOB}-2"}
    assert found["direction"] == {"val/loss": "lowest", "acc": "highest"}
    assert found["metrics"]["val/loss"] == [2.0, "nan", 1.0, 0.1]
    assert found["flags"] == ["", "p", "e", "s"]


def test_histories_are_found_in_any_nesting() -> None:
    state = {
        "trainer": {"loss_history": [3.0, 2.0, math.inf], "shape": [3, 4, 5], "one": [1.0]},
        "own": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0, "epoch": 1}, {"step": 30, "loss": 0.5}],
        "pairs": [(1, 0.5), (2, 0.25)],
        "names": ["a", "b"],
        "optimizer": {"param_groups": [{"betas": (0.9, 0.999)}]},
    }
    found = {h["name"]: h for h in curves.histories(tree.encode(state))}
    assert found["trainer.loss_history"]["y"] == [3.0, 2.0, "inf"]
    assert found["own.loss"]["x"] == [10, 20, 30]
    assert found["own.loss"]["y"] == [2.0, 1.0, 0.5]
    assert set(found) <= {"trainer.loss_history", "own.loss", "pairs"}


def test_a_long_history_is_thinned_and_keeps_its_end() -> None:
    (found,) = curves.histories(tree.encode({"loss": [float(i) for i in range(100_001)]}))
    assert len(found["y"]) <= curves.MAX_POINTS + 1
    assert (found["x"][-1], found["y"][-1], found["length"]) == (100_001, 100_000.0, 100_001)


@pytest.mark.parametrize("name", ["accuracy", "val/acc", "eval_bleu", "f1", "top1-accuracy", "reward/mean"])
def test_scores_are_better_when_higher(name: str) -> None:
    assert curves.higher_is_better(name)


@pytest.mark.parametrize("name", ["loss", "val/loss", "perplexity", "mae", "factor"])
def test_losses_are_better_when_lower(name: str) -> None:
    assert not curves.higher_is_better(name)


def test_the_table_sorts_numbers_as_numbers_and_nan_last() -> None:
    seen = view(*(record(step, metrics={"loss": value}) for step, value in ((8, 1.0), (9, "nan"), (10, 0.5))))
    assert [row.info.step for row in table.make(seen, {}).rows] == [10, 9, 8]
    assert [row.info.step for row in table.make(seen, {"order": "asc"}).rows] == [8, 9, 10]
    for order, steps in (("asc", [10, 8, 9]), ("desc", [8, 10, 9])):
        assert [r.info.step for r in table.make(seen, {"sort": "metric:loss", "order": order}).rows] == steps


@pytest.mark.parametrize("page", ["0", "-1", "999", "x", "1e3", "٣", "9" * 99])
def test_the_table_shows_a_page_whatever_is_asked(page: str) -> None:
    seen = view(*(record(step) for step in range(1, 121)))
    found = table.make(seen, {"page": page, "sort": "nonsense", "order": "?", "show": "?"})
    assert 1 <= found.page <= found.num_pages == 3
    assert found.rows


def test_the_table_finds_tags_and_marks() -> None:
    seen = view(record(1, tags=("release",)), record(2, pinned=True), record(3, superseded=True))
    assert [row.info.step for row in table.make(seen, {"q": "RELEASE"}).rows] == [1]
    assert [row.info.step for row in table.make(seen, {"q": "pinned"}).rows] == [2]
    assert [row.info.step for row in table.make(seen, {"show": "all"}).rows] == [3, 2, 1]


def queue(*rows: tuple[str, int, int]) -> dict[str, Any]:
    said = [
        {"save_id": i, "step": 1, "state": "uploading", "attempts": 1, "plain_done_bytes": d, "plain_total_bytes": t}
        for i, d, t in rows
    ]
    remote = {"lag_seconds": 1.0, "is_refused": False, "error": None, "queue": said}
    return {"runs": {"bert": {"remotes": {"s3": remote}}}}


def test_the_time_left_follows_what_was_sent_lately() -> None:
    clock = ManualClock()
    watch = AgentWatch(None, clock)
    for second in range(60):
        watch.status = queue(("a", 100 * second, 10_000), ("b", 0, 0))
        watch._measure(watch.status)
        clock.sleep(1)
    (found,) = watch.uploading("bert", {"b": 5000})
    assert found.rate_bytes_per_s == pytest.approx(100)
    assert found.remaining_bytes == 10_000 - 5900 + 5000
    assert found.eta_s == pytest.approx(91)
    for _ in range(120):
        watch._measure(watch.status)
        clock.sleep(1)
    assert watch.uploading("bert", {})[0].eta_s is None, "nothing moves, so nothing is promised"


def test_the_treemap_adds_up_and_stays_small() -> None:
    found = [detail.Tensor(f"a.b.{i}.w", "float32", (i,), i, 9, "full") for i in range(3000, 0, -1)]
    found += [detail.Tensor(name, "float32", (), 0) for name in ("", ".", "a", "a.b", "x" + ".y" * 3000)]
    boxes = detail.treemap(found)
    assert boxes["value"][0] == sum(range(3001))
    assert len(set(boxes["id"])) == len(boxes["id"]) <= 2 * detail.MAX_BOXES
    assert set(boxes["parent"][1:]) <= set(boxes["id"])
    for name, value in zip(boxes["id"], boxes["value"], strict=True):
        inside = [v for parent, v in zip(boxes["parent"], boxes["value"], strict=True) if parent == name]
        assert not inside or sum(inside) == value


def test_histories_are_answers_when_numbers_are_endless() -> None:
    state = {
        "pairs": [(-math.inf, 1.0), (0.0, 2.0), (1.0, 3.0)],
        "one": [(-math.inf, 1.0), (0.0, 2.0)],
        "huge": [1.0, 10**400],
        "rows": [{"step": math.nan, "loss": 3.0}, {"step": 10**400, "loss": 2.5}]
        + [{"step": step, "loss": 2.0} for step in (1, 2)],
    }
    found = curves.histories(tree.encode(state))
    encoded(found)
    assert {h["name"]: h["x"] for h in found} == {"pairs": [0.0, 1.0], "rows.loss": [1, 2]}


def test_the_live_curve_leaves_out_what_no_float_holds(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path)
    tier.create()
    tier.make_run("bert")
    lines = [(1, {"loss": 10**400, "acc": 0.5}), (10**400, {"acc": 0.6}), (2, {"acc": 0.7})]
    for second, (step, metrics) in enumerate(lines):
        note = {"time": f"2026-01-01T00:00:0{second}Z", "step": step, "metrics": metrics}
        journal.append(tier, "bert", "live", [note])
    found = marks.live(view(record(1)), Journals(tier))
    encoded(found)
    assert (found["step"], found["metrics"]) == ([1, 2], {"acc": [0.5, 0.7]})


def test_the_pace_counts_no_time_between_two_jobs(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path)
    tier.create()
    tier.make_run("bert")
    for second, step, more in ((0, 1, {"begins": True}), (1, 3, {}), (30, 4, {"begins": True}), (31, 6, {})):
        point = {"time": f"2026-01-01T00:00:{second:02}Z", "step": step, "metrics": {}, **more}
        journal.append(tier, "bert", "live", [point])
    assert marks.live(view(record(1)), Journals(tier))[marks.PACE] == [None, 2.0, None, 2.0]


def test_a_bill_says_what_went_wrong_and_is_not_counted_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def breaks(remote: Any, prices: object) -> None:
        asked.append(remote.name)
        raise RuntimeError("a client's own trouble")

    monkeypatch.setattr(costs, "cost", breaks)
    remotes: list[Any] = [SimpleNamespace(name="s3"), SimpleNamespace(name="file")]
    bills = costs.Costs({}).count("bert", remotes)
    assert [(bill.remote, bill.cost, bill.error) for bill in bills] == [
        ("s3", None, "unexpected RuntimeError"),
        ("file", None, "unexpected RuntimeError"),
    ]
    assert asked == ["s3", "file"]
