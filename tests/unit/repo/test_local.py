"""The local tier: what it lists, what it ignores, what it refuses to touch."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckptstore.errors import (
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    IntegrityError,
    NoStoreError,
    NotFoundError,
)
from ckptstore.format.manifest import RootManifest
from ckptstore.repo import names
from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import summary_of, write_save

RUN = "run"


def save_id(counter: int) -> str:
    return f"0123456789ab-{counter}"


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    return tier


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------- the store


def test_nothing_is_written_when_a_tier_is_only_opened(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "store")
    assert not tier.exists()
    assert tier.runs() == []
    assert tier.saves(RUN) == []
    assert tier.pins(RUN) == set()
    assert tier.timelines(RUN) == []
    assert list(tmp_path.iterdir()) == []


def test_store_is_private_and_carries_one_marker_when_created(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "a" / "b")
    tier.create()
    tier.create()
    assert tier.exists()
    assert [path.name for path in tier.root.iterdir()] == ["ckptstore.json"]
    assert (tier.root / "ckptstore.json").read_bytes() == b'{"format":"ckptstore","version":1}'
    assert stat.S_IMODE(tier.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((tier.root / "ckptstore.json").stat().st_mode) == 0o600


def test_one_marker_remains_when_many_create_at_once(tmp_path: Path) -> None:
    tiers = [LocalTier(tmp_path / "store") for _ in range(8)]
    failures: list[BaseException] = []

    def create(tier: LocalTier) -> None:
        try:
            tier.create()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(tier,)) for tier in tiers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["ckptstore.json"]


def test_newer_store_is_refused_before_any_write_when_its_version_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "ckptstore.json").write_text('{"format":"ckptstore","version":2}')
    tier = LocalTier(tmp_path)
    attempts = [
        tier.create,
        tier.exists,
        lambda: tier.claim_timeline(RUN, 1, b""),
        lambda: tier.pin(RUN, save_id(1)),
        lambda: write_save(tier, RUN, 1, save_id(1)),
    ]
    for attempt in attempts:
        with pytest.raises(FormatError, match="upgrade"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["ckptstore.json"]


@pytest.mark.parametrize(
    "marker", ["", "{}", "[]", '{"format":"other","version":1}', '{"format":"ckptstore"}', "[" * 4000]
)
def test_store_is_refused_when_its_marker_is_not_ours(tmp_path: Path, marker: str) -> None:
    (tmp_path / "ckptstore.json").write_text(marker)
    with pytest.raises(FormatError, match=r"ckptstore\.json is damaged"):
        LocalTier(tmp_path).create()


def test_writers_do_not_raise_a_store_from_the_dead_when_its_root_was_removed(tier: LocalTier) -> None:
    shutil.rmtree(tier.root)
    for attempt in (
        lambda: write_save(tier, RUN, 1, save_id(1)),
        lambda: tier.claim_timeline(RUN, 1, b""),
        lambda: tier.pin(RUN, save_id(1)),
    ):
        with pytest.raises(NoStoreError):
            attempt()
    assert not tier.root.exists()


def test_root_may_be_a_symbolic_link_when_the_user_made_it_one(tier: LocalTier, tmp_path: Path) -> None:
    write_save(tier, RUN, 1, save_id(1))
    (tmp_path / "link").symlink_to(tier.root)
    linked = LocalTier(tmp_path / "link")
    linked.create()
    assert [save.step for save in linked.saves(RUN)] == [1]


def test_runs_are_only_folders_that_hold_something_of_ours(tier: LocalTier) -> None:
    write_save(tier, "b", 1, save_id(1))
    tier.claim_timeline("a", 1, b"{}")
    (tier.root / "tensorboard" / "events").mkdir(parents=True)
    (tier.root / "empty").mkdir()
    (tier.root / ".hidden" / "timelines").mkdir(parents=True)
    (tier.root / "linked").symlink_to(tier.root / "b")
    assert tier.runs() == ["a", "b"]


@pytest.mark.parametrize("run", ["", ".", "..", "a/b", "-a", "a\n", "a" * 129, "ü", "\x00"])
def test_run_name_never_becomes_a_path_when_it_is_outside_the_grammar(tier: LocalTier, run: str) -> None:
    for attempt in (
        lambda: tier.saves(run),
        lambda: tier.claim_timeline(run, 1, b""),
        lambda: tier.delete(run, save_id(1)),
        lambda: tier.sweep(run),
        lambda: tier.pins(run),
    ):
        with pytest.raises(ConfigError):
            attempt()


# ---------------------------------------------------------------------- listing


def test_saves_are_in_numeric_order_when_text_and_mtime_say_otherwise(tier: LocalTier) -> None:
    paths = {step: write_save(tier, RUN, step, save_id(step % 100)) for step in (10, 9, 10**10, 8)}
    for mtime, step in enumerate((10**10, 10, 9, 8)):
        os.utime(paths[step], (mtime, mtime))
    assert [save.step for save in tier.saves(RUN)] == [8, 9, 10, 10**10]


def test_save_is_described_by_its_summary_when_complete(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), b"x" * 3000, metrics={"loss": 1.5, "bad": "nan"}, tags=("t",))
    [save] = tier.saves(RUN)
    assert (save.step, save.save_id, save.path, save.state, save.damaged) == (5, save_id(1), path, "complete", None)
    assert save.summary is not None
    assert save.summary.metrics == {"loss": 1.5, "bad": "nan"}
    assert save.summary.size_bytes == 3000
    assert tier.find(RUN, save_id(1)) == save
    assert tier.find(RUN, save_id(2)) is None


def test_save_is_prepared_when_it_has_no_root_manifest(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, save_id(1), world_size=2, ranks=[0])
    write_save(tier, RUN, 6, save_id(2), world_size=2, ranks=[1])
    with_head, without_head = tier.saves(RUN)
    assert with_head.state == without_head.state == "prepared"
    assert with_head.summary is not None
    assert with_head.summary.world_size == 2
    assert without_head.summary is None
    assert without_head.damaged is None


@pytest.mark.parametrize(
    "harm", ["missing", "empty", "flipped", "large", "huge", "symlink", "fifo", "foreign", "directory"]
)
def test_summary_comes_from_the_manifest_when_its_own_file_is_unusable(tier: LocalTier, harm: str) -> None:
    path = write_save(tier, RUN, 5, save_id(1), metrics={"loss": 1.5})
    file = path / "summary.json"
    original = file.read_bytes()
    file.unlink()
    if harm == "empty":
        file.touch()
    elif harm == "flipped":
        file.write_bytes(original.replace(b'"step":5', b'"step":7'))
    elif harm == "large":
        file.write_bytes(original + b" " * (1 << 20))
    elif harm == "huge":  # sparse: reading it whole would need a terabyte
        file.touch()
        os.truncate(file, 1 << 40)
    elif harm == "symlink":
        (path / "elsewhere").write_bytes(original.replace(b"1.5", b"0.5"))
        file.symlink_to(path / "elsewhere")
    elif harm == "fifo":
        os.mkfifo(file)
    elif harm == "foreign":
        file.write_bytes(summary_of(tier, "other-run", 5, save_id(1)).encode())
    elif harm == "directory":
        file.mkdir()
    [save] = tier.saves(RUN)
    assert save.damaged is None
    assert save.summary is not None
    assert save.summary.metrics == {"loss": 1.5}


def test_save_is_reported_as_damaged_when_summary_and_manifest_are(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    write_save(tier, RUN, 6, save_id(2))
    (path / "summary.json").write_bytes(b"{")
    (path / "manifest.json").write_bytes(b'{"format":"ckptstore","version":9}')
    damaged, good = tier.saves(RUN)
    assert damaged.state == "complete"
    assert damaged.summary is None
    assert damaged.damaged is not None
    assert "summary.json" in damaged.damaged
    assert "format 9" in damaged.damaged
    assert good.damaged is None


def test_save_is_damaged_when_its_manifest_is_empty_though_its_summary_is_fine(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    (path / "manifest.json").write_bytes(b"")
    [save] = tier.saves(RUN)
    assert save.damaged == "manifest.json is empty"


@pytest.mark.parametrize("field, value", [("created_at", '"yesterday"'), ("created_at", '"2026-01-01T00:00:00"')])
def test_save_is_damaged_when_a_value_can_not_be_told(tier: LocalTier, field: str, value: str) -> None:
    path = write_save(tier, RUN, 5, save_id(1), metrics={"loss": 1.5})
    for name in ("summary.json", "manifest.json"):
        text = (path / name).read_text()
        start = text.index(f'"{field}":') + len(field) + 3
        end = text.index(",", start)
        (path / name).write_text(text[:start] + value + text[end:])
    [save] = tier.saves(RUN)
    assert save.damaged is not None


@pytest.mark.parametrize(
    "name",
    [
        "step-5-0123456789ab-1",  # other padding
        "step-00000000005-0123456789ab-1",
        "step-0000000005-0123456789AB-1",
        "step-0000000005-0123456789ab-1.bak",
        "step-0000000005-0123456789ab-1\n",
        "step-٠٠٠٠٠٠٠٠٠٥-0123456789ab-1",  # digits, but not ours
        "checkpoint-5",
        "step-0000000005",
        ".staging-x",
        "global_step5",
    ],
)
def test_foreign_folders_are_ignored_and_kept_when_they_look_like_ours(tier: LocalTier, name: str) -> None:
    write_save(tier, RUN, 5, save_id(1))
    shutil.copytree(tier.saves(RUN)[0].path, tier.run_path(RUN) / name)
    assert len(tier.saves(RUN)) == 1
    assert tier.sweep(RUN) == []
    tier.delete(RUN, save_id(1))
    assert tier.saves(RUN) == []
    assert (tier.run_path(RUN) / name / "manifest.json").exists()


def test_links_are_not_followed_when_they_stand_for_runs_or_checkpoints(tier: LocalTier, tmp_path: Path) -> None:
    outside = LocalTier(tmp_path / "outside")
    outside.create()
    path = write_save(outside, RUN, 5, save_id(1))
    tier.make_run("real")
    (tier.run_path("real") / path.name).symlink_to(path)
    assert tier.saves("real") == []
    assert tier.find("real", save_id(1)) is None
    with pytest.raises(CheckpointNotFoundError):
        tier.delete("real", save_id(1))
    (tier.root / "linked").symlink_to(outside.root / RUN)
    for attempt in (
        lambda: tier.saves("linked"),
        lambda: tier.delete("linked", save_id(1)),
        lambda: tier.sweep("linked"),
        lambda: tier.claim_timeline("linked", 1, b""),
        lambda: write_save(tier, "linked", 6, save_id(2)),
    ):
        with pytest.raises(FormatError):
            attempt()
    assert [save.step for save in outside.saves(RUN)] == [5]
    assert not (outside.root / RUN / "timelines").exists()


def test_listing_raises_when_the_run_can_not_be_read(tier: LocalTier) -> None:
    (tier.root / RUN).write_text("a file")
    with pytest.raises(FormatError):
        tier.saves(RUN)


def test_listing_a_thousand_saves_reads_one_small_file_of_each_and_loads_no_heavy_package(tier: LocalTier) -> None:
    source = write_save(tier, RUN, 0, save_id(0), metrics={"train/loss": 1.0, "val/loss": 2.0})
    manifest, summary = (source / "manifest.json").read_text(), (source / "summary.json").read_text()
    for step in range(1, 1000):
        path = tier.run_path(RUN) / names.checkpoint_dir(step, save_id(step))
        path.mkdir()
        for name, text in (("manifest.json", manifest), ("summary.json", summary)):
            text = text.replace('"step":0', f'"step":{step}').replace('ab-0"', f'ab-{step}"')
            (path / name).write_text(text)
    code = (
        "import sys; from pathlib import Path; from ckptstore.repo.local import LocalTier\n"
        "from ckptstore.repo.catalog import Catalog\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "tier = LocalTier(Path(sys.argv[1])); opened.clear(); saves = tier.saves('run')\n"
        "assert len([path for path in opened if '/step-' in path]) == 1000, len(opened)\n"
        "infos = [record.info() for record in Catalog.read(tier, [], 'run').records]\n"
        "assert len(saves) == len(infos) == 1000 and all(s.damaged is None for s in saves)\n"
        "assert not {'torch', 'boto3', 'botocore', 'numpy', 'zstandard'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tier.root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- manifests


def test_manifests_are_read_back_when_asked_by_rank_or_reference(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), world_size=2)
    [save] = tier.saves(RUN)
    root = tier.root_manifest(RUN, save)
    assert [ref.rank for ref in root.shards] == [0, 1]
    present = tier.shard_manifests_present(path)
    assert [tier.shard_manifest(path, ref) for ref in root.shards] == present
    assert [tier.shard_manifest(path, rank) for rank in (0, 1)] == present


def test_shard_manifest_is_refused_when_a_bit_differs_from_the_pinned_bytes(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    ref = tier.root_manifest(RUN, tier.saves(RUN)[0]).shards[0]
    file = path / "shard-00000.json"
    original = file.read_bytes()
    for changed in (
        original.replace(b'"chunk_elements":1024', b'"chunk_elements":1025'),
        original[:-1],
        b"",
        original + b" ",
    ):
        file.write_bytes(changed)
        with pytest.raises(IntegrityError):
            tier.shard_manifest(path, ref)


def test_shard_manifest_is_refused_when_it_belongs_to_another_save_or_rank(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), world_size=2)
    other = write_save(tier, RUN, 6, save_id(2), world_size=2)
    shutil.copy(path / "shard-00001.json", path / "shard-00000.json")
    with pytest.raises(FormatError):
        tier.shard_manifest(path, 0)
    same_step = write_save(tier, RUN, 5, save_id(3), world_size=2)
    for swapped in (other, same_step):
        shutil.copy(path / "shard-00001.json", swapped / "shard-00001.json")
        with pytest.raises(FormatError):
            tier.shard_manifest(swapped, 1)


def test_root_manifest_is_refused_when_it_belongs_to_another_save_or_run(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    other = write_save(tier, "other", 5, save_id(1))
    replayed = write_save(tier, RUN, 6, save_id(2))
    for source in (other, replayed):
        shutil.copy(source / "manifest.json", path / "manifest.json")
        with pytest.raises(FormatError, match="belongs to"):
            tier.root_manifest(RUN, tier.saves(RUN)[0])


@pytest.mark.parametrize("file", ["../../../etc/passwd", "__1_0.distcp", "/etc/passwd", "manifest.json"])
def test_root_manifest_is_refused_when_it_names_files_outside_the_grammar(tier: LocalTier, file: str) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    root = RootManifest.decode((path / "manifest.json").read_bytes(), what="root")
    bad = root.model_copy(update={"shards": (root.shards[0].model_copy(update={"file": file}),)})
    (path / "manifest.json").write_bytes(bad.encode())
    with pytest.raises(FormatError):
        tier.root_manifest(RUN, tier.saves(RUN)[0])


def test_absence_is_told_when_a_manifest_is_not_here(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), world_size=2, ranks=[0])
    with pytest.raises(NotFoundError):
        tier.root_manifest(RUN, tier.saves(RUN)[0])
    with pytest.raises(NotFoundError):
        tier.shard_manifest(path, 1)


def test_part_is_not_present_when_its_shard_file_is_missing_or_short(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), world_size=3)
    (path / "__1_0.distcp").unlink()
    with (path / "__2_0.distcp").open("r+b") as file:
        file.truncate(10)
    assert [shard.rank for shard in tier.shard_manifests_present(path)] == [0]


def test_damaged_part_raises_when_the_present_ones_are_read(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1), world_size=2)
    (path / "shard-00001.json").write_bytes(b"{")
    with pytest.raises(FormatError):
        tier.shard_manifests_present(path)


# ---------------------------------------------------------------------- deleting


def test_save_is_gone_and_others_stay_when_deleted(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, save_id(1))
    write_save(tier, RUN, 6, save_id(2))
    tier.delete(RUN, save_id(1))
    assert [save.step for save in tier.saves(RUN)] == [6]
    assert sorted(path.name for path in tier.run_path(RUN).iterdir()) == [names.checkpoint_dir(6, save_id(2))]
    with pytest.raises(CheckpointNotFoundError):
        tier.delete(RUN, save_id(1))


@pytest.mark.parametrize("bad", ["", "..", "../run", "0123456789ab", "0123456789AB-1", "*", "0123456789ab-1\n"])
def test_deletion_is_refused_when_the_save_id_is_outside_the_grammar(tier: LocalTier, bad: str) -> None:
    write_save(tier, RUN, 5, save_id(1))
    with pytest.raises(ConfigError):
        tier.delete(RUN, bad)
    assert len(tier.saves(RUN)) == 1


def test_foreign_files_are_kept_when_the_checkpoint_around_them_is_deleted(tier: LocalTier, tmp_path: Path) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    (path / "notes.txt").write_text("mine")
    (path / "plots").mkdir()
    (path / "plots" / "loss.png").write_text("mine too")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (path / "link").symlink_to(tmp_path / "precious")
    tier.delete(RUN, save_id(1))
    [kept] = tier.run_path(RUN).iterdir()
    assert kept.name.startswith("kept-")
    assert sorted(entry.name for entry in kept.iterdir()) == ["link", "notes.txt", "plots"]
    assert (kept / "plots" / "loss.png").read_text() == "mine too"
    assert (tmp_path / "precious" / "file").exists()
    assert tier.sweep(RUN) == []
    assert tier.saves(RUN) == []


def test_half_deleted_save_is_invisible_and_swept_when_the_deletion_was_killed(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    path.rename(path.with_name(names.deleting_dir(save_id(1))))
    assert tier.saves(RUN) == []
    assert tier.sweep(RUN) == [names.deleting_dir(save_id(1))]
    assert list(tier.run_path(RUN).iterdir()) == []


def test_deletion_works_again_when_an_earlier_one_of_the_same_save_was_killed(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    path.rename(path.with_name(names.deleting_dir(save_id(1))))
    write_save(tier, RUN, 5, save_id(1))  # pulled again
    tier.delete(RUN, save_id(1))
    assert list(tier.run_path(RUN).iterdir()) == []


def test_deletion_is_refused_when_the_save_is_there_twice(tier: LocalTier) -> None:
    path = write_save(tier, RUN, 5, save_id(1))
    shutil.copytree(path, path.with_name(names.checkpoint_dir(6, save_id(1))))
    with pytest.raises(FormatError, match="more than once"):
        tier.delete(RUN, save_id(1))
    assert path.exists()


def test_leftovers_are_swept_and_live_ones_kept_when_jobs_still_write(tier: LocalTier) -> None:
    write_save(tier, RUN, 5, save_id(1))
    run = tier.run_path(RUN)
    for counter in (2, 3):
        (run / names.staging_dir(save_id(counter)) / "deep").mkdir(parents=True)
        (run / names.staging_dir(save_id(counter)) / "__0_0.distcp").write_bytes(b"half")
    (run / ".staging-mine").mkdir()
    (run / "outside").mkdir()
    (run / names.staging_dir(save_id(4))).symlink_to(run / "outside")
    assert tier.sweep(RUN, live={save_id(3)}) == [names.staging_dir(save_id(2))]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        [
            ".staging-mine",
            names.staging_dir(save_id(3)),
            names.staging_dir(save_id(4)),
            names.checkpoint_dir(5, save_id(1)),
            "outside",
        ]
    )


# ---------------------------------------------------------------------- timelines and pins


def test_timeline_is_claimed_once_when_many_try(tier: LocalTier) -> None:
    won: list[int] = []

    def claim(index: int) -> None:
        if tier.claim_timeline(RUN, 3, f"{index}".encode()):
            won.append(index)

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert tier.timeline_record(RUN, 3) == f"{won[0]}".encode()
    assert tier.timelines(RUN) == [3]


def test_timelines_are_in_numeric_order_and_foreign_names_ignored(tier: LocalTier) -> None:
    for number in (10, 9, 123456789):
        assert tier.claim_timeline(RUN, number, b"")
    for name in ("9.json", "000000009.json", "00000008.json.bak", "latest"):
        (tier.run_path(RUN) / "timelines" / name).touch()
    assert tier.timelines(RUN) == [9, 10, 123456789]
    assert tier.timeline_record(RUN, 8) is None


def test_pin_is_remembered_until_taken_away(tier: LocalTier) -> None:
    tier.pin(RUN, save_id(1))
    tier.pin(RUN, save_id(1))
    (tier.run_path(RUN) / "pins" / "README").touch()
    assert LocalTier(tier.root).pins(RUN) == {save_id(1)}
    tier.unpin(RUN, save_id(1))
    tier.unpin(RUN, save_id(1))
    assert tier.pins(RUN) == set()
    with pytest.raises(ConfigError):
        tier.pin(RUN, "../x")
