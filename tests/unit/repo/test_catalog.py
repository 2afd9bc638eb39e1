"""The catalogue: one view over all tiers, and the words that name a checkpoint."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from ckptstore.blob.base import BlobStore, ObjectInfo
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    NotFoundError,
    TransientError,
)
from ckptstore.format.manifest import Parent, RootManifest, root_of
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.commit import roll_forward
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.timelines import Claim
from ckptstore.testing.local_saves import shard_of, summary_of, write_save

RUN = "run"


class UnreliableBlobStore(MemoryBlobStore):
    """Cut off from its server for keys that contain one of ``broken``; counts its reads."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.broken: tuple[str, ...] = ()
        self.gets: list[str] = []
        self.lists: list[str] = []

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        self.gets.append(key)
        self._check(key)
        return super().get(key, start=start, length=length, max_bytes=max_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.lists.append(prefix)
        self._check(prefix)
        return super().list(prefix)

    def _check(self, key: str) -> None:
        if any(part in key for part in self.broken):
            raise TransientError("connection refused", reason="unreachable")


def save_id(counter: int, job: int = 1) -> str:
    return f"{job:012x}-{counter}"


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    return tier


@pytest.fixture
def blob() -> UnreliableBlobStore:
    return UnreliableBlobStore(uuid.uuid4().hex)


@pytest.fixture
def remote(blob: UnreliableBlobStore) -> RemoteTier:
    return RemoteTier(blob, RUN, "s3")


def put(blob: BlobStore, tier: LocalTier, step: int, save_id: str, **fields: Any) -> RootManifest:
    """Commit the documents of a save on a remote."""
    summary = summary_of(tier, RUN, step, save_id, **fields)
    root = root_of([shard_of(summary, rank, b"payload") for rank in range(summary.world_size)])
    place = RemoteSave.of(root.summary)
    blob.put(f"runs/{RUN}/summaries/{place.name}", root.summary.encode())
    blob.put(f"runs/{RUN}/{place.key}", root.encode())
    return root


def steps(catalog: Catalog) -> list[int]:
    return [record.step for record in catalog.line()]


# ---------------------------------------------------------------------- the union


def test_catalogue_is_empty_when_no_tier_has_the_run(tmp_path: Path, remote: RemoteTier) -> None:
    for catalog in (
        Catalog.read(None, [], RUN),
        Catalog.read(LocalTier(tmp_path / "absent"), [], RUN),
        Catalog.read(LocalTier(tmp_path / "absent"), [remote], RUN),
    ):
        assert list(catalog.records) == []
        assert catalog.latest() is None
        assert catalog.parent_for(10) is None
        assert catalog.next_timeline() == 1
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
            catalog.resolve("latest")
    assert not (tmp_path / "absent").exists()


def test_saves_of_all_tiers_are_one_list_when_tiers_hold_different_ones(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore
) -> None:
    write_save(tier, RUN, 9, save_id(2))
    write_save(tier, RUN, 10, save_id(3))
    put(blob, tier, 8, save_id(1))
    put(blob, tier, 9, save_id(2))
    tier.pin(RUN, save_id(1))
    remote.pin(save_id(3))
    blob.gets.clear()
    catalog = Catalog.read(tier, [remote], RUN)
    assert steps(catalog) == [8, 9, 10]
    assert [dict(record.tiers) for record in catalog.records] == [
        {"local": "absent", "s3": "complete"},
        {"local": "complete", "s3": "complete"},
        {"local": "complete", "s3": "absent"},
    ]
    assert [record.pinned for record in catalog.records] == [True, False, True]
    assert [set(record.remote) for record in catalog.records] == [{"s3"}, {"s3"}, set()]
    assert [record.local is not None for record in catalog.records] == [False, True, True]
    assert len(blob.gets) == 1, "a summary that is on the local disk was fetched"


def test_remote_saves_are_listed_when_there_is_no_local_tier(tier: LocalTier, blob: UnreliableBlobStore) -> None:
    remotes = [RemoteTier(blob, RUN, "s3"), RemoteTier(MemoryBlobStore(uuid.uuid4().hex), RUN, "oss")]
    for counter, step in enumerate((10, 9, 8)):
        put(blob, tier, step, save_id(counter), timeline=1)
    catalog = Catalog.read(None, remotes, RUN)
    assert steps(catalog) == [8, 9, 10]
    assert dict(catalog.records[0].tiers) == {"s3": "complete", "oss": "absent"}


def test_local_save_is_shown_with_its_state_when_the_remote_has_it_complete(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore
) -> None:
    write_save(tier, RUN, 5, save_id(1), world_size=2, ranks=[1])
    put(blob, tier, 5, save_id(1), world_size=2)
    path = write_save(tier, RUN, 6, save_id(2))
    put(blob, tier, 6, save_id(2), tags=("from remote",))
    for name in ("summary.json", "manifest.json"):
        (path / name).write_bytes(b"")
    catalog = Catalog.read(tier, [remote], RUN)
    assert [record.tiers["local"] for record in catalog.records] == ["prepared", "damaged"]
    assert catalog.records[1].summary.tags == ("from remote",)
    assert list(catalog.prepared) == []
    assert list(catalog.damaged) == []


def test_prepared_save_is_no_checkpoint_until_it_is_rolled_forward(tier: LocalTier, tmp_path: Path) -> None:
    write_save(tier, RUN, 5, save_id(1))
    other = LocalTier(tmp_path / "other")
    other.create()
    write_save(tier, RUN, 6, save_id(2), world_size=2, ranks=[0], node=0)
    path = write_save(other, RUN, 6, save_id(2), world_size=2, ranks=[1], node=1)
    catalog = Catalog.read(tier, [], RUN)
    assert steps(catalog) == [5]
    assert [save.save_id for save in catalog.prepared] == [save_id(2)]
    with pytest.raises(CheckpointNotFoundError):
        catalog.resolve(6)
    with pytest.raises(IncompleteCheckpointError):
        catalog.resolve(save_id(2))
    assert roll_forward(tier, RUN, save_id(2), other.shard_manifests_present(path)) is not None
    assert steps(Catalog.read(tier, [], RUN)) == [5, 6]


def test_run_is_not_new_when_all_its_saves_are_damaged(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    for name in ("summary.json", "manifest.json"):
        (path / name).write_bytes(b"{")
    catalog = Catalog.read(tier, [], RUN)
    assert [(damaged.step, damaged.tiers) for damaged in catalog.damaged] == [(5, ("local",))]
    for word in ("latest", 5, 7, "latest~1", save_id(1)):
        with pytest.raises(IntegrityError, match="step 5"):
            catalog.resolve(word)


def test_damaged_save_is_passed_over_and_named_when_others_are_fine(tier: LocalTier) -> None:
    write_save(tier, RUN, 4, save_id(1))
    path = write_save(tier, RUN, 5, save_id(2))
    for name in ("summary.json", "manifest.json"):
        (path / name).write_bytes(b"{")
    catalog = Catalog.read(tier, [], RUN)
    assert catalog.resolve("latest").step == 4
    assert "manifest.json" in catalog.damaged[0].reason
    with pytest.raises(IntegrityError):
        catalog.resolve(5)


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_remote_summary_comes_from_the_commit_when_its_own_object_is_unusable(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore, harm: str
) -> None:
    root = put(blob, tier, 5, save_id(1), metrics={"loss": 2.0})
    key = f"runs/{RUN}/summaries/{RemoteSave.of(root.summary).name}"
    blob.delete([key])
    if harm == "damaged":
        blob.put(key, b"{")
    catalog = Catalog.read(tier, [remote], RUN)
    assert catalog.records[0].summary == root.summary


def test_remote_save_is_reported_as_damaged_when_nothing_of_it_can_be_read(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore
) -> None:
    place = RemoteSave.of(put(blob, tier, 5, save_id(1)).summary)
    for key in (f"runs/{RUN}/summaries/{place.name}", f"runs/{RUN}/{place.key}"):
        blob.put(key, b"{")
    put(blob, tier, 4, save_id(0))
    catalog = Catalog.read(tier, [remote], RUN)
    assert steps(catalog) == [4]
    assert [(damaged.step, damaged.tiers) for damaged in catalog.damaged] == [(5, ("s3",))]


def test_save_is_described_by_the_second_remote_when_the_first_is_damaged(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore
) -> None:
    second = MemoryBlobStore(uuid.uuid4().hex)
    place = RemoteSave.of(put(blob, tier, 5, save_id(1)).summary)
    put(second, tier, 5, save_id(1))
    for key in (f"runs/{RUN}/summaries/{place.name}", f"runs/{RUN}/{place.key}"):
        blob.put(key, b"{")
    catalog = Catalog.read(None, [remote, RemoteTier(second, RUN, "oss")], RUN)
    assert steps(catalog) == [5]
    assert list(catalog.damaged) == []


def test_save_is_left_out_when_it_is_deleted_between_listing_and_reading(tier: LocalTier) -> None:
    class Vanishing(MemoryBlobStore):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            found = list(super().list(prefix))
            self.delete([info.key for info in found])
            return iter(found)

    blob = Vanishing(uuid.uuid4().hex)
    place = RemoteSave.of(put(blob, tier, 5, save_id(1)).summary)
    blob.delete([f"runs/{RUN}/summaries/{place.name}"])
    write_save(tier, RUN, 4, save_id(0))
    catalog = Catalog.read(tier, [RemoteTier(blob, RUN, "s3")], RUN)
    assert steps(catalog) == [4]
    assert list(catalog.damaged) == []


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("broken", ["commits/", "pins/", "summaries/"])
def test_catalogue_raises_when_a_remote_can_not_be_read(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore, broken: str
) -> None:
    write_save(tier, RUN, 4, save_id(1))
    put(blob, tier, 5, save_id(2))
    blob.broken = (broken,)
    with pytest.raises(TransientError):
        Catalog.read(tier, [remote], RUN)


@pytest.mark.parametrize("broken", ["commits/", "pins/", "summaries/"])
def test_unreachable_remote_is_left_out_and_named_when_tolerated(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore, broken: str
) -> None:
    write_save(tier, RUN, 4, save_id(1))
    put(blob, tier, 4, save_id(1))
    put(blob, tier, 5, save_id(2))
    blob.broken = (broken,)
    catalog = Catalog.read(tier, [remote], RUN, tolerate_unreachable=True)
    assert steps(catalog) == [4]
    assert list(catalog.unreachable) == ["s3"]
    assert [line.partition(":")[0] for line in catalog.left_out()] == ["what only remote s3 has"]
    assert dict(catalog.records[0].tiers) == {"local": "complete"}
    assert dict(catalog.records[0].remote) == {}
    assert list(catalog.damaged) == []


def test_run_is_never_taken_for_new_when_the_remote_is_unreachable(
    tier: LocalTier, remote: RemoteTier, blob: UnreliableBlobStore
) -> None:
    put(blob, tier, 5, save_id(2))
    for broken in ("commits/", "summaries/"):
        blob.broken = (broken,)
        with pytest.raises(TransientError):
            Catalog.read(tier, [remote], RUN, tolerate_unreachable=True)
        with pytest.raises(TransientError):
            Catalog.read(None, [remote], RUN, tolerate_unreachable=True)


def test_catalogue_raises_when_the_local_tier_can_not_be_read(tier: LocalTier, remote: RemoteTier) -> None:
    (tier.root / RUN).write_text("not a folder")
    with pytest.raises(FormatError):
        Catalog.read(tier, [remote], RUN, tolerate_unreachable=True)


def test_catalogue_is_refused_when_the_store_is_of_a_newer_format(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, save_id(1))
    (tier.root / "ckptstore.json").write_text('{"format":"ckptstore","version":2}')
    with pytest.raises(FormatError, match="upgrade"):
        Catalog.read(tier, [], RUN)


def test_saves_are_still_shown_when_the_store_lost_its_marker(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, save_id(1))
    (tier.root / "ckptstore.json").unlink()
    assert steps(Catalog.read(tier, [], RUN)) == [5]


# ---------------------------------------------------------------------- timelines


@pytest.fixture
def rolled_back(tier: LocalTier) -> LocalTier:
    """100 500 900, then back to 500 and on with 510 520."""
    for counter, step in enumerate((100, 500, 900)):
        write_save(tier, RUN, step, save_id(counter))
    parent = Parent(save_id=save_id(1), timeline=1, step=500)
    for counter, step in enumerate((510, 520)):
        write_save(tier, RUN, step, save_id(counter, job=2), timeline=2, parent=parent)
    return tier


def test_superseded_saves_are_neither_latest_nor_best_nor_steps(rolled_back: LocalTier) -> None:
    catalog = Catalog.read(rolled_back, [], RUN)
    assert steps(catalog) == [100, 500, 510, 520]
    assert [record.step for record in catalog.records] == [100, 500, 900, 510, 520]
    assert [record.step for record in catalog.records if record.superseded] == [900]
    assert catalog.resolve("latest").step == 520
    assert catalog.resolve("latest~2").step == 500
    with pytest.raises(CheckpointNotFoundError, match=save_id(2)):
        catalog.resolve(900)
    assert catalog.resolve(save_id(2)).superseded


def test_new_timeline_continues_from_what_is_below_its_first_step(rolled_back: LocalTier) -> None:
    rolled_back.claim_timeline(RUN, 7, b"{}")
    catalog = Catalog.read(rolled_back, [], RUN)
    assert catalog.next_timeline() == 8
    assert catalog.parent_for(1000) == Parent(save_id=save_id(1, job=2), timeline=2, step=520)
    assert catalog.parent_for(510) == Parent(save_id=save_id(1), timeline=1, step=500)
    assert catalog.parent_for(100) is None


def test_claims_on_remotes_count_when_the_next_timeline_is_chosen(tier: LocalTier, remote: RemoteTier) -> None:
    write_save(tier, RUN, 5, save_id(1), timeline=3)
    assert Catalog.read(tier, [remote], RUN).next_timeline() == 4
    remote.claim_timeline(8, b"{}")
    assert Catalog.read(tier, [remote], RUN).next_timeline() == 9


def test_claims_on_disk_tell_the_branch_point_when_a_line_was_pruned(tier: LocalTier) -> None:
    for counter, step in enumerate((100, 200, 300)):
        write_save(tier, RUN, step, save_id(counter))
    pruned = Parent(save_id=save_id(0, job=2), timeline=2, step=250)
    write_save(tier, RUN, 260, save_id(0, job=3), timeline=3, parent=pruned)
    assert steps(Catalog.read(tier, [], RUN)) == [100, 200, 260]
    record = {"job": "000000000002", "step": 250, "parent": {"save_id": save_id(0), "timeline": 1, "step": 100}}
    tier.claim_timeline(RUN, 2, json.dumps(record).encode())
    assert steps(Catalog.read(tier, [], RUN)) == [100, 260]


def test_claim_of_another_job_is_passed_over_when_the_number_was_claimed_twice(tier: LocalTier) -> None:
    write_save(tier, RUN, 100, save_id(0))
    tier.claim_timeline(RUN, 2, Claim(job="000000000009", step=5).encode())
    pruned = Parent(save_id=save_id(0, job=2), timeline=2, step=250)
    write_save(tier, RUN, 260, save_id(0, job=3), timeline=3, parent=pruned)
    assert steps(Catalog.read(tier, [], RUN)) == [100, 260]


@pytest.mark.parametrize("record", [b"", b"{", b'{"something":"else"}'])
def test_torn_or_foreign_claims_are_passed_over(tier: LocalTier, record: bytes) -> None:
    write_save(tier, RUN, 100, save_id(0))
    tier.claim_timeline(RUN, 2, record)
    pruned = Parent(save_id=save_id(0, job=2), timeline=2, step=250)
    write_save(tier, RUN, 260, save_id(0, job=3), timeline=3, parent=pruned)
    assert steps(Catalog.read(tier, [], RUN)) == [100, 260]


# ---------------------------------------------------------------------- words


@pytest.fixture
def catalog(tier: LocalTier) -> Catalog:
    metrics: list[dict[str, float | str]] = [{"loss": 2.0}, {"loss": 1.0}, {"loss": "nan"}, {"loss": 1.0}, {}]
    for counter, metric in enumerate(metrics):
        write_save(tier, RUN, 10 * counter, save_id(counter), metrics=metric)
    return Catalog.read(tier, [], RUN)


@pytest.mark.parametrize(
    "word, step",
    [(0, 0), (30, 30), ("30", 30), ("030", 30), ("latest", 40), ("latest~0", 40), ("latest~4", 0), (save_id(2), 20)],
)
def test_checkpoint_is_found_when_it_is_named(catalog: Catalog, word: int | str, step: int) -> None:
    assert catalog.resolve(word).step == step


@pytest.mark.parametrize(
    "word, said",
    [
        (25, "nearest: 20 and 30"),
        (99, "nearest: 40"),
        ("5", "nearest: 0 and 10"),
        ("latest~5", "only 5 checkpoints"),
        (save_id(9), "latest is"),
    ],
)
def test_nearest_is_named_when_there_is_no_such_checkpoint(catalog: Catalog, word: int | str, said: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=said) as caught:
        catalog.resolve(word)
    assert caught.value.exit_code == 13
    assert isinstance(caught.value, NotFoundError)


@pytest.mark.parametrize(
    "word",
    [
        "",
        "last",
        "latest~",
        "latest~-1",
        "latest ~1",
        "Latest",
        "-1",
        "1.0",
        "٣",
        "1\n",
        "../x",
        -1,
        True,
        None,
        1.5,
        b"1",
    ],
)
def test_word_is_refused_when_it_can_not_be_parsed(catalog: Catalog, word: Any) -> None:
    with pytest.raises(ConfigError):
        catalog.resolve(word)


def test_best_is_the_newest_of_the_best_numbers(catalog: Catalog) -> None:
    assert catalog.resolve("best", "loss", "min").step == 30
    assert catalog.resolve("best", "loss", "max").step == 0
    assert catalog.best("accuracy", "max") is None
    with pytest.raises(CheckpointNotFoundError, match="accuracy"):
        catalog.resolve("best", "accuracy", "max")
    with pytest.raises(ConfigError):
        catalog.best("loss", "lowest")


def test_best_of_nothing_is_nothing_and_no_question_of_metrics(tmp_path: Path) -> None:
    empty = LocalTier(tmp_path / "empty")
    empty.create()
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        Catalog.read(empty, (), "run").resolve("best")


def test_best_names_its_metric_or_takes_the_only_loss(catalog: Catalog, tier: LocalTier) -> None:
    assert catalog.resolve("best").step == 30
    assert catalog.resolve("best:loss").step == 30
    assert catalog.resolve("best:loss:max").step == catalog.resolve("best", mode="max").step == 0
    with pytest.raises(CheckpointNotFoundError, match="accuracy"):
        catalog.resolve("best:accuracy:max")
    for counter in (1, 2):
        write_save(tier, "two", counter, save_id(counter), metrics={"train/loss": 1.0, "val/loss": 1.0 / counter})
    two = Catalog.read(tier, [], "two")
    assert two.resolve("best:val/loss").step == 2
    with pytest.raises(ConfigError, match="2 of them end in 'loss'"):
        two.resolve("best")


def test_infinities_are_ordered_as_numbers_when_they_are_metrics(tier: LocalTier) -> None:
    for counter, value in enumerate(("nan", "inf", "-inf", 1.0, "nan")):
        write_save(tier, RUN, counter, save_id(counter), metrics={"m": value})
    catalog = Catalog.read(tier, [], RUN)
    assert catalog.resolve("best", "m", "max").step == 1
    assert catalog.resolve("best", "m", "min").step == 2


def test_info_tells_what_users_see(tier: LocalTier, remote: RemoteTier) -> None:
    write_save(
        tier,
        RUN,
        5,
        save_id(1),
        b"x" * 100,
        created_at="2026-11-25T12:00:00.250Z",
        epoch=2,
        metrics={"loss": 1.5, "a": "nan", "b": "-inf"},
        tags=("t",),
        emergency=True,
        job="slurm-1",
        world_size=2,
    )
    tier.pin(RUN, save_id(1))
    info = Catalog.read(tier, [remote], RUN).resolve(5).info()
    assert (info.run, info.step, info.save_id, info.epoch, info.job) == (RUN, 5, save_id(1), 2, "slurm-1")
    assert info.created_at == datetime(2026, 11, 25, 12, 0, 0, 250000, tzinfo=timezone.utc)
    assert info.metrics["loss"] == 1.5
    assert math.isnan(info.metrics["a"])
    assert info.metrics["b"] == -math.inf
    assert (info.tags, info.pinned, info.emergency, info.superseded) == (("t",), True, True, False)
    assert (info.timeline, info.world_size, info.size_bytes) == (1, 2, 200)
    assert info.tiers == {"local": "complete", "s3": "absent"}
