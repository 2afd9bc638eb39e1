"""The state behind ``tests/compat/store_v1``. It never changes: a new format version gets a state of its own.

To write the fixture of a new version: ``python tests/support/golden_state.py tests/compat/store_vN``.
"""

from __future__ import annotations

import enum
import shutil
import sys
import tempfile
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ckptstore import CheckpointStore, StoreConfig, per_rank, register_type

STEP, WORLD_SIZE = 1200, 2


class Phase(enum.Enum):
    WARM_UP = "warm-up"


class Point(NamedTuple):
    x: int
    y: Any


@dataclass
class Recipe:
    lr: float
    table: Any = None


class Tokens:
    """Known by registration."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __repr__(self) -> str:
        return f"Tokens({self.words})"


register_type(Tokens, name="golden.tokens", encode=lambda t: {"words": t.words}, decode=lambda v: Tokens(v["words"]))


def model(*, sharded: bool = False) -> nn.Module:
    """Odd sizes, a buffer, a tied weight; values by number, not by chance."""
    net = nn.Sequential(OrderedDict(emb=nn.Embedding(7, 5), norm=nn.BatchNorm1d(5), head=nn.Linear(5, 7)))
    net.head.weight = net.emb.weight
    net.head.bias.requires_grad_(False)
    with torch.no_grad():
        for number, tensor in enumerate([*net.parameters(), *net.buffers()]):
            tensor.copy_((torch.arange(tensor.numel()).reshape(tensor.shape) * 37 % 19 - 9 + number).to(tensor.dtype))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
    return net


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """Moments by number; none for what is frozen."""
    adam = torch.optim.AdamW([{"params": [p for p in net.parameters() if p.requires_grad], "lr": 0.125}])
    for group in adam.param_groups:
        for p in group["params"]:
            adam.state[p] = {
                "step": torch.tensor(3.0),
                "exp_avg": (p.detach() * 0.5).clone(),
                "exp_avg_sq": (p.detach() * p.detach()).to(torch.bfloat16),
            }
    return adam


def values() -> dict[str, Any]:
    """Everything but model and optimizer."""
    dense = torch.tensor([[0, 0, 1.0], [2.0, 0, 0]])
    tied = torch.arange(4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composites = {
            "coo": dense.to_sparse(),
            "csr": dense.to_sparse_csr(),
            "nested": torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)]),
            "jagged": torch.nested.nested_tensor([torch.arange(2.0), torch.arange(3.0)], layout=torch.jagged),
            "quantized": torch.quantize_per_tensor(dense, 0.5, 1, torch.quint8),
        }
    return {
        "epoch": 7,
        "history": [0.5, float("inf"), float("nan"), -0.0],
        "keys": {1: "int", "1": "str", None: Point(1, (2,)), "a.b": {"c": 2**70}},
        "containers": OrderedDict([("z", defaultdict(list, {"k": [1]})), ("s", {1, 2}), ("f", frozenset("a"))]),
        "classes": [Phase.WARM_UP, Recipe(0.1, torch.arange(3)), Tokens(["a", "b"]), Decimal("1.10")],
        "when": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        "numpy": {"small": np.arange(3, dtype=">i2"), "scalar": np.float32(0.1), "dtype": np.dtype("<M8[ns]")},
        "arrays": {"large": np.arange(9000.0), "times": np.arange(9000).astype("M8[s]").reshape(90, 100)},
        "torch": [torch.float8_e4m3fn, torch.Size([2, 3]), torch.device("cpu")],
        "bits": {
            str(dtype): (torch.arange(16, dtype=torch.uint8) * 11).view(dtype)
            for dtype in (torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.uint16, torch.int4, torch.uint64)
        },
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "tied": [tied, tied, tied.flip(0)],
        "composites": composites,
    }


def own(rank: int) -> dict[str, Any]:
    return {"rank": rank, "rng": torch.arange(4) + rank, "list": [rank] * (rank + 1)}


def write(rank: int, folder: str) -> None:
    """One rank of the job that writes the fixture."""
    net = model(sharded=True)
    state = {"model": net, "optimizer": optimizer(net), **values(), "own": per_rank(own(rank))}
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(f"{folder}/local", remote=f"file://{folder}/bucket", config=config) as store:
        store.save(state, STEP, epoch=7, metrics={"loss": 0.25}, tags=["golden"], wait="remote")
        if rank == 0:
            store.pin(STEP)
        dist.barrier()


def load_sharded(rank: int, root: str) -> Any:
    """One rank of a job that reads it."""
    net = model(sharded=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.to_local().zero_()
    target: dict[str, Any] = {"model": net, "own": per_rank(None)}
    with CheckpointStore(root) as store:
        store.load(target)
    return {name: tensor.full_tensor() for name, tensor in net.named_parameters()}, target["own"].value


if __name__ == "__main__":
    from golden_state import write as job
    from ranks import run_ranks

    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there; a fixture is never written again")
    with tempfile.TemporaryDirectory() as scratch:
        print(run_ranks(WORLD_SIZE, job, scratch))
        shutil.copytree(scratch, target)
