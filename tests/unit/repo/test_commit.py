"""The local commit: what is visible before it, after it, and when a step of it fails."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
    ConfigError,
    ConflictError,
    FormatError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    StorageError,
)
from ckptstore.format.manifest import root_of
from ckptstore.repo import durable, names
from ckptstore.repo.commit import StagingDir, complete, raise_for_errno, roll_forward
from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import image_of, shard_of, summary_of, write_save

RUN = "run"
SAVE = "0123456789ab-1"
OTHER = "0123456789ab-2"


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    return tier


def entries(tier: LocalTier) -> list[str]:
    return sorted(path.name for path in tier.run_path(RUN).iterdir())


# ---------------------------------------------------------------------- one node


def test_save_appears_whole_and_private_when_committed(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, SAVE, b"abc" * 1000)
    assert entries(tier) == [f"step-0000000005-{SAVE}"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert files == dict.fromkeys(
        [".metadata", "__0_0.distcp", "manifest.json", "shard-00000.json", "summary.json"], 0o600
    )
    shard = shard_of(summary_of(tier, RUN, 5, SAVE), 0, b"abc" * 1000)
    assert (path / "__0_0.distcp").read_bytes() == image_of(shard, b"abc" * 1000)
    assert tier.saves(RUN)[0].state == "complete"


def test_nothing_is_visible_when_the_save_is_not_committed_yet(tier: LocalTier) -> None:
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    staging.write_file("manifest.json", b"{}")
    assert tier.saves(RUN) == []
    staging.discard()
    staging.discard()
    assert entries(tier) == []


def test_leftover_of_a_killed_attempt_is_replaced_when_the_part_is_written_again(tier: LocalTier) -> None:
    killed = StagingDir(tier, RUN, 5, SAVE)
    killed.create()
    killed.write_file("shard-00007.json", b"stale")
    again = StagingDir(tier, RUN, 5, SAVE)
    again.create()
    assert list(again.path.iterdir()) == []
    again.write_file("shard-00000.json", b"kept")
    joined = StagingDir(tier, RUN, 5, SAVE)
    joined.create(keep=True)
    assert [path.name for path in joined.path.iterdir()] == ["shard-00000.json"]


def test_committed_save_is_never_replaced_when_its_save_id_comes_again(tier: LocalTier) -> None:
    late = StagingDir(tier, RUN, 5, SAVE)
    late.create()
    late.write_file("manifest.json", b"other")
    os.rename(late.path, late.path.with_name("aside"))
    path = write_save(tier, RUN, 5, SAVE)
    before = (path / "manifest.json").read_bytes()
    os.rename(late.path.with_name("aside"), late.path)
    with pytest.raises(CheckpointExistsError):
        late.commit()
    with pytest.raises(CheckpointExistsError):
        StagingDir(tier, RUN, 5, SAVE).create()
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["", "..", "a", "../x", "__00_0.distcp", "manifest.json.tmp", "shard-1.json"])
def test_file_is_refused_when_its_name_is_outside_the_grammar(tier: LocalTier, name: str) -> None:
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    with pytest.raises(ConfigError):
        staging.open_file(name)


def test_staging_is_refused_when_step_or_save_id_can_not_be_right(tier: LocalTier) -> None:
    with pytest.raises(ConfigError):
        StagingDir(tier, RUN, -1, SAVE)
    with pytest.raises(ConfigError):
        StagingDir(tier, RUN, 1, "../x")


def test_planted_link_is_not_followed_when_a_file_is_created(tier: LocalTier, tmp_path: Path) -> None:
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    (tmp_path / "victim").write_text("precious")
    (staging.path / "__0_0.distcp").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="EEXIST"):
        staging.open_file("__0_0.distcp")
    assert (tmp_path / "victim").read_text() == "precious"


def test_commit_is_refused_when_a_file_is_still_open(tier: LocalTier) -> None:
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    fd = staging.open_file("__0_0.distcp")
    with pytest.raises(StorageError, match="not closed"):
        staging.commit()
    staging.close_file(fd)
    assert staging.commit().is_dir()


def test_descriptors_are_closed_when_a_save_is_discarded(tier: LocalTier) -> None:
    before = len(os.listdir("/proc/self/fd"))
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    for rank in range(5):
        staging.open_file(names.shard_file(rank))
    staging.discard()
    assert len(os.listdir("/proc/self/fd")) <= before


def counted_failure(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, number: int = errno.EIO) -> Callable[[], int]:
    """Let the n-th call of one kind of fsync fail, as a dying disk does; returns the number of calls so far."""
    real = getattr(durable, name)
    calls = 0

    def failing(target: object) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(number, os.strerror(number))
        real(target)

    monkeypatch.setattr(durable, name, failing)
    return lambda: calls


FSYNC_FAILURES = [
    *(("fsync_file", nth) for nth in range(1, 6)),
    ("fsync_dir", 1),
    *(("fsync_parent", nth) for nth in range(1, 4)),
]


@pytest.mark.parametrize("kind, nth", FSYNC_FAILURES)
def test_save_is_invisible_and_can_be_written_anew_when_an_fsync_fails(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, kind: str, nth: int
) -> None:
    older = write_save(tier, RUN, 1, OTHER)
    calls = counted_failure(monkeypatch, kind, nth)
    with pytest.raises(StorageError, match="EIO") as caught:
        write_save(tier, RUN, 5, SAVE)
    assert caught.value.context["errno"] == "EIO"
    assert calls() == nth, "the failed fsync was tried again, or another followed"
    assert [save.path for save in tier.saves(RUN)] == [older]
    monkeypatch.undo()
    write_save(tier, RUN, 5, SAVE)
    assert [save.state for save in tier.saves(RUN)] == ["complete", "complete"]
    assert tier.sweep(RUN) == []


def test_commit_is_refused_when_an_earlier_fsync_of_the_save_failed(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = StagingDir(tier, RUN, 5, SAVE)
    staging.create()
    fd = staging.open_file("__0_0.distcp")
    counted_failure(monkeypatch, "fsync_file", 1)
    with pytest.raises(StorageError, match="EIO"):
        staging.close_file(fd)
    with pytest.raises(StorageError, match="earlier write failed"):
        staging.commit()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---------------------------------------------------------------------- several nodes


def test_parts_become_complete_when_the_root_manifest_comes(tmp_path: Path) -> None:
    tiers = [LocalTier(tmp_path / f"node{node}") for node in range(2)]
    for tier in tiers:
        tier.create()
    paths = [write_save(t, RUN, 5, SAVE, world_size=2, ranks=[n], node=n) for n, t in enumerate(tiers)]
    root = root_of([shard for t, p in zip(tiers, paths, strict=True) for shard in t.shard_manifests_present(p)])
    for tier, path in zip(tiers, paths, strict=True):
        complete(path, root)
        complete(path, root)
        assert (path / "manifest.json").read_bytes() == root.encode()
        assert (path / "summary.json").read_bytes() == root.summary.encode()
        assert not (path / ".metadata").exists()  # stock could not find the other node's bytes
        [save] = tier.saves(RUN)
        assert save.state == "complete"
        assert save.summary == root.summary
        assert not [file for file in path.iterdir() if file.name.endswith(".tmp")]
    assert root.summary.num_nodes == 2


@pytest.mark.parametrize("kind, nth", [("fsync_file", 1), ("fsync_file", 2), ("fsync_dir", 1), ("fsync_dir", 2)])
def test_part_is_completed_later_when_completing_it_failed(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, kind: str, nth: int
) -> None:
    path = write_save(tier, RUN, 5, SAVE, world_size=2, defer_complete=True)
    root = root_of(tier.shard_manifests_present(path))
    counted_failure(monkeypatch, kind, nth, errno.ENOSPC)
    with pytest.raises(NoSpaceError):
        complete(path, root)
    assert not [file for file in path.iterdir() if file.name.endswith(".tmp")]
    monkeypatch.undo()
    complete(path, root)
    assert tier.root_manifest(RUN, tier.saves(RUN)[0]) == root


def test_temporary_files_are_removed_when_a_final_name_is_blocked(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, SAVE, world_size=2, defer_complete=True)
    root = root_of(tier.shard_manifests_present(path))
    (path / "summary.json").mkdir()
    with pytest.raises(StorageError, match="EISDIR"):
        complete(path, root)
    assert not [file for file in path.iterdir() if file.name.endswith(".tmp")]
    assert tier.saves(RUN)[0].state == "prepared"


def test_part_is_not_completed_when_the_root_names_another_part(tier: LocalTier) -> None:
    summary = summary_of(tier, RUN, 5, SAVE, world_size=2)
    foreign_root = root_of([shard_of(summary, rank, b"other bytes") for rank in range(2)])
    path = write_save(tier, RUN, 5, SAVE, world_size=2, ranks=[0])
    with pytest.raises(IntegrityError):
        complete(path, foreign_root)
    assert tier.saves(RUN)[0].state == "prepared"


def test_part_is_not_completed_when_its_shard_file_is_not_whole(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, SAVE, world_size=2, defer_complete=True)
    root = root_of(tier.shard_manifests_present(path))
    (path / "__1_0.distcp").write_bytes(b"short")
    with pytest.raises(IntegrityError, match="not whole"):
        complete(path, root)
    assert tier.saves(RUN)[0].state == "prepared"


def test_committed_save_is_never_changed_when_another_root_comes(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, SAVE)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    root = tier.root_manifest(RUN, tier.saves(RUN)[0])
    other = root.model_copy(update={"summary": root.summary.model_copy(update={"tags": ("changed",)})})
    with pytest.raises(ConflictError):
        complete(path, other)
    for foreign in ({"step": 6}, {"save_id": OTHER}):
        with pytest.raises(FormatError):
            complete(path, root.model_copy(update={"summary": root.summary.model_copy(update=foreign)}))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_prepared_save_is_rolled_forward_when_all_parts_are_here(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, SAVE, world_size=2, defer_complete=True)
    root = roll_forward(tier, RUN, SAVE)
    assert root is not None
    assert tier.saves(RUN)[0].state == "complete"
    assert (path / ".metadata").stat().st_size > 0
    assert roll_forward(tier, RUN, SAVE) == root


def test_prepared_save_is_rolled_forward_only_when_the_other_parts_are_elsewhere(
    tier: LocalTier, tmp_path: Path
) -> None:
    other = LocalTier(tmp_path / "node1")
    other.create()
    write_save(tier, RUN, 5, SAVE, world_size=3, ranks=[0], node=0)
    path = write_save(other, RUN, 5, SAVE, world_size=3, ranks=[1, 2], node=1)
    away = other.shard_manifests_present(path)
    assert roll_forward(tier, RUN, SAVE) is None
    assert roll_forward(tier, RUN, SAVE, away[:1]) is None
    assert tier.saves(RUN)[0].state == "prepared"
    root = roll_forward(tier, RUN, SAVE, away)
    assert root is not None
    assert tier.root_manifest(RUN, tier.saves(RUN)[0]) == root
    assert roll_forward(other, RUN, SAVE, tier.shard_manifests_present(tier.saves(RUN)[0].path)) == root
    assert roll_forward(tier, RUN, OTHER) is None


def test_save_is_not_rolled_forward_when_two_parts_of_a_rank_differ(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, SAVE, world_size=2, ranks=[0])
    summary = summary_of(tier, RUN, 5, SAVE, world_size=2)
    with pytest.raises(ConflictError):
        roll_forward(tier, RUN, SAVE, [shard_of(summary, 0, b"different"), shard_of(summary, 1, b"x")])
    assert tier.saves(RUN)[0].state == "prepared"


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "number, kind",
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EIO, StorageError),
        (errno.EROFS, StorageError),
        (errno.EMFILE, StorageError),
        (errno.EACCES, StorageError),
        (errno.ELOOP, FormatError),
    ],
)
def test_errno_is_named_when_the_system_refuses(number: int, kind: type[CkptError]) -> None:
    with pytest.raises(kind) as caught:
        raise_for_errno(OSError(number, os.strerror(number), "/some/file"), "can't write step 5", step=5)
    error = caught.value
    assert type(error) is kind
    assert errno.errorcode[number] in str(error)
    assert error.context == {"errno": errno.errorcode[number], "path": "/some/file", "step": 5}
    assert pickle.loads(pickle.dumps(error)).context == error.context


def test_our_own_error_is_passed_on_when_it_is_an_oserror_too() -> None:
    original = NotFoundError("gone")
    with pytest.raises(NotFoundError) as caught:
        raise_for_errno(original, "can't read")
    assert caught.value is original
