"""Three lines in a step loop: track, resume, step. Kill it however you like and start it again.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
import toy
from torch.utils.data import DataLoader

from ckptstore import CheckpointManager
from ckptstore.manager import ResumableLoader


def main() -> None:
    """Train; go on where the last start left off."""
    args = toy.arguments(__doc__).parse_args()
    log = toy.Log(args)
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    loader = ResumableLoader(DataLoader(toy.dataset(), batch_size=8, shuffle=True))

    manager = CheckpointManager(args.save_dir, remote=args.remote, save_every_steps=5)
    manager.track(model=model, optimizer=optimizer, scheduler=scheduler, dataloader=loader)  # 1
    point = manager.resume()  # 2
    step = point.step
    with manager:
        for epoch in range(point.next_epoch, args.epochs):
            for inputs, targets in loader:
                loss = (model(inputs) - targets).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                log.step(step, loss)
                manager.step(step, epoch=epoch, metrics={"loss": loss})  # 3
            manager.epoch_end(epoch, metrics={"loss": loss})


if __name__ == "__main__":
    main()
