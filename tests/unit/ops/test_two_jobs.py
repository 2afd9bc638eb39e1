"""Two live jobs in one run: the newer timeline wins, the older is told, and `list --all` says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptstore.agent.line import RemoteLine
from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.errors import LockedError, TransientError
from ckptstore.format.manifest import Parent
from ckptstore.ops.listing import list_checkpoints, why_superseded
from ckptstore.ops.open import open_place
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.local import LocalTier
from ckptstore.repo.timelines import Claim
from ckptstore.store.store import CheckpointStore
from ckptstore.store.timeline import TimelineKeeper, newest_claim
from ckptstore.testing.checkpoints import write_checkpoint

RUN = "run"
OLD, NEW = "0" * 12, "1" * 12


class Claimer:
    def __init__(self, tier: LocalTier) -> None:
        self._tier = tier

    def claim_timeline(self, at_least: int, record: bytes) -> int:
        while not self._tier.claim_timeline(RUN, at_least, record):
            at_least += 1
        return at_least


def keeper(tier: LocalTier) -> TimelineKeeper:
    return TimelineKeeper(lambda: Catalog.read(tier, (), RUN), lambda above: newest_claim(tier, RUN, above))


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    return tier


def test_older_job_starts_nothing_new_and_says_so(tier: LocalTier) -> None:
    claimer, old, new = Claimer(tier), keeper(tier), keeper(tier)
    assert old.at(100, claimer, job=OLD)[0] == 1
    old.note(Parent(save_id=f"{OLD}-1", timeline=1, step=100))
    assert new.at(100, claimer, job=NEW)[0] == 2
    with pytest.raises(LockedError, match="newer job has taken over this run: timeline 2"):
        old.at(200, claimer, job=OLD)
    new.note(Parent(save_id=f"{NEW}-1", timeline=2, step=100))
    assert new.at(200, claimer, job=NEW)[0] == 2, "the newer goes on"
    old.resumed(Parent(save_id=f"{NEW}-1", timeline=2, step=100))
    assert old.at(300, claimer, job=OLD)[0] == 3, "who loads starts a line of its own"


def test_one_jobs_own_new_timelines_are_no_takeover(tier: LocalTier) -> None:
    claimer, one = Claimer(tier), keeper(tier)
    assert one.at(100, claimer, job=OLD)[0] == 1
    one.note(Parent(save_id=f"{OLD}-1", timeline=1, step=100))
    assert one.at(50, claimer, job=OLD)[0] == 2
    assert one.at(60, claimer, job=OLD)[0] == 2


def test_a_torn_claim_counts_as_somebody_elses(tier: LocalTier) -> None:
    claimer, one = Claimer(tier), keeper(tier)
    assert one.at(100, claimer, job=OLD)[0] == 1
    tier.claim_timeline(RUN, 5, b"{")
    with pytest.raises(LockedError):
        one.at(200, claimer, job=OLD)


def test_a_job_that_saw_no_remote_gives_way_to_no_dead_one(tier: LocalTier) -> None:
    claimer, away = Claimer(tier), {"r": TransientError("away")}
    one, two, third = (
        TimelineKeeper(
            lambda: replace(Catalog.read(tier, (), RUN), unreachable=away),
            lambda above: newest_claim(tier, RUN, above),
        )
        for _ in range(3)
    )
    assert one.at(100, claimer, job=OLD)[0] == 1
    first = Parent(save_id=f"{OLD}-1", timeline=1, step=100)
    one.note(first)
    for number in (2, 3):  # the remote is back, and the agent copies what dead jobs had claimed there
        tier.claim_timeline(RUN, number, Claim(job="d" * 12, step=number).encode())
    assert one.at(200, claimer, job=OLD) == (4, first), "above them, from where it was"
    assert one.at(300, claimer, job=OLD)[0] == 4
    assert two.at(300, claimer, job=NEW)[0] == 5
    with pytest.raises(LockedError, match="timeline 5, this one has 4"):
        one.at(400, claimer, job=OLD)
    assert two.at(400, claimer, job=NEW)[0] == 5
    third.fresh()
    assert third.at(1, claimer, job="2" * 12) == (6, None)
    tier.claim_timeline(RUN, 7, Claim(job="d" * 12, step=7).encode())
    write_checkpoint(tier, {"w": np.zeros(4)}, run=RUN, step=0, save_id=f"{'d' * 12}-1", timeline=7)
    assert third.at(1, claimer, job="2" * 12) == (8, None), "what failed at first continues from what it would have"


def test_a_remote_that_comes_back_stops_no_job(tier: LocalTier, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/mount/bucket"
    with CheckpointStore(tier.root, remote=url, run=RUN) as store:
        assert store._timeline.at(100, Claimer(tier), job=OLD)[0] == 1
        store._timeline.note(Parent(save_id=f"{OLD}-1", timeline=1, step=100))
        (tmp_path / "mount" / "bucket").mkdir(parents=True)
        line = RemoteLine(tier, RUN, "file", url, {}, SYSTEM_CLOCK)
        remote = line.remote(store.config)
        for number in (1, 2, 3):
            assert remote.claim_timeline(number, Claim(job="d" * 12, step=number).encode())
        line.learn_timelines()
        line.hang_up()
        assert tier.timelines(RUN) == [1, 2, 3]
        assert store._timeline.at(200, Claimer(tier), job=OLD)[0] == 4


def test_a_claim_is_read_only_where_it_is_newer(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_claim(tier, RUN, 0) is None
    tier.claim_timeline(RUN, 2, Claim(job=OLD, step=1).encode())
    assert newest_claim(tier, RUN, 1) == (2, OLD)
    monkeypatch.setattr(LocalTier, "timeline_record", None)
    assert newest_claim(tier, RUN, 2) is None


def test_superseded_checkpoints_are_told_with_the_reason(tier: LocalTier) -> None:
    state = {"w": np.zeros(4)}
    for step in (100, 200):
        write_checkpoint(tier, state, run=RUN, step=step, save_id=f"{OLD}-{step // 100}")
    parent = Parent(save_id=f"{OLD}-1", timeline=1, step=100)
    write_checkpoint(tier, state, run=RUN, step=150, save_id=f"{NEW}-1", timeline=2, parent=parent)
    place = open_place(str(tier.root))
    infos = list_checkpoints(place, RUN, include_superseded=True)
    assert why_superseded(place, infos) == {f"{OLD}-2": "timeline 2 went on from step 100"}
    assert json.dumps([info.to_json() for info in infos])
