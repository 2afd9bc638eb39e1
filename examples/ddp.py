"""DistributedDataParallel: the same three lines, on every rank.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import toy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ckptstore import CheckpointManager
from ckptstore.manager import ResumableLoader


def main() -> None:
    """Train on all ranks; go on where the last start left off."""
    args = toy.arguments(__doc__).parse_args()
    dist.init_process_group("gloo")
    rank, log = dist.get_rank(), toy.Log(args)
    model = DistributedDataParallel(toy.model())
    torch.manual_seed(100 + rank)  # each rank its own dropout
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
