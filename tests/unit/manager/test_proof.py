"""A restore that nobody has tried for long is asked for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from ckptstore.clock import ManualClock
from ckptstore.manager.proof import Proof
from ckptstore.ops import history
from ckptstore.repo.local import LocalTier
from ckptstore.store import CheckpointStore
from ckptstore.types import CheckpointInfo

DAY = 86400.0


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path)
    tier.create()
    tier.make_run("default")
    return tier


def info(tier: LocalTier) -> CheckpointInfo:
    return CheckpointInfo(run="default", step=7, save_id="0123456789ab-1", created_at=ManualClock().now())


def test_it_is_said_once_per_period_that_no_restore_was_tried(tier: LocalTier, tmp_path: Path) -> None:
    clock = ManualClock()
    proof = Proof(CheckpointStore(tmp_path), limit_s=7 * DAY, clock=clock)
    assert proof.reminder() is None
    clock.sleep(6.9 * DAY)
    assert proof.reminder() is None
    clock.sleep(0.2 * DAY)
    assert f"never happened: `ckptctl verify -s {tmp_path} --read-data --run default`" in (proof.reminder() or "")
    assert proof.reminder() is None
    clock.sleep(7 * DAY)
    assert proof.reminder() is not None


def test_a_load_a_drill_and_a_full_verification_count_also_those_of_others(tier: LocalTier, tmp_path: Path) -> None:
    clock = ManualClock()
    proof = Proof(CheckpointStore(tmp_path), limit_s=7 * DAY, clock=clock)
    clock.sleep(6 * DAY)
    history.note_restored(tier, "default", 7, "0123456789ab-1", "local", clock=clock)
    clock.sleep(6 * DAY)
    assert proof.reminder() is None
    assert proof.verified() == {"0123456789ab-1"}
    clock.sleep(2 * DAY)
    assert "was 8 d ago" in (proof.reminder() or "")
    proof.restored(info(tier), {"local"})
    clock.sleep(6 * DAY)
    assert proof.reminder() is None


def test_only_bytes_of_a_remote_count_where_there_is_one(tier: LocalTier, tmp_path: Path) -> None:
    clock = ManualClock()
    proof = Proof(CheckpointStore(tmp_path, {"s3": "mem://x"}), limit_s=7 * DAY, clock=clock)
    clock.sleep(8 * DAY)
    for sources in ({"local"}, {"local", "s3"}, {"arena"}, set()):
        proof.restored(info(tier), sources)
    said = proof.reminder() or ""
    assert f"from s3 never happened: `ckptctl drill -s {tmp_path} --remote 'mem://x' --run default`" in said
    clock.sleep(7 * DAY)
    proof.restored(info(tier), {"s3"})
    assert proof.reminder() is None
    clock.sleep(timedelta(days=8).total_seconds())
    assert "from s3 was 8 d ago" in (proof.reminder() or "")


def test_nobody_is_reminded_when_told_so(tier: LocalTier, tmp_path: Path) -> None:
    clock = ManualClock()
    proof = Proof(CheckpointStore(tmp_path), limit_s=0, clock=clock)
    clock.sleep(1000 * DAY)
    assert proof.reminder() is None
