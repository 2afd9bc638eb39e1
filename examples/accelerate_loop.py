"""Accelerate: everything prepared is tracked in one call.

python examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
import toy
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ckptstore import CheckpointManager
from ckptstore.integrations.accelerate import track_prepared
from ckptstore.manager import ResumableLoader


def main() -> None:
    """Train; go on where the last start left off."""
    args = toy.arguments(__doc__).parse_args()
    log, accelerator = toy.Log(args), Accelerator(cpu=True)
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loader = ResumableLoader(DataLoader(toy.dataset(), batch_size=8, shuffle=True))

    manager = CheckpointManager(args.save_dir, remote=args.remote, save_every_steps=5)
    track_prepared(manager, accelerator).track(dataloader=loader)
    point = manager.resume()
    step = point.step
    with manager:
        for epoch in range(point.next_epoch, args.epochs):
            for inputs, targets in loader:
                loss = (model(inputs) - targets).square().mean()
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                step += 1
                log.step(step, loss)
                manager.step(step, epoch=epoch, metrics={"loss": loss})
            manager.epoch_end(epoch)


if __name__ == "__main__":
    main()
