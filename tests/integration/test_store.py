"""The store as one process sees it: real agent, real disk, a bucket on disk."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ckptstore import CheckpointStore, StoreConfig, errors, per_rank
from ckptstore.blob import between_processes


class Training:
    """A small real training run, whose state can be compared bit for bit."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.BatchNorm1d(128), nn.Linear(128, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.extra: dict[str, Any] = {"history": [], "note": "ünï/code"}

    def steps(self, count: int) -> None:
        for _ in range(count):
            loss = self.model(torch.randn(16, 64)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.extra["history"].append(loss.item())

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "extra": self.extra,
            "rng": per_rank(torch.get_rng_state()),
        }

    def bits(self) -> dict[str, bytes]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{k}": v for k, v in moments.items()})
        return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


def test_load_gives_back_every_bit_when_the_local_tier_has_it(tmp_path: Path) -> None:
    run = Training()
    run.steps(3)
    with CheckpointStore(tmp_path / "store") as store:
        info = store.save(run.state, 3, epoch=1, metrics={"loss": torch.tensor(0.5)}, tags=["x"]).wait("local")
        assert (info.step, info.epoch, info.metrics, info.tags) == (3, 1, {"loss": 0.5}, ("x",))
        assert info.tiers == {"local": "complete"}
        saved, lr = run.bits(), run.scheduler.get_last_lr()
        run.steps(2)
        other = Training(seed=1)
        loaded = store.load(other.state)
        assert loaded is not None
        assert loaded.step == 3
        assert other.bits() == saved
        assert other.scheduler.get_last_lr() == lr
        assert other.extra["note"] == "ünï/code"
        assert len(other.extra["history"]) == 3
        assert loaded.report is not None
        assert set(loaded.report.bytes_by_source) == {"local"}


def test_load_keeps_storages_when_filling_in_place(tmp_path: Path) -> None:
    run = Training()
    run.steps(2)
    with CheckpointStore(tmp_path / "store") as store:
        store.save(run.state, 2, wait="local")
        before = {id(p): p.data_ptr() for p in run.model.parameters()}
        moments = [m["exp_avg"].data_ptr() for m in run.optimizer.state.values()]
        run.steps(1)
        store.load(run.state)
        assert {id(p): p.data_ptr() for p in run.model.parameters()} == before
        assert [m["exp_avg"].data_ptr() for m in run.optimizer.state.values()] == moments


def test_checkpoint_is_the_state_at_the_call_when_training_goes_on(tmp_path: Path) -> None:
    run = Training()
    with CheckpointStore(tmp_path / "store") as store:
        expected = []
        for step in range(1, 6):
            run.steps(1)
            expected.append(run.bits())
            store.save(run.state, step)
            for parameter in run.model.parameters():
                parameter.data.add_(1.0)  # in place, at once
                parameter.data.sub_(1.0)
        store.wait("local")
        for step, bits in enumerate(expected, start=1):
            other = Training(seed=9)
            store.load(other.state, step)
            assert other.bits() == bits


def test_restore_takes_the_remote_when_the_local_tier_is_gone(tmp_path: Path, bucket: str) -> None:
    run = Training()
    run.steps(3)
    with CheckpointStore(tmp_path / "store", remote=bucket) as store:
        handle = store.save(run.state, 3, wait="remote")
        assert handle.remotes["file"].result().tiers == {"local": "complete", "file": "complete"}
    saved = run.bits()
    other = Training(seed=1)
    with CheckpointStore(tmp_path / "elsewhere", remote=bucket) as fresh:
        info = fresh.load(other.state)
        assert info is not None
        assert info.report is not None
        assert set(info.report.bytes_by_source) == {"file"}
    assert other.bits() == saved
    with CheckpointStore(None, remote=bucket) as readonly:
        assert [i.step for i in readonly.checkpoints()] == [3]
        with pytest.raises(errors.ConfigError, match="read-only"):
            readonly.save(run.state, 4)


def test_flipped_local_bit_is_repaired_from_the_remote_when_there_is_one(tmp_path: Path, bucket: str) -> None:
    run = Training()
    run.steps(1)
    with CheckpointStore(tmp_path / "store", remote=bucket) as store:
        store.save(run.state, 1, wait="remote")
        shard = next((tmp_path / "store").rglob("*.distcp"))
        original = shard.read_bytes()
        weight = run.model[0].weight.detach().numpy().tobytes()
        at = original.index(weight) + 11
        shard.write_bytes(original[:at] + bytes([original[at] ^ 4]) + original[at + 1 :])
        other = Training(seed=1)
        info = store.load(other.state)
        assert info is not None
        assert info.report is not None
        assert info.report.repaired
        assert other.bits() == run.bits()
        assert shard.read_bytes() == original


def test_error_names_the_parameter_when_every_copy_is_damaged(tmp_path: Path) -> None:
    run = Training()
    run.steps(1)
    with CheckpointStore(tmp_path / "store") as store:
        store.save(run.state, 1, wait="local")
        shard = next((tmp_path / "store").rglob("*.distcp"))
        data = bytearray(shard.read_bytes())
        data[bytes(data).index(run.model[3].weight.detach().numpy().tobytes())] ^= 1
        shard.write_bytes(data)
        with pytest.raises(errors.IntegrityError, match=r"model\.3\.weight"):
            store.load(Training().state)


def test_stock_dcp_opens_the_directory_when_loading_without_us(tmp_path: Path) -> None:
    run = Training()
    run.steps(2)
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"model": run.model.state_dict(), "epoch": 7}, 2, wait="local")
    folder = next((tmp_path / "store").rglob(".metadata")).parent
    target = {"model": {k: torch.zeros_like(v) for k, v in run.model.state_dict().items()}, "epoch": 0}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert target["epoch"] == 7
    for name, value in run.model.state_dict().items():
        assert torch.equal(target["model"][name], value)


def test_read_returns_containers_when_no_target_is_given(tmp_path: Path) -> None:
    run = Training()
    run.steps(2)
    with CheckpointStore(tmp_path / "store") as store:
        store.save(run.state, 2, wait="local")
        state = store.read()
    assert set(state) == {"model", "optimizer", "scheduler", "extra", "rng"}
    assert torch.equal(state["model"]["0.weight"], run.model[0].weight)
    assert state["extra"] == run.extra


def test_mismatch_changes_nothing_when_shapes_differ(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"model": nn.Linear(4, 4), "n": 1}, 1, wait="local")
        target = nn.Linear(4, 5)
        before = copy.deepcopy(target.state_dict())
        state = {"model": target, "n": 0}
        with pytest.raises(errors.LoadMismatchError, match=r"weight"):
            store.load(state)
        assert state["n"] == 0
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())


def test_refusal_names_the_key_and_writes_nothing_when_a_value_can_not_be_stored(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        with pytest.raises(errors.StateError, match=r"extra\.hook"):
            store.save({"extra": {"hook": lambda: None}}, 1)
        assert store.checkpoints() == []
        store.save({"extra": {"hook": None}}, 2, wait="local")
        assert [info.step for info in store.checkpoints()] == [2]


def test_empty_run_is_told_apart_from_a_missing_step(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        assert store.checkpoints() == []
        assert store.latest() is None
        assert store.load({"n": 1}, missing_ok=True) is None
        with pytest.raises(errors.CheckpointNotFoundError):
            store.load({"n": 1})
        store.save({"n": 1}, 5, wait="local")
        with pytest.raises(errors.CheckpointNotFoundError, match="7"):
            store.load({"n": 1}, 7)
        with pytest.raises(errors.ConfigError):
            store.load({"n": 1}, "newest")


def test_rollback_starts_a_new_line_when_an_older_step_is_resumed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with CheckpointStore(root) as store:
        for step in (500, 900):
            store.save({"n": step}, step, wait="local")
    with CheckpointStore(root) as store:
        state = {"n": 0}
        store.load(state, 500)
        assert state["n"] == 500
        store.save({"n": 510}, 510, wait="local")
        assert [info.step for info in store.checkpoints()] == [500, 510]
        everything = store.checkpoints(include_superseded=True)
        old = next(info for info in everything if info.step == 900)
        assert old.superseded
        assert store.latest().step == 510
        store.load(state, old.save_id)
        assert state["n"] == 900


def test_same_step_again_never_overwrites_when_saved_twice(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        first = store.save({"n": 1}, 10, wait="local")
        second = store.save({"n": 2}, 10, wait="local")
        assert first.save_id != second.save_id
        assert [info.save_id for info in store.checkpoints()] == [second.save_id]
        state = {"n": 0}
        store.load(state)
        assert state["n"] == 2
        store.load(state, first.save_id)
        assert state["n"] == 1


def test_second_upload_is_small_when_one_parameter_changed(tmp_path: Path, bucket: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(512, 512) for name in "abcdefgh"})
    with CheckpointStore(tmp_path / "store", remote=bucket) as store:
        store.save({"model": model}, 1, wait="remote")
        size = sum(f.stat().st_size for f in (tmp_path / "bucket").rglob("*.pack"))
        nn.init.normal_(model["c"].weight)
        store.save({"model": model}, 2, wait="remote")
        grown = sum(f.stat().st_size for f in (tmp_path / "bucket").rglob("*.pack")) - size
    assert 0 < grown < size / 6
    other = nn.ModuleDict({name: nn.Linear(512, 512) for name in "abcdefgh"})
    with CheckpointStore(None, remote=bucket) as fresh:
        fresh.load({"model": other})
    assert torch.equal(other["c"].weight, model["c"].weight)
    assert torch.equal(other["a"].weight, model["a"].weight)


def test_configuration_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="run name"):
        CheckpointStore(tmp_path, run="../x")
    with pytest.raises(errors.ConfigError, match="scheme"):
        CheckpointStore(tmp_path, remote="ftp://x/y")
    with pytest.raises(errors.ConfigError, match="local root or a remote"):
        CheckpointStore(None)
    with CheckpointStore(tmp_path / "store") as store:
        handle = store.save({"n": 1}, 1)
        with pytest.raises(errors.ConfigError, match="remote"):
            handle.wait("remote")
        with pytest.raises(errors.ConfigError, match="remote"):
            _ = handle.remote
    with pytest.raises(errors.ConfigError, match="closed"):
        store.save({"n": 1}, 2)


def test_store_pickles_as_its_arguments(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, remote="mem://x", run="r", config=StoreConfig(deadline_s=5))
    again = pickle.loads(pickle.dumps(store))
    assert (again.local, again.remotes, again.run, again.config) == (
        store.local,
        store.remotes,
        store.run,
        store.config,
    )
    assert list(tmp_path.iterdir()) == []


def test_saving_has_no_side_effect_on_the_optimizer(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"model": model, "optimizer": optimizer}, 0, wait="local")
        assert dict(optimizer.state) == {}
        assert calls == []
        store.load({"model": model, "optimizer": optimizer})
        assert dict(optimizer.state) == {}


def test_pinned_checkpoint_is_not_deleted_until_unpinned(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store") as store:
        store.save({"n": 1}, 1, wait="local")
        store.save({"n": 2}, 2, metrics={"val_loss": 0.5}, wait="local")
        store.pin(1)
        assert store.checkpoints()[0].pinned
        with pytest.raises(errors.ConfigError, match="pinned"):
            store.delete(1)
        store.unpin(1)
        store.delete(1)
        assert [info.step for info in store.checkpoints()] == [2]
        assert store.best().step == 2


def test_memory_remote_is_seen_by_all_processes_of_the_machine(tmp_path: Path) -> None:
    url = f"mem://{tmp_path.name}"
    folder = Path(between_processes(url).removeprefix("file://"))
    try:
        with CheckpointStore(tmp_path / "store", remote=url) as store:
            info = store.save({"n": 7}, 1, wait="remote").remote.result()
            assert info.tiers == {"local": "complete", "mem": "complete"}
        state = {"n": 0}
        with CheckpointStore(None, remote=url) as fresh:
            fresh.load(state)
        assert state["n"] == 7
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_saving_works_when_the_process_holds_more_than_a_thousand_descriptors(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(4096, hard)
    if wanted < 2048:
        pytest.skip(f"only {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1500)]
    try:
        with CheckpointStore(tmp_path / "store") as store:
            store.save({"n": 1}, 1, wait="local")
            state = {"n": 0}
            store.load(state)
        assert state["n"] == 1
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_values_are_those_of_their_own_save_when_they_change_by_type_or_order_alone(tmp_path: Path) -> None:
    many = {f"t{i}": torch.ones(2) for i in range(20)}
    values: list[Any] = [1, 1, True, 1.0, 0.0, -0.0, {"a": 1, "b": 2}, {"b": 2, "a": 1}, 1]
    with CheckpointStore(tmp_path / "store", config=StoreConfig(agent_idle_exit_seconds=2)) as store:
        for step, value in enumerate(values):
            store.save({"many": many, "value": value}, step)
        store.wait("local")
        assert [repr(store.read(step)["value"]) for step in range(len(values))] == [repr(value) for value in values]
