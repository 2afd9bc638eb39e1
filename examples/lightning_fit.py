"""Lightning: one callback. Kill it in mid-epoch and start it again.

python examples/lightning_fit.py
"""

from __future__ import annotations

from typing import Any

import torch
import toy
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from ckptstore.integrations.lightning import CkptstoreCallback
from ckptstore.manager import ResumableLoader


class Regression(LightningModule):
    """The toy model as Lightning likes it."""

    def __init__(self, log_step: Any) -> None:
        super().__init__()
        self.net, self.log_step = toy.model(), log_step

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, targets = batch
        loss = (self.net(inputs) - targets).square().mean()
        self.log("loss", loss)
        self.log_step(self.global_step + 1, loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def main() -> None:
    """Fit; go on where the last start left off."""
    args = toy.arguments(__doc__).parse_args()
    model = Regression(toy.Log(args).step)
    loader = ResumableLoader(DataLoader(toy.dataset(), batch_size=8, shuffle=True))
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[CkptstoreCallback(args.save_dir, remote=args.remote, save_every_steps=5)],
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)


if __name__ == "__main__":
    main()
