"""2N steps straight are N, a restore into fresh objects, and N more, bit for bit: with all that training keeps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sameness import assert_same
from torch import nn

from ckptstore import CheckpointStore, StoreConfig, per_rank

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 7


class Random:
    """The process's random generators as one stateful object."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])


class Batches:
    """A shuffled order of rows, and how far it has been read: a sampler that stops in the middle of an epoch."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.at = 0

    def take(self, count: int) -> list[int]:
        if self.at + count > len(self.order):
            self.order, self.at = torch.randperm(10, generator=self.generator).tolist(), 0
        self.at += count
        return self.order[self.at - count : self.at]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = list(state["order"]), state["at"]
        self.generator.set_state(state["generator"])


class Training:
    """Two schedulers over one optimizer, a scaler that grows and backs off, a moving average, dropout, a sampler."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.warmup = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=50)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.batches = Batches(seed)
        self.losses: list[float] = []
        self.state: dict[str, Any] = {
            "model": self.model,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "warmup": self.warmup,
            "plateau": self.plateau,
            "scaler": self.scaler,
            "rng": per_rank(Random()),
            "batches": per_rank(self.batches),
            "losses": self.losses,
        }

    def run(self, steps: int) -> None:
        data = torch.linspace(-2, 2, 40).reshape(10, 4)
        for _ in range(steps):
            rows = data[self.batches.take(4)] + float(np.random.rand()) * random.random()
            loss = self.model(rows + torch.randn(4, 4)).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if len(self.losses) % 5 == 4:
                next(iter(self.model.parameters())).grad.fill_(float("inf"))  # type: ignore[union-attr]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.warmup.step()
            self.ema.update_parameters(self.model)
            self.losses.append(loss.item())
            self.plateau.step(self.losses[-1])

    def seen(self) -> Any:
        names = ("model", "ema", "optimizer", "warmup", "plateau", "scaler")
        parts = {name: self.state[name].state_dict() for name in names}
        for name in ("model", "ema"):
            parts[name] = dict(parts[name])
        return {**parts, "losses": self.losses, "batches": self.batches.state_dict(), "rng": Random().state_dict()}


WAYS: dict[str, Callable[[Path], CheckpointStore]] = {
    "local": lambda folder: CheckpointStore(folder / "store"),
    "remote": lambda folder: CheckpointStore(None, remote=f"file://{folder}/bucket"),
}


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, way: str) -> None:
    first = Training(0)
    first.run(STEPS)
    config = StoreConfig(agent_idle_exit_seconds=5)
    with CheckpointStore(tmp_path / "store", remote=f"file://{tmp_path}/bucket", config=config) as store:
        store.save(first.state, STEPS, wait="remote")
    first.run(STEPS)
    straight = first.seen()

    resumed = Training(5)
    resumed.run(2)
    WAYS[way](tmp_path).load(resumed.state)
    resumed.run(STEPS)
    assert_same(straight, resumed.seen())
    assert resumed.scaler.get_scale() != 2.0**10, "the scaler has moved"
