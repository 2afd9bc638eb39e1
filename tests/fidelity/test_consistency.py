"""Each checkpoint is the state at its own call, whatever training does next, and however many there are."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sameness import assert_same
from torch import nn

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.errors import ConfigError
from ckptstore.store import SaveHandle

SCALE = int(os.environ.get("CKPTSTORE_TEST_SCALE", "1"))
QUICK = StoreConfig(agent_idle_exit_seconds=5)


class Job:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.history: list[float] = []
        self.extra: dict[str, Any] = {"t": torch.zeros(4), "rows": [torch.ones(2)]}
        self.step()

    def step(self) -> None:
        loss = self.model(torch.randn(8, 16)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.history.append(loss.item())

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "opt": self.optimizer, "history": self.history, "extra": self.extra}

    def copy(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "state": {names[id(p)]: dict(entry) for p, entry in self.optimizer.state.items()},
                "history": self.history,
                "extra": self.extra,
            }
        )


def _swap_storages(job: Job) -> None:
    for parameter in job.model.parameters():
        parameter.data = torch.randn_like(parameter)


def _replace_parameters(job: Job) -> None:
    layer = job.model[0]
    old = layer.weight
    layer.weight = nn.Parameter(torch.randn(32, 16))
    job.optimizer.param_groups[0]["params"][0] = layer.weight
    job.optimizer.state[layer.weight] = job.optimizer.state.pop(old)


def _recreate_moments(job: Job) -> None:
    for entry in job.optimizer.state.values():
        for key, value in entry.items():
            entry[key] = torch.rand(value.shape, dtype=value.dtype) if key != "step" else value.clone()


def _reload_optimizer(job: Job) -> None:
    job.optimizer.load_state_dict(copy.deepcopy(job.optimizer.state_dict()))


def _drop_moments(job: Job) -> None:
    job.optimizer.state.pop(job.model[2].bias)


def _in_place(job: Job) -> None:
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.mul_(-1)
    job.extra["t"].add_(1)


def _grow(job: Job) -> None:
    job.extra["rows"].append(torch.full((3,), float(len(job.history))))
    job.extra["t"] = torch.arange(float(len(job.history) + 3))


def _views(job: Job) -> None:
    """Parameters become views of one flat buffer, as bucketing optimizers make them."""
    flat = torch.randn(sum(p.numel() for p in job.model.parameters()))
    start = 0
    for parameter in job.model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def _tie(job: Job) -> None:
    job.extra["tied"] = job.model[2].weight.detach()


def _untie(job: Job) -> None:
    job.extra["tied"] = torch.zeros(4, 32)


CHANGES: list[Callable[[Job], None]] = [
    Job.step, _swap_storages, _replace_parameters, Job.step, _recreate_moments, _reload_optimizer, _in_place, _grow,
    _views, Job.step, _tie, _untie, _drop_moments, Job.step, lambda job: job.model.to(torch.float64), _swap_storages,
]  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
def test_each_checkpoint_is_the_copy_taken_at_its_call(tmp_path: Path, overlap: bool) -> None:
    job = Job()
    config = QUICK.model_copy(update={"overlap": True}) if overlap else QUICK
    expected: list[dict[str, Any]] = []
    handles: list[SaveHandle] = []
    with CheckpointStore(tmp_path / "store", remote=f"file://{tmp_path}/bucket", config=config) as store:
        if overlap:
            store.guard(job.optimizer)
        for number, change in enumerate(CHANGES):
            if overlap and handles and change not in (Job.step, _recreate_moments, _grow):
                handles[-1].wait("staged")  # only the optimizer's step waits by itself
            change(job)
            expected.append(job.copy())
            handles.append(store.save(job.state, number))
            if not overlap:
                _in_place(job)
                _in_place(job)
                job.history.append(0.0)
                job.history.pop()
        store.wait("remote")
        for place in (store, CheckpointStore(None, remote=f"file://{tmp_path}/bucket")):
            for number, wanted in enumerate(expected):
                back = place.read(number)
                assert_same(wanted["model"], back["model"], f"{number}")
                assert wanted["state"].keys() == back["opt"]["state"].keys()
                for name, entry in wanted["state"].items():
                    assert_same(entry, back["opt"]["state"][name], f"{number}")
                assert_same(wanted["history"], back["history"], f"{number}")
                assert_same(wanted["extra"], back["extra"], f"{number}")


def test_ties_come_back_as_ties_when_read_or_loaded_without_a_target(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {"a": shared, "b": shared, "c": {"deep": shared}, "view": shared.view(2, 3), "own": shared.clone()}
    with CheckpointStore(tmp_path / "store", config=QUICK) as store:
        size = store.save(state, 1).wait("local").size_bytes
        assert size == 3 * 24, "the ties are stored once"
        target: dict[str, Any] = {"a": None, "b": None, "c": {"deep": None}, "view": None, "own": None}
        store.load(target)
        for back in (store.read(), target):
            assert back["a"].data_ptr() == back["b"].data_ptr() == back["c"]["deep"].data_ptr()
            assert back["own"].data_ptr() != back["a"].data_ptr()
            assert back["view"].data_ptr() == back["a"].data_ptr(), "seen in another shape, and still the same memory"
            assert_same(state, back)


def test_only_what_is_visible_of_a_big_storage_is_stored(tmp_path: Path) -> None:
    big = torch.randn(1 << 20)
    with CheckpointStore(tmp_path / "store", config=QUICK) as store:
        info = store.save({"view": big[7:11], "every": big[:: 1 << 18], "column": big.view(1024, 1024)[:, 3]}, 1).wait()
        assert info.size_bytes == 4 * (4 + 4 + 1024)
        assert sum(f.stat().st_size for f in (tmp_path / "store").rglob("*.distcp")) < 64 * 1024


def _count(kind: str) -> int:
    process = psutil.Process()
    if kind == "descriptors":
        return process.num_fds()
    gc.collect()
    return process.memory_info().rss


def test_memory_and_descriptors_stay_when_many_small_saves_are_made(tmp_path: Path) -> None:
    """2 000 saves with the deep suite; a few hundred otherwise."""
    # The store keeps its last few hundred handles; counting starts when it has as many as it ever does.
    saves, before = (200, 100) if SCALE == 1 else (2_000, 1_000)
    job = Job()
    with CheckpointStore(tmp_path / "store", config=QUICK) as store:
        samples: list[tuple[int, int, int]] = []
        previous = None
        for number in range(saves + before):
            job.history = [float(number)] * 10
            handle = store.save(job.state, number)
            if number % 20 == 19:
                handle.wait("local")
                if previous is not None:
                    for info in store.checkpoints()[:-1]:
                        store.delete(info.save_id)
                previous = handle
            if number >= before and number % 20 == 19:
                samples.append((number, _count("memory"), _count("descriptors")))
    half = len(samples) // 2
    first, second = samples[:half], samples[half:]
    growth = min(rss for _, rss, _ in second) - min(rss for _, rss, _ in first)
    per_save = growth / (second[0][0] - first[0][0])
    print(f"{saves} saves: RSS {per_save:.0f} bytes per save, descriptors {samples[0][2]} -> {samples[-1][2]}")
    assert samples[-1][2] <= samples[0][2] + 1
    assert per_save < 8 * 1024 if SCALE == 1 else per_save < 256


def test_saving_is_refused_while_a_cuda_graph_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointStore(tmp_path / "store", config=QUICK) as store:
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_initialized", lambda: True)
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            for call in (lambda: store.save({"n": 1}, 1), lambda: store.load({"n": 1}), store.read):
                with pytest.raises(ConfigError, match="CUDA graph"):
                    call()
        assert store.checkpoints() == []
        store.save({"n": 1}, 1, wait="local")


if torch.cuda.is_available():

    def test_capture_stays_valid_when_saving_in_it_is_refused(tmp_path: Path) -> None:
        x = torch.ones(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with CheckpointStore(tmp_path / "store", config=QUICK) as store:
            with torch.cuda.graph(graph):
                y = x * 2
                with pytest.raises(ConfigError, match="CUDA graph"):
                    store.save({"x": x}, 1)
            graph.replay()
            assert y.tolist() == [2.0] * 3
            store.save({"x": x, "y": y}, 1, wait="local")
            assert store.read()["y"].tolist() == [2.0] * 3
