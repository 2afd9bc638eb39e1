"""The little regression the examples train: real enough to have momentum, dropout, shuffling and a schedule."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every example takes."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--save-dir", default="checkpoints")
    parser.add_argument("--remote", help="bucket URL, e.g. s3://bucket/prefix")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--journal", type=Path, help="append a JSON line per step to this file")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step, to have time for Ctrl-C")
    return parser


def model() -> nn.Sequential:
    """The same start for everybody."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def dataset(size: int = 96) -> TensorDataset:
    """Inputs and targets with something to learn."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 8, generator=generator)
    return TensorDataset(inputs, inputs.square().mean(1, keepdim=True))


class Log:
    """One JSON line per step, on rank 0."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path, self._pause = args.journal, args.pause

    def step(self, step: int, loss: Any) -> None:
        time.sleep(self._pause)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")
