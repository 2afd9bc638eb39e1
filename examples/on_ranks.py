"""What every rank of `ddp.py`, `fsdp1.py` and `fsdp2.py` does; they differ in how the model is wrapped.

The three lines are the same as in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from ckptstore import CheckpointManager
from ckptstore.manager import ResumableLoader


def train(args: argparse.Namespace, wrap: Callable[[nn.Sequential], nn.Module]) -> None:
    """Train on all ranks; go on where the last start left off, with any number of ranks where the wrapper can."""
    dist.init_process_group("gloo")
    rank, log = dist.get_rank(), toy.Log(args)
    model = wrap(toy.model())
    torch.manual_seed(100 + rank)  # each rank its own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = toy.dataset()
    loader = ResumableLoader(DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=3)))

    manager = CheckpointManager(args.save_dir, remote=args.remote, save_every_steps=5)
    manager.track(model=model, optimizer=optimizer, dataloader=loader)  # 1
    point = manager.resume()  # 2
    step = point.step
    with manager:
        for epoch in range(point.next_epoch, args.epochs):
            loader.set_epoch(epoch)
            for inputs, targets in loader:
                loss = (model(inputs) - targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if rank == 0:
                    log.step(step, loss)
                manager.step(step, epoch=epoch, metrics={"loss": loss})  # 3
            manager.epoch_end(epoch)
    dist.destroy_process_group()
