"""The journal beside a run: it takes what it is given, and never more room than it may."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptstore.ops.history import note_restored, note_verified, sound, verified
from ckptstore.ops.verify import Finding, Verification
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    tier.make_run("bert")
    return tier


def test_records_come_back_in_order_and_a_torn_line_is_left_out(tier: LocalTier) -> None:
    assert journal.read(tier, "bert", "jobs") == []
    journal.append(tier, "bert", "jobs", [{"n": 1}, {"n": 2}])
    with journal.path_of(tier, "bert", "jobs").open("ab") as file:
        file.write(b'{"n": 3\n[4]\n\xff\n')
    journal.append(tier, "bert", "jobs", [{"n": 5}])
    assert journal.read(tier, "bert", "jobs") == [{"n": 1}, {"n": 2}, {"n": 5}]


def test_a_long_journal_is_thinned_and_keeps_its_newest(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 4000)
    for n in range(2000):
        journal.append(tier, "bert", "live", [{"step": n}])
    found = [record["step"] for record in journal.read(tier, "bert", "live")]
    assert journal.path_of(tier, "bert", "live").stat().st_size <= 4000
    assert found == sorted(found)
    assert found[-100:] == list(range(1900, 2000))
    assert found[0] == 0, "the beginning stays, only coarser"


def test_writers_that_append_at_once_lose_nothing(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 100_000)

    def write(who: int) -> None:
        for n in range(200):
            journal.append(LocalTier(tier.root), "bert", "jobs", [{"who": who, "n": n}])

    # Each append opens the file anew, so threads stand for processes.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = journal.read(tier, "bert", "jobs")
    assert sorted((r["who"], r["n"]) for r in found) == [(who, n) for who in range(4) for n in range(200)]


def test_a_journal_that_can_not_be_written_disturbs_nobody(tier: LocalTier, tmp_path: Path) -> None:
    folder = journal.path_of(tier, "bert", "jobs").parent
    folder.symlink_to(tmp_path)
    journal.append(tier, "bert", "jobs", [{"n": 1}])
    folder.unlink()
    folder.write_text("a file is in the way")
    journal.append(tier, "bert", "jobs", [{"n": 1}])
    assert not (tmp_path / "jobs.jsonl").exists(), "no link is followed"


def test_verifications_are_remembered_per_copy(tier: LocalTier) -> None:
    a, b = "0123456789ab-1", "0123456789ab-2"
    found = Verification(checked=[(100, a, "local"), (100, a, "s3"), (200, b, "local")])
    found.findings = [
        Finding(100, a, "s3", "unsteady", "odd"),
        Finding(100, a, "s3", "damage", "wrong"),
        Finding(200, b, "local", "damage", "gone", is_repaired=True),
    ]
    note_verified(tier, "bert", found, "bytes")
    note_restored(tier, "bert", 100, a, "s3")
    note_verified(None, "bert", found, "bytes")  # no local tier, nothing to keep it in
    records = verified(tier, "bert", a)
    assert [(r["tier"], r["depth"], r["result"]) for r in records] == [
        ("local", "bytes", "good"),
        ("s3", "bytes", "damaged"),
        ("s3", "restore", "good"),
    ]
    assert records[1]["what"] in ("odd", "wrong")
    assert verified(tier, "bert", b)[0]["result"] == "good"


def test_the_last_look_that_tells_decides_whether_a_save_is_sound(tier: LocalTier) -> None:
    def note(save_id: str, *looks: tuple[str, str, str]) -> None:
        keys = ("tier", "depth", "result")
        journal.append(
            tier, "bert", "verified", [{"save_id": save_id, **dict(zip(keys, look, strict=True))} for look in looks]
        )

    note("good", ("local", "bytes", "damaged"), ("local", "bytes", "good"), ("local", "structure", "unchecked"))
    note("rotten", ("local", "bytes", "good"), ("local", "bytes", "damaged"))
    note("torn", ("local", "restore", "good"), ("local", "structure", "damaged"))
    note("elsewhere", ("local, s3", "restore", "good"), ("local", "bytes", "damaged"))
    note("shallow", ("local", "sample", "good"))
    note("in memory", ("arena, local", "restore", "good"))
    journal.append(tier, "bert", "verified", [{"time": 3}, {"save_id": "poor", "result": "good"}])
    assert sound(tier, "bert") == {"good", "elsewhere"}


def test_nothing_that_can_not_be_written_disturbs_a_save(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path)
    tier.create()
    journal.append(tier, "run", "live", [{"time": "x", "value": object()}])
    journal.append(tier, "no/run", "live", [{"time": "x"}])
    assert journal.read(tier, "run", "live") == []


def test_one_append_larger_than_the_bound_is_thinned_until_it_can_be_read(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path)
    tier.create()
    tier.make_run("run")
    journal.append(tier, "run", "live", [{"number": number, "text": "x" * 1000} for number in range(12_000)])
    records = journal.read(tier, "run", "live")
    assert records[-1]["number"] == 11_999
    assert len(records) < 12_000
