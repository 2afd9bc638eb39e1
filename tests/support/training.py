"""A small real training run with everything that has state: dropout, shuffling, a scheduler, a loop in mid-epoch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptstore import CheckpointManager, StoreConfig
from ckptstore.manager import ResumableLoader

#: Short waits: an agent that lingers is of no use to a test.
CONFIG = StoreConfig(agent_idle_exit_seconds=1.0, deadline_s=15.0)


class Training:
    """Model, optimizer, scheduler and shuffled data; ``seed`` differs for jobs that must resume, not redo."""

    def __init__(self, seed: int = 0, *, rank: int = 0, ddp: bool = False) -> None:
        torch.manual_seed(seed + 100 * rank)
        random.seed(seed + 100 * rank)
        np.random.seed(seed + 100 * rank)
        data = torch.Generator().manual_seed(7 + rank)
        inputs, targets = torch.randn(24, 8, generator=data), torch.randn(24, 1, generator=data)
        self.loader = ResumableLoader(DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=True))
        init = torch.Generator().manual_seed(seed)
        self.model: Any = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        for parameter in self.model.parameters():
            parameter.data.normal_(0, 0.2, generator=init)
        if ddp:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.losses: list[float] = []
        self.noise: list[float] = []

    def track(self, manager: CheckpointManager) -> CheckpointManager:
        return manager.track(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            dataloader=self.loader,
            losses=self.losses,
        )

    def one(self, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = (self.model(x + 0.01 * np.random.randn()) - y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.noise.append(random.random())
        return loss

    def run(self, manager: CheckpointManager, last: int, *, each: Any = None) -> None:
        """To step ``last``, from wherever the manager's point is."""
        step, epoch = manager.point.step, manager.point.next_epoch
        while step < last:
            for batch in self.loader:
                loss = self.one(batch)
                step += 1
                manager.step(step, epoch=epoch, metrics={"loss": loss})
                if each is not None:
                    each(step)
                if step == last:
                    return
            manager.epoch_end(epoch, metrics={"loss": self.losses[-1]})
            epoch += 1

    def bits(self) -> dict[str, bytes]:
        """Everything that must come back bit for bit."""
        module = getattr(self.model, "module", self.model)
        tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{k}": v for k, v in moments.items()})
        bits = {name: t.detach().clone().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}
        bits["losses"] = np.array(self.losses).tobytes()
        bits["noise"] = np.array(self.noise[-3:]).tobytes()
        bits["rng"] = torch.get_rng_state().numpy().tobytes()
        bits["numpy"] = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
        return bits


def manager(folder: Path, **options: Any) -> CheckpointManager:
    """A manager that only saves by step, unless told otherwise."""
    return CheckpointManager(
        folder, config=CONFIG, **{"save_every_steps": 4, "save_every_seconds": 0, "save_freq": 0, **options}
    )
