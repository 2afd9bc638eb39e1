"""Copies that go on during forward and backward, and the fence that keeps them true."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore import CheckpointStore, StoreConfig, errors
from ckptstore.dcp.stage import Stage
from ckptstore.store.fence import Fence

OVERLAP = StoreConfig(overlap=True, agent_idle_exit_seconds=2)


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.Linear(256, 256))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 256)).square().mean().backward()
    optimizer.step()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for s in optimizer.state.values() for v in s.values()]
    return [v.detach().clone() for v in [*model.state_dict().values(), *moments]]


def test_each_checkpoint_is_the_state_at_its_call_when_copies_overlap(tmp_path: Path) -> None:
    model, optimizer = training()
    with CheckpointStore(tmp_path / "store", config=OVERLAP) as store:
        store.guard(optimizer)
        expected = {}
        for step in range(1, 12):
            one_step(model, optimizer)
            expected[step] = values(model, optimizer)
            store.save({"model": model, "optimizer": optimizer}, step)
        store.wait("local")
        for step, wanted in expected.items():
            other, other_optimizer = training()
            store.load({"model": other, "optimizer": other_optimizer}, step)
            assert all(torch.equal(a, b) for a, b in zip(values(other, other_optimizer), wanted, strict=True))


def test_the_next_step_waits_until_a_slow_copy_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = training()
    with CheckpointStore(tmp_path / "store", config=OVERLAP) as store:
        store.guard(optimizer)
        one_step(model, optimizer)
        store.save({"model": model, "optimizer": optimizer}, 1).wait("local")
        release, real = threading.Event(), Stage.copy

        def slow(self: Stage, binding: Any, image: Any, threads: int, only: Any, *others: Any) -> int:
            if only is not None and "param" in {binding.tensors[i].kind for i in only}:
                assert release.wait(30)
            return real(self, binding, image, threads, only, *others)

        monkeypatch.setattr(Stage, "copy", slow)
        before = values(model, optimizer)
        handle = store.save({"model": model, "optimizer": optimizer}, 2)
        assert not handle.staged.done()
        model(torch.randn(8, 256)).sum().backward()  # forward and backward go on
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        stepping.join(0.3)
        assert stepping.is_alive(), "the step did not wait for the copy"
        release.set()
        stepping.join(30)
        assert not stepping.is_alive()
        monkeypatch.undo()
        handle.wait("local", 30)
        other, other_optimizer = training()
        store.load({"model": other, "optimizer": other_optimizer}, 2)
        assert all(torch.equal(a, b) for a, b in zip(values(other, other_optimizer), before, strict=True))


def test_what_no_guarded_optimizer_steps_is_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = training()
    other, other_optimizer = training()
    ema = torch.optim.swa_utils.AveragedModel(model)
    extra = nn.Linear(3, 3)
    state = {"model": model, "optimizer": optimizer, "ema": ema, "extra": extra, "other": [other, other_optimizer]}
    with CheckpointStore(tmp_path / "store", config=OVERLAP) as store:
        store.guard(optimizer)
        one_step(model, optimizer)
        one_step(other, other_optimizer)
        expected = values(ema, other_optimizer) + values(extra, optimizer) + values(other, optimizer)
        release, real = threading.Event(), Fence.run
        monkeypatch.setattr(Fence, "run", lambda self, copy: real(self, lambda: release.wait(30) and copy()))
        handle = store.save(state, 1)
        assert not handle.staged.done(), "what the guarded optimizer steps should be copied in the background"
        one_step(other, other_optimizer)
        with torch.no_grad():
            for parameter in (*ema.parameters(), *extra.parameters()):
                parameter.zero_()
        release.set()
        handle.wait("local", 30)
        store.load(state, 1)
        found = values(ema, other_optimizer) + values(extra, optimizer) + values(other, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by class, with neither hooks nor state of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_an_optimizer_in_a_thin_wrapper_is_guarded(tmp_path: Path) -> None:
    model, optimizer = training()
    wrapped = Wrapper(optimizer)
    with CheckpointStore(tmp_path / "store", config=OVERLAP) as store:
        store.guard(wrapped)
        store.guard(wrapped)
        one_step(model, wrapped)
        before = values(model, optimizer)
        handle = store.save({"model": model, "optimizer": wrapped}, 1)
        one_step(model, wrapped)
        handle.wait("local", 30)
        store.load({"model": model, "optimizer": wrapped}, 1)
        assert all(torch.equal(a, b) for a, b in zip(values(model, optimizer), before, strict=True))


def test_nothing_is_copied_in_the_background_when_no_optimizer_is_guarded(tmp_path: Path) -> None:
    model, optimizer = training()
    with CheckpointStore(tmp_path / "store", config=OVERLAP) as store:
        one_step(model, optimizer)
        assert store.save({"model": model, "optimizer": optimizer}, 1).staged.result(10).step == 1
        assert not [t for t in threading.enumerate() if t.name.startswith("ckptstore-overlap")]


def test_guard_is_refused_when_overlap_is_off(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "store")
    with pytest.raises(errors.ConfigError, match="overlap"):
        store.guard(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
