"""A full disk, quota or inode table: named, cleaned up after, survived (real tmpfs, real limits)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptstore.errors import NoSpaceError, StorageError
from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import image_of, shard_of, summary_of, write_save

RUN = "run"
SMALL = b"s" * 100_000
LARGE = os.urandom(3_000_000)


def save_id(counter: int) -> str:
    return f"0123456789ab-{counter}"


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


root_only = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="full disk: needs root (tmpfs mount)"
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=2m")


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=64m,nr_inodes=17")


def check_older_is_whole_and_nothing_left(tier: LocalTier) -> None:
    [save] = tier.saves(RUN)
    shard = shard_of(summary_of(tier, RUN, 1, save_id(1)), 0, SMALL)
    assert (save.path / "__0_0.distcp").read_bytes() == image_of(shard, SMALL)
    ref = tier.root_manifest(RUN, save).shards[0]
    tier.shard_manifest(save.path, ref)
    assert [path.name for path in tier.run_path(RUN).iterdir()] == [save.path.name]


@root_only
@pytest.mark.root
def test_errno_is_named_and_saving_works_again_when_the_disk_was_full(small_disk: Path) -> None:
    tier = LocalTier(small_disk / "store")
    tier.create()
    write_save(tier, RUN, 1, save_id(1), SMALL)
    for step in (2, 3):
        with pytest.raises(NoSpaceError, match="ENOSPC") as caught:
            write_save(tier, RUN, step, save_id(step), LARGE)
        assert caught.value.context["errno"] == "ENOSPC"
        assert caught.value.context["step"] == step
        assert caught.value.exit_code == 15
        check_older_is_whole_and_nothing_left(tier)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    write_save(tier, RUN, 4, save_id(4), LARGE)
    assert [save.step for save in tier.saves(RUN)] == [1, 4]


@root_only
@pytest.mark.root
def test_errno_is_named_and_saving_works_again_when_inodes_were_used_up(few_inodes: Path) -> None:
    tier = LocalTier(few_inodes / "store")
    tier.create()
    write_save(tier, RUN, 1, save_id(1), SMALL)
    fillers = []
    with suppress(OSError):
        for number in range(100):
            (few_inodes / f"filler{number}").touch()
            fillers.append(few_inodes / f"filler{number}")
    with pytest.raises(NoSpaceError, match="ENOSPC"):
        write_save(tier, RUN, 2, save_id(2), SMALL)
    for free in range(1, 7):  # fails at a later file each time: directory, shard, manifests
        fillers.pop().unlink()
        try:
            write_save(tier, RUN, 2, save_id(2), SMALL)
        except NoSpaceError:
            check_older_is_whole_and_nothing_left(tier)
        else:
            assert free == 6, "a save of five files in a directory fits into fewer inodes than that"
    assert [save.step for save in tier.saves(RUN)] == [1, 2]


def test_errno_is_named_when_the_file_size_limit_is_reached(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    write_save(tier, RUN, 1, save_id(1), SMALL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(StorageError, match="EFBIG"):
            write_save(tier, RUN, 2, save_id(2), LARGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    check_older_is_whole_and_nothing_left(tier)


def test_errno_is_named_when_descriptors_are_used_up(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    write_save(tier, RUN, 1, save_id(1), SMALL)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for deed in (
            lambda: write_save(tier, RUN, 2, save_id(2), SMALL),
            lambda: tier.saves(RUN),
            lambda: tier.delete(RUN, save_id(1)),
        ):
            with pytest.raises(StorageError, match="EMFILE"):
                deed()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)
    tier.sweep(RUN)
    check_older_is_whole_and_nothing_left(tier)
