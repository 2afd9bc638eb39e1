"""A trainer to be killed: it saves a different, non-uniform pattern at each step and says what was acknowledged."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ckptstore import CheckpointStore, StoreConfig

ELEMENTS = 1 << 20
CONFIG = StoreConfig(agent_idle_exit_seconds=20)


def pattern(step: int) -> torch.Tensor:
    """Every element depends on its place and on the step, so that no mixture of two steps passes for one."""
    return (torch.arange(ELEMENTS, dtype=torch.int64) * 2654435761 + step * 40503).remainder(16_777_213).to(torch.int32)


def problem_with(state: dict[str, Any], step: int) -> str | None:
    """What is wrong with a checkpoint of ``step``."""
    if state["step"] != step:
        return f"holds step {state['step']}"
    differing = int((state["x"] != pattern(step)).sum())
    return f"{differing} elements differ" if differing else None


def train(root: str, remote: str | None, first_step: int, count: int, level: str, pipe: Connection) -> None:
    """Save ``count`` steps; send each step once ``level`` is acknowledged."""
    torch.set_num_threads(1)
    store = CheckpointStore(root, remote=remote, config=CONFIG)
    x = torch.empty(ELEMENTS, dtype=torch.int32)
    for step in range(first_step, first_step + count):
        x.copy_(pattern(step))
        handle = store.save({"x": x, "step": step}, step)
        getattr(handle, level).result(60)
        pipe.send(step)
    store.close()
    pipe.send("closed")


def read_all(root: Path) -> dict[int, dict[str, Any]]:
    """Every complete checkpoint, read back and verified."""
    with CheckpointStore(root) as store:
        return {info.step: store.read(info.save_id) for info in store.checkpoints(include_superseded=True)}
