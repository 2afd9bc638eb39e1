"""transformers: the Trainer's own checkpoints, kept in a store and resumed from it.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import toy
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ckptstore import CheckpointStore
from ckptstore.integrations.transformers import CkptstoreCallback, resume_path


class Regression(nn.Module):
    """The toy model with a Trainer's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy.model()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.net(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


class Journal(TrainerCallback):
    """One line per step."""

    def __init__(self, log: toy.Log) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._log.step(state.global_step, logs["loss"])


def main() -> None:
    """Train; go on where the last start left off."""
    args = toy.arguments(__doc__).parse_args()
    scratch = Path(args.save_dir).with_name(Path(args.save_dir).name + "-scratch")
    data = [{"inputs": x, "labels": y} for x, y in toy.dataset()]
    with CheckpointStore(args.save_dir, remote=args.remote) as store:
        trainer = Trainer(
            model=Regression(),
            args=TrainingArguments(
                output_dir=str(scratch),
                num_train_epochs=args.epochs,
                per_device_train_batch_size=8,
                save_steps=5,
                save_total_limit=1,
                logging_steps=1,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                learning_rate=1e-2,
            ),
            train_dataset=data,
            callbacks=[CkptstoreCallback(store), Journal(toy.Log(args))],
        )
        resume = resume_path(store, scratch)
        trainer.train(resume_from_checkpoint=resume)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
