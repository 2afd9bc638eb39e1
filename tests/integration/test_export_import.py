"""Checkpoints leave as files that other tools read, and such files become checkpoints: bit-equal both ways."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as stock_dcp
from safetensors.torch import load_file, save_file
from torch import nn

from ckptstore import CheckpointStore
from ckptstore.dcp.foreign import open_dcp, open_torch_file, save_torch_file
from ckptstore.errors import (
    CheckpointExistsError,
    ConfigError,
    FormatError,
    IntegrityError,
    LoadMismatchError,
    StateError,
)
from ckptstore.ops.export import Selection, export_dcp, export_safetensors, export_with
from ckptstore.ops.importing import import_state, open_safetensors
from ckptstore.ops.open import RunTiers
from ckptstore.repo.local import LocalTier

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def make_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False), nn.LayerNorm(50))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    tensors = {str(dtype).removeprefix("torch."): (torch.randn(7, 5) * 9).to(dtype) for dtype in DTYPES}
    return {
        "model": model,
        "optimizer": optimizer,
        "extra": {**tensors, "empty": torch.zeros(0, 3), "scalar": torch.tensor(4.5)},
        "epoch": 3,
        "betas": (0.9, 0.95),
        "names": {"a", "b"},
        "list": [torch.arange(3), {"x": torch.ones(2)}],
    }


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    else:
        assert type(a) is type(b), where
        assert a == b, where


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor by its dotted name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, below in items for k, v in flat(below, f"{name}.{key}" if name else str(key)).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "store"
    with CheckpointStore(folder) as store:
        store.save(make_state(), 10, wait="local")
    return folder


@pytest.fixture
def tiers(root: Path) -> RunTiers:
    return RunTiers("default", LocalTier(root), ())


@pytest.fixture
def stored(root: Path) -> Any:
    return CheckpointStore(root).read()


def imported(path: Path, tmp_path: Path, opened: Any, step: int = 10) -> Any:
    with opened as state:
        record = import_state(LocalTier(tmp_path / "imported"), "default", step, state)
    assert record.step == step
    return CheckpointStore(tmp_path / "imported").read()


class TestSafetensors:
    def test_every_tensor_is_there_bit_for_bit_when_others_read_the_file(
        self, tiers: RunTiers, stored: Any, tmp_path: Path
    ) -> None:
        done = export_safetensors(tiers, "latest", tmp_path / "all.safetensors", Selection())
        loaded = load_file(done.path)
        plain = tmp_path / "plain"
        plain.touch()
        assert done.path.stat().st_mode == plain.stat().st_mode, "whoever may read this user's files may read it"
        expected = flat(stored)
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            same(value, loaded[name], name)

    @pytest.mark.parametrize("shard_bytes", [5_000_000_000, 4_000])
    def test_state_comes_back_whole_when_the_export_is_imported(
        self, tiers: RunTiers, stored: Any, tmp_path: Path, shard_bytes: int
    ) -> None:
        done = export_safetensors(tiers, 10, tmp_path / "out", Selection(), shard_bytes=shard_bytes)
        assert (len(done.files) > 3) == (shard_bytes == 4_000)
        same(stored, imported(done.path, tmp_path, open_safetensors(done.path)))

    def test_index_names_the_file_of_every_tensor(self, tiers: RunTiers, stored: Any, tmp_path: Path) -> None:
        export_safetensors(tiers, 10, tmp_path / "out", Selection(only=("model.*",)), shard_bytes=4_000)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
        assert set(index["weight_map"]) == {f"model.{name}" for name in stored["model"]}
        for name, file in index["weight_map"].items():
            same(stored["model"][name.removeprefix("model.")], load_file(tmp_path / "out" / file)[name])

    def test_names_and_dtypes_are_as_asked(self, tiers: RunTiers, stored: Any, tmp_path: Path) -> None:
        selection = Selection(("model.*", "extra.int64"), "model.", {"2.": "norm."}, "bfloat16")
        loaded = load_file(export_safetensors(tiers, 10, tmp_path / "m.safetensors", selection).path)
        assert set(loaded) == {"0.weight", "1.weight", "norm.weight", "norm.bias", "extra.int64"}
        same(loaded["0.weight"], stored["model"]["0.weight"].bfloat16())
        same(loaded["extra.int64"], stored["extra"]["int64"])

    @pytest.mark.parametrize("target", ["float64", "float32", "float16", "bfloat16"])
    def test_conversions_round_as_torch_does(self, target: str, tmp_path: Path) -> None:
        bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
        state = {"x": {"f32": bits.view(torch.float32), "bf16": bits.view(torch.bfloat16).clone()}}
        state["x"]["f64"] = torch.randn(999, dtype=torch.float64)
        state["x"]["f32"][:4] = torch.tensor([float("inf"), -float("inf"), -0.0, 1e-45])
        with CheckpointStore(tmp_path / "s") as store:
            store.save(state, 1, wait="local")
        tiers = RunTiers("default", LocalTier(tmp_path / "s"), ())
        loaded = load_file(export_safetensors(tiers, 1, tmp_path / "m.safetensors", Selection(dtype=target)).path)
        for name, value in state["x"].items():
            assert torch.equal(
                loaded[f"x.{name}"].nan_to_num(nan=7), value.to(getattr(torch, target)).nan_to_num(nan=7)
            )

    def test_foreign_weights_load_into_a_module_when_put_under_its_key(self, tmp_path: Path) -> None:
        source, target = nn.Linear(4, 3), nn.Linear(4, 3)
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        imported(tmp_path, tmp_path, open_safetensors(tmp_path / "w.safetensors", under="model"), 0)
        state = {"model": target}
        CheckpointStore(tmp_path / "imported").load(state)
        assert torch.equal(source.weight, target.weight)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[:-1],
            lambda data: data + b"x",
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: data[:8] + b"[" + data[9:],
            lambda data: data.replace(b'"F32"', b'"F64"'),
            lambda data: data.replace(b"[4,3]", b"[9,3]"),
            lambda data: b"",
        ],
    )
    def test_damaged_files_are_refused_before_anything_is_committed(self, spoil: Any, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(4, 3)}, tmp_path / "w.safetensors")
        data = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(spoil(data))
        with pytest.raises(FormatError):
            imported(tmp_path, tmp_path, open_safetensors(tmp_path / "w.safetensors"))
        assert CheckpointStore(tmp_path / "imported").checkpoints() == []

    def test_an_index_can_not_lead_out_of_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        save_file({"w": torch.zeros(4)}, tmp_path / "secret.safetensors")
        index = {"metadata": {}, "weight_map": {"w": "../secret.safetensors"}}
        (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FormatError, match="secret"):
            imported(tmp_path, tmp_path, open_safetensors(tmp_path / "in"))


class TestDcp:
    def test_stock_torch_loads_the_export(self, tiers: RunTiers, stored: Any, tmp_path: Path) -> None:
        done = export_dcp(tiers, "latest", tmp_path / "dcp", Selection())
        target = {"model": {k: torch.zeros_like(v) for k, v in stored["model"].items()}, "epoch": 0}
        stock_dcp.load(target, checkpoint_id=str(done.path), no_dist=True)
        same(target["model"], dict(stored["model"]))
        assert target["epoch"] == 3

    def test_state_comes_back_when_the_export_is_imported(self, tiers: RunTiers, stored: Any, tmp_path: Path) -> None:
        done = export_dcp(tiers, "latest", tmp_path / "dcp", Selection())
        found = imported(tmp_path, tmp_path, open_dcp(done.path, trust_pickle=True))
        expected = flat(stored)
        assert flat(found).keys() == expected.keys()
        for name, value in flat(found).items():
            same(expected[name], value, name)
        assert (found["epoch"], found["betas"], found["names"]) == (3, (0.9, 0.95), {"a", "b"})

    def test_checkpoints_of_stock_dcp_are_taken_over_without_running_anything(self, tmp_path: Path) -> None:
        model = nn.Linear(5, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, 5)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "n": 3, "t": torch.tensor(2).bfloat16()}
        stock_dcp.save(state, checkpoint_id=str(tmp_path / "stock"), no_dist=True)
        found = imported(tmp_path, tmp_path, open_dcp(tmp_path / "stock"))
        same(dict(found["model"]), dict(state["model"]))
        same(found["optim"]["state"]["0"], optimizer.state_dict()["state"][0])
        assert found["optim"]["param_groups"][0]["betas"] == (0.9, 0.999)
        assert found["n"] == 3
        target = {"model": nn.Linear(5, 4)}
        CheckpointStore(tmp_path / "imported").load(target)
        assert torch.equal(target["model"].weight, model.weight)

    def test_values_that_need_pickle_are_named_and_refused_unless_trusted(self, tmp_path: Path) -> None:
        state = {"w": torch.ones(2), "rng": np.arange(4), "s": {1, 2}}
        stock_dcp.save(state, checkpoint_id=str(tmp_path / "stock"), no_dist=True)
        with pytest.raises(ConfigError, match=r"rng.*--trust-pickle"):
            imported(tmp_path, tmp_path, open_dcp(tmp_path / "stock"))
        found = imported(tmp_path, tmp_path, open_dcp(tmp_path / "stock", trust_pickle=True))
        assert found["rng"].tolist() == [0, 1, 2, 3]
        assert found["s"] == {1, 2}

    @pytest.mark.parametrize("trust", [False, True])
    def test_a_planted_metadata_runs_nothing(self, tmp_path: Path, trust: bool) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "owned"),)

        (tmp_path / "evil").mkdir()
        (tmp_path / "evil" / ".metadata").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(FormatError, match="mkdir"), open_dcp(tmp_path / "evil", trust_pickle=trust):
            pass
        assert not (tmp_path / "owned").exists()

    def test_a_planted_value_runs_nothing_unless_trusted(self, tmp_path: Path) -> None:
        stock_dcp.save({"w": torch.ones(2), "x": _Planted(tmp_path)}, checkpoint_id=str(tmp_path / "e"), no_dist=True)
        with pytest.raises(ConfigError, match="x"):
            imported(tmp_path, tmp_path, open_dcp(tmp_path / "e"))
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("at", [40, 400, -40])
    def test_damaged_metadata_is_a_format_error(self, tmp_path: Path, at: int) -> None:
        stock_dcp.save({"w": torch.ones(2)}, checkpoint_id=str(tmp_path / "d"), no_dist=True)
        data = bytearray((tmp_path / "d" / ".metadata").read_bytes())
        data[at:] = b""
        (tmp_path / "d" / ".metadata").write_bytes(bytes(data))
        with pytest.raises(FormatError), open_dcp(tmp_path / "d"):
            pass


class _Planted:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "owned"),)


class TestTorchFile:
    def test_the_whole_state_is_in_one_file_as_it_was(self, tiers: RunTiers, stored: Any, tmp_path: Path) -> None:
        done = export_with(tiers, 10, tmp_path / "s.pt", Selection(), save_torch_file)
        same(stored, torch.load(done.path, weights_only=False))
        found = imported(tmp_path, tmp_path, open_torch_file(done.path, trust_pickle=True))
        same(stored, found)
        assert found["model"]["0.weight"] is found["model"]["1.weight"], "tied weights stay tied"

    def test_a_selection_is_a_flat_dict_without_pickled_code(
        self, tiers: RunTiers, stored: Any, tmp_path: Path
    ) -> None:
        selection = Selection(("model.*",), "model.", None, "float16")
        loaded = torch.load(export_with(tiers, 10, tmp_path / "s.pt", selection, save_torch_file).path)
        same(loaded["2.weight"], stored["model"]["2.weight"].half())

    @pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse rows
    def test_tensors_made_of_others_and_large_arrays_come_back(self, tmp_path: Path) -> None:
        value = {"sparse": torch.eye(3).to_sparse(), "deep": [torch.eye(4).to_sparse_csr()], "a": np.arange(20_000)}
        torch.save(value, tmp_path / "s.pt")
        found = imported(tmp_path / "s.pt", tmp_path, open_torch_file(tmp_path / "s.pt", trust_pickle=True))
        assert found["sparse"].layout is torch.sparse_coo
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3))
        assert torch.equal(found["deep"][0].to_dense(), torch.eye(4))
        assert np.array_equal(found["a"], value["a"])

    def test_a_dtype_that_torch_can_not_write_is_refused_by_name(self, tmp_path: Path) -> None:
        with CheckpointStore(tmp_path / "s") as store:
            store.save({"packed": torch.zeros(3, dtype=torch.uint8).view(torch.int4)}, 1, wait="local")
        tiers = RunTiers("default", LocalTier(tmp_path / "s"), ())
        with pytest.raises(StateError, match=r"packed.*int4"):
            export_with(tiers, 1, tmp_path / "s.pt", Selection(), save_torch_file)
        assert not (tmp_path / "s.pt").exists()

    def test_torch_files_are_refused_unless_trusted(self, tmp_path: Path) -> None:
        torch.save({"x": _Planted(tmp_path)}, tmp_path / "evil.pt")
        with pytest.raises(ConfigError, match="--trust-pickle"), open_torch_file(tmp_path / "evil.pt"):
            pass
        assert not (tmp_path / "owned").exists()


class TestPromises:
    """Those all formats keep."""

    def test_nothing_that_exists_is_overwritten(self, tiers: RunTiers, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_text("mine")
        (tmp_path / "x").mkdir()
        with pytest.raises(CheckpointExistsError):
            export_safetensors(tiers, 10, tmp_path / "x.safetensors", Selection())
        with pytest.raises(CheckpointExistsError):
            export_dcp(tiers, 10, tmp_path / "x", Selection())
        assert (tmp_path / "x.safetensors").read_text() == "mine"

    def test_nothing_appears_when_the_checkpoint_is_damaged(self, root: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(root, tmp_path / "copy")
        tiers = RunTiers("default", LocalTier(tmp_path / "copy"), ())
        shard = tiers.local.saves("default")[0].path  # type: ignore[union-attr]
        manifest = tiers.local.shard_manifest(shard, 0)  # type: ignore[union-attr]
        piece = next(p for p in manifest.pieces if p.fqn == "model.2.bias")
        data = bytearray((shard / manifest.file).read_bytes())
        data[piece.start] ^= 1
        (shard / manifest.file).write_bytes(data)
        (tmp_path / "out").mkdir()
        for export in (
            lambda: export_safetensors(tiers, 10, tmp_path / "out" / "a.safetensors", Selection()),
            lambda: export_safetensors(tiers, 10, tmp_path / "out" / "b", Selection()),
            lambda: export_dcp(tiers, 10, tmp_path / "out" / "c", Selection()),
            lambda: export_with(tiers, 10, tmp_path / "out" / "d.pt", Selection(), save_torch_file),
        ):
            with pytest.raises(IntegrityError, match=r"model\.2\.bias"):
                export()
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_selection_that_matches_nothing_or_twice_is_refused(self, tiers: RunTiers, tmp_path: Path) -> None:
        with pytest.raises(LoadMismatchError):
            export_dcp(tiers, 10, tmp_path / "x", Selection(only=("nothing.*",)))
        with pytest.raises(ConfigError, match="both"):
            export_dcp(tiers, 10, tmp_path / "x", Selection(rename={"model.0.": "m.", "model.1.": "m."}))

    def test_a_dtype_the_format_lacks_names_the_tensor(self, tmp_path: Path) -> None:
        with CheckpointStore(tmp_path / "s") as store:
            store.save({"z": {"c": torch.zeros(2, dtype=torch.complex128)}}, 1, wait="local")
        tiers = RunTiers("default", LocalTier(tmp_path / "s"), ())
        with pytest.raises(StateError, match=r"z\.c"):
            export_safetensors(tiers, 1, tmp_path / "x.safetensors", Selection())

    def test_an_import_never_supersedes_what_a_run_has(self, tmp_path: Path) -> None:
        with CheckpointStore(tmp_path / "s") as store:
            store.save({"n": 1}, 5, wait="local")
        save_file({"w": torch.zeros(4)}, tmp_path / "w.safetensors")
        for step, allowed in ((5, False), (3, False), (6, True)):
            with open_safetensors(tmp_path / "w.safetensors") as state:
                if allowed:
                    import_state(LocalTier(tmp_path / "s"), "default", step, state)
                    continue
                with pytest.raises(CheckpointExistsError):
                    import_state(LocalTier(tmp_path / "s"), "default", step, state)
        assert [info.step for info in CheckpointStore(tmp_path / "s").checkpoints()] == [5, 6]
