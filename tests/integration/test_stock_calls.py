"""`store.reader()` and `store.writer()` in stock `dcp.load`, `dcp.save` and `dcp.async_save`."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ckptstore import CheckpointStore
from ckptstore.errors import LockedError
from ckptstore.repo.holding import alone


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(4, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3, "names": ["a", "b"]}


def test_stock_save_and_load_go_through_the_store(tmp_path: Path) -> None:
    model, optimizer = trained()
    with CheckpointStore(tmp_path / "store") as store:
        dcp.save(state_of(model, optimizer), storage_writer=store.writer(10, metrics={"loss": 0.5}), no_dist=True)
        info = store.latest()
        assert info is not None
        assert (info.step, info.metrics) == (10, {"loss": 0.5})
        other, other_optimizer = trained(seed=1)
        target = state_of(other, other_optimizer)
        target["epoch"] = 0
        dcp.load(target, storage_reader=store.reader(), no_dist=True)
        assert target["epoch"] == 3
        for name, value in model.state_dict().items():
            assert torch.equal(target["model"][name], value)
        for index, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                assert torch.equal(target["optim"]["state"][index][name], value)
        # and the store's own load reads what stock dcp.save gave it
        fresh = {"model": trained(seed=2)[0], "epoch": 0}
        store.load(fresh)
        assert torch.equal(fresh["model"][0].weight, model[0].weight)


def test_stock_load_reads_what_the_store_saved(tmp_path: Path) -> None:
    model, optimizer = trained()
    with CheckpointStore(tmp_path / "store", f"file://{tmp_path}/bucket") as store:
        store.save({"model": model, "optimizer": optimizer, "epoch": 1}, 1, wait="remote")
        store.save({"model": trained(seed=4)[0], "optimizer": optimizer, "epoch": 2}, 2, wait="remote")
    for local in (tmp_path / "store", None):
        store = CheckpointStore(local, f"file://{tmp_path}/bucket")
        target = {"model": trained(seed=1)[0].state_dict(), "epoch": 0}
        dcp.load(target, storage_reader=store.reader(1), no_dist=True)
        assert target["epoch"] == 1
        assert torch.equal(target["model"]["2.weight"], model[2].weight)
        reader = store.reader()
        dcp.load(target, storage_reader=reader, no_dist=True)
        assert target["epoch"] == 2


def test_async_saves_are_committed_when_their_future_is_done(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer = trained()
        with CheckpointStore(tmp_path / "store") as store:
            for step in (1, 2):
                future = dcp.async_save(state_of(model, optimizer), storage_writer=store.writer(step))
                future.result()  # type: ignore[union-attr]
                latest = store.latest()
                assert latest is not None
                assert latest.step == step
    finally:
        dist.destroy_process_group()


def test_damage_is_an_error_of_stock_load_and_names_the_parameter(tmp_path: Path) -> None:
    model, _ = trained()
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"model": model}, 1, wait="local")
        file = next((tmp_path / "store").rglob("__0_0.distcp"))
        data = bytearray(file.read_bytes())
        at = bytes(data).find(model[0].weight.detach().numpy().tobytes())
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointException) as caught:
            dcp.load({"model": model.state_dict()}, storage_reader=store.reader(), no_dist=True)
        assert "model.0.weight" in str(caught.value)


def test_nothing_keeps_the_checkpoint_from_being_deleted_once_stock_load_has_ended(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"w": torch.ones(9)}, 1, wait="local")
        (path,) = tmp_path.glob("store/default/step-*")
        reader = store.reader()
        before = set(os.listdir("/proc/self/fd"))
        target = {"w": torch.zeros(9)}
        for _ in range(2):
            dcp.load(target, storage_reader=reader, no_dist=True)
            with alone(path):
                assert target["w"].sum() == 9
        with pytest.raises(CheckpointException):
            dcp.load({"v": torch.zeros(9)}, storage_reader=reader, no_dist=True)
        with pytest.raises(LockedError), alone(path):
            pass  # a load that stopped half way may be looked at still
        del reader
        gc.collect()
        with alone(path):
            pass
        assert set(os.listdir("/proc/self/fd")) <= before, "others may have been closed meanwhile"
