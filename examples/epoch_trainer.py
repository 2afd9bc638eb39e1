"""The trainer that lost five hours, and the same trainer protected.

``UnprotectedTrainer`` saves only when the loss improves, only at the end of an epoch, and only weights: a power cut in
epoch 5 of 5 leaves epoch 3, if that was the best, and a learning rate that starts again. ``ProtectedTrainer`` is the
same loop with a CheckpointManager:

    python examples/epoch_trainer.py                 # kill it at any moment, start it again
    python examples/epoch_trainer.py --unprotected   # and see what is left
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
import toy
from torch.utils.data import DataLoader

from ckptstore import CheckpointManager
from ckptstore.manager import ResumableLoader


class UnprotectedTrainer:
    """As found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.log = args, toy.Log(args)
        self.model = toy.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=2e-2, total_steps=600)
        self.loader: Any = DataLoader(toy.dataset(), batch_size=8, shuffle=True)
        self.loss_history: list[float] = []
        self.global_step = 0

    def train_batch(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """One optimizer step."""
        loss = (self.model(inputs) - targets).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.global_step += 1
        self.log.step(self.global_step, loss)
        return loss.item()

    def train(self) -> None:
        """All epochs."""
        best = float("inf")
        for _ in range(self.args.epochs):
            losses = [self.train_batch(*batch) for batch in self.loader]
            average = sum(losses) / len(losses)
            self.loss_history.append(average)
            if average < best:  # whatever came after the best epoch is lost
                best = average
                torch.save(self.model.state_dict(), Path(self.args.save_dir) / "best.pt")


class ProtectedTrainer(UnprotectedTrainer):
    """The same loop: resumes by itself, saves by step, time and epoch, and when it is interrupted."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.loader = ResumableLoader(self.loader)
        self.config = {"epochs": args.epochs, "lr": 1e-2}
        self.manager = CheckpointManager(
            save_dir=args.save_dir,
            model_name="toy",
            save_freq=1,
            logger=logging.getLogger("trainer"),
            remote=args.remote,
            save_every_steps=5,
            monitor="avg_loss",
        )

    def train(self) -> None:
        """All epochs that are left."""
        manager, first, best = self.manager, 0, float("inf")
        manager.track(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            dataloader=self.loader,
            epoch_losses=(losses := []),
            config=self.config,
            loss_history=lambda: self.loss_history,
        )
        if manager.has_checkpoints():
            epoch, self.global_step = manager.load_checkpoint(latest=True)  # fills what is tracked
            first = epoch + 1 if manager.point.epoch_finished else epoch
            self.loss_history = list(manager.point.state.get("loss_history", []))
            best = min(self.loss_history, default=best)
        with manager:  # saves when a signal or an exception ends it
            for epoch in range(first, self.args.epochs):
                for inputs, targets in self.loader:
                    losses.append(self.train_batch(inputs, targets))
                    manager.step(self.global_step, epoch=epoch)
                average = sum(losses) / len(losses)
                losses.clear()
                self.loss_history.append(average)
                manager.save_checkpoint(
                    model=self.model,
                    optimizer=self.optimizer,
                    scheduler=self.scheduler,
                    epoch=epoch,
                    global_step=self.global_step,
                    loss_history=self.loss_history,
                    metrics={"avg_loss": average},
                    tokenizer=None,
                    config=self.config,
                    is_best=average < best,
                )
                best = min(best, average)


def main() -> None:
    """Train with one of them."""
    parser = toy.arguments(__doc__)
    parser.add_argument("--unprotected", action="store_true")
    args = parser.parse_args()
    Path(args.save_dir).mkdir(parents=True, exist_ok=True)
    (UnprotectedTrainer if args.unprotected else ProtectedTrainer)(args).train()


if __name__ == "__main__":
    main()
