"""Why checkpoints stay, what was saved, what the disk will do, and what happened between checkpoints."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dashboard_server import add_save, write_run
from dashboard_views import JOB, NOW, assess, record, view

from ckptstore.clock import rfc3339
from ckptstore.dashboard import curves, marks, plan, storage, table
from ckptstore.dashboard.costs import Costs
from ckptstore.dashboard.journals import Journals
from ckptstore.ops.open import open_place
from ckptstore.ops.settings import PRICES
from ckptstore.ops.transfer import push_checkpoints
from ckptstore.repo import journal, timings
from ckptstore.repo.local import LocalTier

LAST_2 = {"keep_last": 2, "keep_best": 1, "keep_every_steps": 0, "monitor": "loss", "mode": "min"}
LAST_3 = {**LAST_2, "keep_last": 3}
BOTH: dict[str, Any] = {"local": "complete", "s3": "complete"}


def losses(*values: float, **fields: Any) -> Any:
    records = [record(n * 10, metrics={"loss": loss}, tiers=BOTH) for n, loss in enumerate(values, 1)]
    return view(*records, remotes=("s3",), **fields)


def test_each_checkpoint_says_why_it_stays_and_when_it_goes() -> None:
    seen = losses(3.0, 1.0, 2.0, 2.5)
    found = plan.plans(seen, {"local": LAST_2, "remote": LAST_3})
    rows = {row.info.step: row.reasons for row in table.make(seen, {}, found).rows}
    assert rows[10] == ("may go now",)
    assert rows[20] == ("one of the best 1", "one of the last 3 (s3)")
    assert rows[30] == ("one of the last 2 (local)", "goes with the next checkpoint (local)", "one of the last 3 (s3)")
    assert rows[40] == ("one of the last 2 (local)", "one of the last 3 (s3)")
    assert [(p.tier, p.limit, [i.step for i in p.going]) for p in found] == [
        ("local", 3, [10, 30]),
        ("s3", 4, [10]),
    ]


@pytest.mark.parametrize(
    "rules", [None, {}, {"local": "x"}, {"local": {"keep_last": -1}}, {"local": {**LAST_2, "keep_hours": 3}}]
)
def test_nothing_is_claimed_when_the_rules_are_not_known(rules: Any) -> None:
    seen = losses(1.0, 2.0)
    found = plan.plans(seen, rules)
    assert found == []
    assert not table.make(seen, {}, found).has_reasons


def test_the_disk_is_enough_when_retention_bounds_the_run() -> None:
    seen = losses(3.0, 1.0)
    found = plan.plans(seen, {"local": LAST_2})
    enough = storage.forecast(seen, (2000, 10_000), found)
    short = storage.forecast(seen, (1999, 10_000), found)
    assert enough is not None
    assert short is not None
    assert (enough.growth_bytes, enough.is_enough, short.is_enough) == (1000, True, False)
    endless = storage.forecast(seen, (2000, 10_000), plan.plans(seen, {"local": {**LAST_2, "keep_every_steps": 5}}))
    assert endless is not None
    assert (endless.growth_bytes, endless.is_enough) == (None, False)


def test_savings_add_up_over_what_was_noted() -> None:
    spans = {"stored_bytes": 5, "reused_bytes": 60, "by_codec": {"delta": [30, 4], "raw": [10, 10], "odd": "x"}}
    notes: dict[str, Any] = {f"{JOB}-10": {"remote s3": spans}, f"{JOB}-20": {"remote s3": spans, "remote gone": spans}}
    found = storage.savings(losses(1.0, 2.0, notes=notes))
    assert [(one.kind, one.plain_bytes, one.stored_bytes) for one in found] == [
        ("unchanged", 120, 0),
        ("deltas", 60, 8),
        ("as it is", 20, 20),
    ]


def test_a_push_by_hand_is_noted_like_the_agents(tmp_path: Path) -> None:
    write_run(tmp_path, "bert", 2, pushed=0)
    place = open_place(str(tmp_path / "store"), f"file://{tmp_path}/bucket")
    tiers = place.tiers("bert")
    for step in (100, 200):
        push_checkpoints(tiers, step, everything=False)
    assert place.local is not None
    seen = view(remotes=("file",), notes={i: timings.read(place.local, "bert", f"{JOB}-{i}") for i in ("1", "2")})
    assert [one.kind for one in storage.savings(seen)][:2] == ["unchanged", "byte planes"]
    assert plan.rests_on(seen, "2") == (f"{JOB}-1",)


def test_the_base_chain_is_told_by_steps() -> None:
    rests = {"stored_bytes": 1, "rests_on": [f"{JOB}-10", f"{JOB}-20", f"{JOB}-99"]}
    seen = losses(3.0, 2.0, 1.0, notes={f"{JOB}-30": {"remote s3": rests}, f"{JOB}-20": {"remote s3": {"rests_on": 3}}})
    rows = {row.info.step: row for row in table.make(seen, {}).rows}
    assert (rows[30].rests_on, rows[20].rests_on) == ((10, 20), ())
    assert rows[30].ratio == pytest.approx(0.001)


@pytest.fixture
def journals(tmp_path: Path) -> Journals:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    tier.make_run("bert")
    return Journals(tier)


def at(seconds: float) -> str:
    return rfc3339(NOW + timedelta(seconds=seconds))


def note(journals: Journals, name: journal.Name, *records: dict[str, Any]) -> None:
    assert journals._tier is not None
    journal.append(journals._tier, "bert", name, records)


def test_the_live_curve_has_what_lies_between_checkpoints(journals: Journals) -> None:
    assert marks.live(view(), journals)["step"] == []
    note(journals, "live", *({"time": at(n), "step": n * 5, "epoch": 1, "metrics": {"loss": 1 / n}} for n in (1, 2, 3)))
    note(journals, "live", {"time": "?", "step": 1}, {"time": at(4), "step": "x"}, {"time": at(5)})
    note(journals, "live", {"time": at(6), "step": 20, "metrics": {"loss": "nan", "bad": [1], "worse": "<b>"}})
    found = marks.live(view(), journals)
    assert found["step"] == [5, 10, 15, 20]
    assert found["metrics"] == {"loss": [1.0, 0.5, pytest.approx(1 / 3), "nan"]}
    assert found["steps_per_second"] == [None, 5.0, 5.0, pytest.approx(5 / 3)]


def test_a_long_live_curve_is_thinned_and_keeps_its_end(journals: Journals) -> None:
    points = ({"time": at(n), "step": n, "epoch": None, "metrics": {"loss": 1.0}} for n in range(1, 10_002))
    note(journals, "live", *points)
    found = marks.live(view(), journals)
    assert len(found["step"]) <= marks.MAX_POINTS + 1
    assert found["step"][-1] == 10_001


def test_a_crash_is_where_the_job_was_last_seen(journals: Journals) -> None:
    note(journals, "live", *({"time": at(n), "step": n, "epoch": None, "metrics": {"loss": 1.0}} for n in (1, 2, 3)))
    note(journals, "jobs", {"time": at(3.5), "ended": "lost", "job": JOB, "rank": 0, "step": 2})
    note(journals, "live", {"time": at(9), "step": 2, "epoch": None, "metrics": {"loss": 1.0}})
    note(journals, "jobs", {"time": at(9000), "ended": "lost", "job": JOB, "rank": 1, "step": 50}, {"ended": "closed"})
    assert [(crash["step"], crash["rank"]) for crash in marks.live(view(), journals)["crashes"]] == [(3, 0), (50, 1)]


def test_a_resume_is_where_the_line_was_left(tmp_path: Path) -> None:
    parent = {"save_id": f"{JOB}-1", "timeline": 1, "step": 100}
    add_save(tmp_path, 100, save_id=f"{JOB}-1")
    add_save(tmp_path, 200, save_id=f"{JOB}-2")
    for number, step in enumerate((150, 250), 1):
        add_save(tmp_path, step, save_id=f"0123456789ac-{number}", timeline=2, parent=parent)
    place = open_place(str(tmp_path))
    seen = view()
    seen.catalog = place.tiers("bert").catalog()
    found = curves.series(seen)
    assert [(resume["step"], resume["save_id"]) for resume in found["resumes"]] == [(100, f"{JOB}-1")]
    assert dict(zip(found["step"], found["flags"], strict=True)) == {100: "r", 200: "s", 150: "", 250: ""}


def test_old_checkpoints_nobody_has_read_back_are_worth_a_word() -> None:
    old = view(record(1, age_s=8 * 86400), record(2))
    assert "was ever read back" in str(assess(old).alarms)
    assert "was read back for 9 d" in str(assess(old, read_back_at=NOW - timedelta(days=9)).alarms)
    assert "read back" not in str(assess(old, read_back_at=NOW - timedelta(days=2)).alarms)
    assert "read back" not in str(assess(view(record(1, age_s=86400))).alarms)
    assert assess(old).verdict == "safe", "worth a word, not an alarm"


def test_bytes_that_were_read_and_are_damaged_since_do_not_count(journals: Journals) -> None:
    look = {"time": at(0), "step": 1, "save_id": f"{JOB}-1", "tier": "local", "depth": "bytes", "result": "good"}
    note(journals, "verified", look, {**look, "save_id": f"{JOB}-2", "depth": "structure"})
    assert journals.well_read("bert") == {f"{JOB}-1"}
    assert journals.read_back_at("bert") == NOW
    note(journals, "verified", {**look, "depth": "sample", "result": "damaged"})
    assert journals.well_read("bert") == frozenset()


def test_costs_are_counted_when_asked_and_then_remembered(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    (bucket / "runs/bert/packs").mkdir(parents=True)
    (bucket / "runs/bert/packs/a.pack").write_bytes(bytes(1000))
    now = [0.0]
    costs = Costs({**PRICES, "put_thousand": 5.0}, lambda: now[0])
    remotes = open_place(None, f"file://{bucket}", must_exist=False).tiers("bert").remotes
    (bill,) = costs.count("bert", remotes)
    assert bill.cost is not None
    assert (bill.cost.stored_bytes, bill.cost.objects, bill.cost.put_dollars) == (1000, 1, 0.005)
    (bucket / "runs/bert/packs/b.pack").write_bytes(bytes(1000))
    assert costs.of("bert", remotes) == [bill]
