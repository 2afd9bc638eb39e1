"""verify finds all damage, believes its eyes only the second time, and repairs from another tier."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.format.manifest import RootManifest
from ckptstore.ops import verify_local
from ckptstore.ops.open import RunTiers, open_place
from ckptstore.ops.repair import repair
from ckptstore.ops.verify import Depth, verify
from ckptstore.repo import gc
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint
from ckptstore.testing.damage import damages
from ckptstore.testing.watched import Request, WatchedBlobStore

RUN = "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saves of two ranks in a local tier and a bucket, the second with references to the first."""
    folder = tmp_path_factory.mktemp("made")
    tiers = open_tiers(folder)
    assert tiers.local is not None
    state = {f"layer{n}": np.random.default_rng(n).normal(size=(32, 32)) for n in range(3)}
    nonce = new_nonce()
    for step in (1, 2):
        path = write_checkpoint(tiers.local, state, run=RUN, step=step, world_size=2, save_id=f"{nonce}-{step}")
        push(tiers.local, path, RUN, tiers.remotes[0], config=StoreConfig())
        state["layer0"] = state["layer0"] + 1e-9
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def open_tiers(folder: Path) -> RunTiers:
    (folder / "cloud").mkdir(parents=True, exist_ok=True)
    return open_place(str(folder / "local"), f"file://{folder}/cloud/bucket", must_exist=False).tiers(RUN)


def files_of(folder: Path) -> list[Path]:
    """Every file that belongs to a checkpoint."""
    bucket = folder / "cloud" / "bucket" / "runs" / RUN
    kinds = [bucket / kind for kind in ("commits", "summaries", "shards", "packs")]
    tops = (folder / "local" / RUN, *kinds)
    return sorted(f for top in tops for f in top.rglob("*") if f.is_file() and "timelines" not in f.parts)


def test_every_kind_of_damage_to_every_file_is_found_and_repaired(folder: Path) -> None:
    tiers = open_tiers(folder)
    assert verify(tiers, None, everything=True, read_data=True).is_clean
    whole = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    rng = random.Random(1)
    every = [file for file in files_of(folder) if "-2" in str(file)]
    for file in every:
        others = [f for f in every if f.suffix == file.suffix and f.parent.parent == file.parent.parent]
        other = whole[next((f for f in others if f != file), file)]
        kinds = dict(damages(whole[file], other, rng, flips=1))
        for kind, data in kinds.items():
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            found = verify(tiers, None, everything=True, read_data=True)
            assert found.is_damaged, f"{kind} of {file.name} was not found"
            assert repair(tiers, found, Depth(read_data=True)).reasons == []
            assert not found.is_damaged, f"{kind} of {file.name} was not repaired: {found.findings}"
            assert verify(tiers, None, everything=True, read_data=True).is_clean
            if "local" in file.parts:
                assert file.read_bytes() == whole[file]
            for path in [path for path in folder.rglob("*") if path.is_file() and path not in whole]:
                path.unlink()
            for path, data in whole.items():
                if not path.exists() or path.read_bytes() != data:
                    path.unlink(missing_ok=True)
                    path.write_bytes(data)


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_findings_name_checkpoint_parameter_and_object(folder: Path) -> None:
    shard = next((folder / "local" / RUN).glob("step-0000000002-*/__1_0.distcp"))
    data = bytearray(shard.read_bytes())
    at = bytes(data).index(np.random.default_rng(1).normal(size=(32, 32))[16:].tobytes()[:64])
    data[at] ^= 1
    shard.write_bytes(data)
    found = verify(open_tiers(folder), 2, everything=False, read_data=True).findings
    assert [(f.step, f.tier, f.kind, f.key, f.object) for f in found] == [
        (2, "local", "damage", "layer1", "__1_0.distcp")
    ]


def test_a_pack_that_is_wrong_once_is_unsteady_and_not_damaged(folder: Path) -> None:
    tiers = open_tiers(folder)
    answers: list[str] = []

    class Flipping(WatchedBlobStore):
        def get(self, key: str, **options: object) -> bytes:  # type: ignore[override]
            data = super().get(key, **options)  # type: ignore[arg-type]
            if "/packs/" in key and key not in answers:
                answers.append(key)
                return bytes([data[0] ^ 1]) + data[1:]
            return data

    blob = Flipping(tiers.remotes[0].blob)
    found = verify(RunTiers(RUN, None, (RemoteTier(blob, RUN, "file"),)), 1, everything=False, read_data=True)
    assert {f.kind for f in found.findings} == {"unsteady"}
    assert not found.is_damaged
    assert not found.is_clean


def test_a_disk_that_reads_wrong_once_is_unsteady(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Callable[..., bytes] = verify_local.os.pread
    wrong: list[int] = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        data = read(fd, size, offset)
        if not wrong and size > 1000:
            wrong.append(offset)
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    monkeypatch.setattr(verify_local.os, "pread", pread)
    tiers = open_tiers(folder)
    found = verify(RunTiers(RUN, tiers.local, ()), 1, everything=False, read_data=True)
    assert [f.kind for f in found.findings] == ["unsteady"]


def test_a_remote_that_is_away_is_unchecked(folder: Path) -> None:
    from ckptstore.errors import TransientError

    def away(request: Request) -> None:
        if "/shards/" in request.key:
            raise TransientError("cut off")

    tiers = open_tiers(folder)
    remote = RemoteTier(WatchedBlobStore(tiers.remotes[0].blob, before=away), RUN, "file")
    found = verify(RunTiers(RUN, None, (remote,)), 1, everything=False, read_data=True)
    assert [f.kind for f in found.findings] == ["unchecked"]


def only(tiers: RunTiers, tier: str) -> RunTiers:
    return RunTiers(RUN, tiers.local, ()) if tier == "local" else RunTiers(RUN, None, tiers.remotes)


@pytest.mark.parametrize("tier", ["local", "file"])
def test_what_is_beyond_repair_is_set_aside_and_counts_no_more(folder: Path, tier: str) -> None:
    tiers = only(open_tiers(folder), tier)
    pattern = "local/run/step-0000000001-*/__0_0.distcp" if tier == "local" else "cloud/bucket/runs/run/packs/*-1/*"
    for file in folder.glob(pattern):
        spoil(file)
    before = {file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    found = verify(tiers, 1, everything=False, read_data=True)
    done = repair(tiers, found, Depth(read_data=True))
    assert "no other tier here has good bytes" in done.reasons[0]
    assert found.is_damaged
    (aside,) = done.aside
    assert (aside.step, aside.tier) == (1, tier)
    assert aside.where is not None
    assert before <= {file.read_bytes() for file in folder.rglob("*") if file.is_file()}, "nothing is lost"
    assert [record.step for record in tiers.catalog().records] == [2]
    if tier == "local":
        assert verify(tiers, None, everything=True, read_data=True).is_clean
        Path(aside.where).rename(Path(aside.where).with_name(Path(aside.where).name.removeprefix("damaged-")))
    else:
        kept = folder / "cloud/bucket" / aside.where
        summary = RootManifest.decode(kept.read_bytes(), what="what was set aside").summary
        kept.rename(folder / f"cloud/bucket/runs/run/{RemoteSave.of(summary).key}")
    assert [record.step for record in tiers.catalog().records] == [1, 2], "it can be had back"


def test_what_is_set_aside_on_a_remote_is_spared_by_gc_until_it_is_removed(folder: Path) -> None:
    tiers = only(open_tiers(folder), "file")
    remote = tiers.remotes[0]
    for pack in (folder / "cloud/bucket/runs/run/packs").glob("*-2/*"):
        spoil(pack)
    done = repair(tiers, verify(tiers, 2, everything=False, read_data=True), Depth(read_data=True))

    def collect() -> list[str]:
        return [doomed.key for doomed in gc.collect(remote.blob, "file", [RUN], rules=gc.Rules(0))[0].deleted]

    assert [collect() for _ in range(3)] == [[], [], []]
    assert done.aside[0].where is not None
    (folder / "cloud/bucket" / done.aside[0].where).unlink()
    assert [bool(collect()) for _ in range(3)] == [False, True, True], "manifests, then packs"
    assert verify(tiers, None, everything=True, read_data=True).is_clean


def test_what_is_beyond_repair_is_deleted_only_when_told_to(folder: Path) -> None:
    tiers = only(open_tiers(folder), "local")
    spoil(next((folder / "local" / RUN).glob("step-0000000001-*/__0_0.distcp")))
    done = repair(tiers, verify(tiers, 1, everything=False, read_data=True), Depth(read_data=True), delete=True)
    assert [aside.where for aside in done.aside] == [None]
    assert not list((folder / "local" / RUN).glob("*step-0000000001-*"))


@pytest.mark.parametrize("name", ["manifest.json", "summary.json", ".metadata"])
def test_derived_documents_are_made_anew_without_another_tier(folder: Path, name: str) -> None:
    tiers = only(open_tiers(folder), "local")
    file = next((folder / "local" / RUN).glob(f"step-0000000001-*/{name}"))
    whole = file.read_bytes()
    for spoiled in (b"", whole[: len(whole) // 2], None):
        file.unlink()
        if spoiled is not None:
            file.write_bytes(spoiled)
        found = verify(tiers, None, everything=True, read_data=True)
        assert found.is_damaged
        assert repair(tiers, found, Depth(read_data=True)).aside == []
        assert not found.is_damaged
        assert file.read_bytes() == whole


def test_documents_of_a_commit_are_made_anew_from_its_shard_manifests(folder: Path) -> None:
    tiers = only(open_tiers(folder), "file")
    for kind in ("commits", "summaries"):
        file = next((folder / "cloud/bucket/runs/run" / kind).glob("*-1.json"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        found = verify(tiers, None, everything=True, read_data=True)
        assert found.is_damaged
        assert repair(tiers, found, Depth(read_data=True)).reasons == []
        assert file.read_bytes() == whole


def test_nothing_is_set_aside_while_a_source_is_away(folder: Path) -> None:
    from ckptstore.errors import TransientError

    def away(request: Request) -> None:
        if "/packs/" in request.key:
            raise TransientError("cut off")

    tiers = open_tiers(folder)
    spoil(next((folder / "local" / RUN).glob("step-0000000001-*/__0_0.distcp")))
    remote = RemoteTier(WatchedBlobStore(tiers.remotes[0].blob, before=away), RUN, "file")
    found = verify(only(tiers, "local"), 1, everything=False, read_data=True)
    done = repair(RunTiers(RUN, tiers.local, (remote,)), found, Depth(read_data=True))
    assert done.reasons
    assert done.aside == []


def test_a_remote_is_repaired_from_another_remote_when_there_is_no_local_copy(folder: Path) -> None:
    tiers = open_tiers(folder)
    shutil.copytree(folder / "cloud" / "bucket", folder / "cloud" / "mirror")
    other = open_place(f"file://{folder}/cloud/mirror").tiers(RUN).remotes[0]
    both = RunTiers(RUN, None, (tiers.remotes[0], RemoteTier(other.blob, RUN, "mirror")))
    for pack in (folder / "cloud" / "bucket").rglob("*.pack"):
        spoil(pack)
    found = verify(both, None, everything=True, read_data=True)
    assert {f.tier for f in found.findings} == {"file"}
    assert repair(both, found, Depth(read_data=True)).reasons == []
    assert not found.is_damaged
    assert verify(both, None, everything=True, read_data=True).is_clean


def test_a_sample_reads_a_share_and_parts_read_every_rank_once(folder: Path) -> None:
    tiers = open_tiers(folder)
    whole = verify(tiers, 1, everything=False, read_data=True).bytes_read
    parts = [verify(tiers, 1, everything=False, read_data=True, part=(i, 2)).bytes_read for i in range(2)]
    assert sum(parts) == whole
    assert all(parts)
    random.seed(3)
    assert 0 < verify(tiers, 1, everything=False, read_data=False, sample=0.4).bytes_read < whole
