"""Saves that come while the disk of one node hangs; every function here runs in a process of its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from store_jobs import node_root

from ckptstore import CheckpointStore, StoreConfig, errors, per_rank


def save_while_the_disk_hangs(rank: int, root: str, runtime: str, gate: str) -> Any:
    """By policy, what became of three saves while the disk of the last node hangs, and of one more after that."""
    os.environ["XDG_RUNTIME_DIR"] = runtime
    return {policy: _save(rank, node_root(root, rank), policy, Path(gate)) for policy in ("skip", "fail", "wait")}


def _save(rank: int, root: str, policy: Any, gate: Path) -> list[str]:
    _hang(rank, gate)
    config = StoreConfig(back_pressure=policy, back_pressure_timeout_s=0.2, agent_idle_exit_seconds=5)
    state = {"w": per_rank(torch.randn(1000))}
    outcomes = []
    with CheckpointStore(root, run=policy, config=config) as store:
        for step in (1, 2, 3):
            try:
                handle = store.save(state, step)
            except errors.SaveFailedError as error:
                outcomes.append(f"raised: {error.message}")
        if policy == "wait":
            failure = handle.failure()
            outcomes.append(f"failed: {failure.message if failure else None}")
        dist.barrier()
        gate.unlink(missing_ok=True)
        try:
            store.wait("local", 60)
        except errors.SaveFailedError as error:
            outcomes.append(f"told by wait: step {error.context['step']}")
        handle = store.save(state, 4, wait="local")
        kept = [info.step for info in store.checkpoints()]
    return [*outcomes, *map(str, kept)]


def save_when_the_disk_comes_back(rank: int, root: str, runtime: str, gate: str, hold_s: float) -> Any:
    """The steps kept when a rank had to wait for longer than the deadline of its peers."""
    os.environ["XDG_RUNTIME_DIR"] = runtime
    _hang(rank, Path(gate))
    config = StoreConfig(deadline_s=hold_s / 2, agent_idle_exit_seconds=5)
    with CheckpointStore(node_root(root, rank), run="patient", config=config) as store:
        for step in (1, 2):
            store.save({"w": per_rank(torch.randn(1000))}, step)
        if rank == 0:
            threading.Timer(hold_s, Path(gate).unlink).start()
        store.save({"w": per_rank(torch.randn(1000))}, 3, wait="local")
        return [info.step for info in store.checkpoints()]


def _hang(rank: int, gate: Path) -> None:
    if rank == 0:
        gate.touch()
    dist.barrier()
