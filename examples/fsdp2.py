"""FSDP2 (``fully_shard``), optionally hybrid: shards within a group, replicas between groups.

torchrun --nproc-per-node 2 examples/fsdp2.py
torchrun --nproc-per-node 4 examples/fsdp2.py --replicas 2      # HSDP: 2 replicas of 2 shards
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from ckptstore import CheckpointManager
from ckptstore.manager import ResumableLoader


def main() -> None:
    """Train on all ranks; a later start may have another number of them."""
    parser = toy.arguments(__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size, log = dist.get_rank(), dist.get_world_size(), toy.Log(args)
    if args.replicas > 1:
        mesh = init_device_mesh(
            "cpu", (args.replicas, world_size // args.replicas), mesh_dim_names=("replica", "shard")
        )
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    model = toy.model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = toy.dataset()
    loader = ResumableLoader(DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=3)))

    manager = CheckpointManager(args.save_dir, remote=args.remote, save_every_steps=5)
    manager.track(model=model, optimizer=optimizer, dataloader=loader)
    point = manager.resume()
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
                manager.step(step, epoch=epoch, metrics={"loss": loss})
            manager.epoch_end(epoch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
