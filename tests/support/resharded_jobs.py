"""Optimizers, misfits and changes between saves, in jobs whose ranks share their state (FSDP2)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sameness import assert_same
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckptstore import CheckpointStore, StoreConfig

QUICK = StoreConfig(deadline_s=20, agent_idle_exit_seconds=5)


class Master(torch.optim.Optimizer):
    """bf16 weights, a master copy in fp32, a moment in fp16, and a count that is a plain number."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state.setdefault("master", p.float())
                    state.setdefault("moment", torch.zeros_like(p, dtype=torch.float16)).add_(p.grad.half())
                    state["count"] = state.get("count", 0) + 1
                    p.copy_(state["master"].add_(state["moment"].float(), alpha=-group["lr"]))


def _groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": list(model[0].parameters()), "lr": 0.1, "weight_decay": 0.0},
        {"params": list(model[1].parameters()), "lr": 0.2},
    ]


Make = Callable[[Any], torch.optim.Optimizer]
#: Name -> how the job that saves makes it, and how the one that loads does.
OPTIMIZERS: dict[str, tuple[Make, Make]] = {
    name: (make, make)
    for name, make in {
        "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
        "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
        "AdamW single": lambda m: torch.optim.AdamW(m.parameters(), foreach=False),
        "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
        "AdamW tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
        "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
        "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
        "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
        "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
        "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
        "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
        "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
        "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), centered=True, momentum=0.9),
        "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
        "moments of other dtypes": lambda m: Master(m.parameters()),
        "groups": lambda m: torch.optim.AdamW(_groups(m)),
        "frozen parameters": lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]),
        "state of some": lambda m: torch.optim.AdamW(m.parameters()),
        "never stepped": lambda m: torch.optim.AdamW(m.parameters()),
    }.items()
} | {
    "groups reordered": (lambda m: torch.optim.AdamW(_groups(m)), lambda m: torch.optim.AdamW(_groups(m)[::-1])),
    "groups split": (
        lambda m: torch.optim.AdamW(_groups(m)),
        lambda m: torch.optim.AdamW([{**g, "lr": 9.0, "params": [p]} for g in _groups(m) for p in g["params"]]),
    ),
}


def job(name: str, seed: int, *, sharded: bool) -> dict[str, Any]:
    """One model with the named optimizer; the plain ones have made two steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if name == "moments of other dtypes":
        model = model.bfloat16()
    if name == "frozen parameters":
        model[0].requires_grad_(False)
    if sharded:
        for part in model:
            fully_shard(part)
        fully_shard(model)
    optimizer = OPTIMIZERS[name][sharded](model)
    for _ in range(0 if sharded or name == "never stepped" else 2):
        for fqn, p in model.named_parameters():
            if p.requires_grad and (name != "state of some" or fqn == "0.weight"):
                p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
    return {"model": model, "opt": optimizer}


def whole(value: Any) -> Any:
    """The global value. Collective."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def seen(state: dict[str, Any]) -> dict[str, Any]:
    """Values, moments and options by parameter name, whatever the groups. Collective."""
    model, optimizer = state["model"], state["opt"]
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {names[id(p)]: entry for p, entry in optimizer.state.items() if entry}
    return {
        "model": {name: whole(p) for name, p in model.named_parameters()},
        "moments": {name: {k: whole(v) for k, v in sorted(moments[name].items())} for name in sorted(moments)},
        "options": {
            names[id(p)]: {k: whole(v) for k, v in sorted(group.items()) if k not in ("params", "foreach")}
            for group in optimizer.param_groups
            for p in group["params"]
        },
    }


def reshard_optimizers(rank: int, root: str | None, remote: str, step: int) -> list[str]:
    """Load what one process saved into FSDP2, compare, and save it again as ``step`` where there is a local root."""
    problems = []
    state = {name: job(name, 1, sharded=True) for name in OPTIMIZERS}
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        store.load(state, 1)
        for name, one in state.items():
            try:
                assert_same(_sorted_options(seen(job(name, 0, sharded=False))), _sorted_options(seen(one)), name)
            except AssertionError as error:
                problems.append(str(error)[:300])
        if root is not None:
            store.save(state, step, wait="local")
    return problems


def _sorted_options(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "options": dict(sorted(found["options"].items()))}


# -- targets that don't fit --------------------------------------------------------------------------------------------


def training(seed: int, *, sharded: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    if sharded:
        for part in model:
            fully_shard(part)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (1 + seed))
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model, "opt": optimizer, "rng": torch.Generator().manual_seed(seed),
        "n": {"epoch": seed, "t": torch.full((2,), float(seed))},
    }  # fmt: skip


def _no_bias(state: dict[str, Any]) -> None:
    state["model"][2].bias = None


def _one_more(state: dict[str, Any]) -> None:
    state["model"].register_parameter("extra", nn.Parameter(torch.ones(2)))


def _wider(state: dict[str, Any]) -> None:
    state["model"][2] = nn.Linear(6, 5)


def _half(state: dict[str, Any]) -> None:
    state["n"]["t"] = torch.zeros(2, dtype=torch.float16)


#: What is wrong -> (what is done to the target, where the error lists it, a part of what is listed).
MISFITS: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "missing": (_one_more, "missing", "model.extra"),
    "unexpected": (_no_bias, "unexpected", "model.2.bias"),
    "shape": (_wider, "mismatched", "model.2.weight: stored shape [2, 6], target shape [5, 6]"),
    "dtype": (_half, "mismatched", "n.t: stored as float32, target is float16"),
}


def _everything(state: dict[str, Any]) -> Any:
    return {
        **seen({"model": state["model"], "opt": state["opt"]}),
        "buffers": {name: whole(b) for name, b in state["model"].named_buffers()},
        "rng": state["rng"].get_state(), "n": [state["n"]["epoch"], state["n"]["t"].clone()],
        "process": [torch.get_rng_state(), str(np.random.get_state()), random.getstate()],
    }  # fmt: skip


def misfits(rank: int, root: str | None, remote: str) -> list[str]:
    """The last rank's target doesn't fit; all ranks are told what and where, and none is changed."""
    problems = []
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        for name, (change, where, words) in MISFITS.items():
            state = training(1, sharded=True)
            if rank == dist.get_world_size() - 1:
                change(state)
            before = everything_here(state)
            try:
                store.load(state, 1)
                problems.append(f"{name}: loaded")
            except KeyError as error:
                if not any(words in each for each in error.context[where]):  # type: ignore[attr-defined]
                    problems.append(f"{name}: {error}")
            assert_same(before, everything_here(state), name)
    return problems


def everything_here(state: dict[str, Any]) -> Any:
    """All of this rank's part that a trainer could notice."""
    optimizer = state["opt"]
    return {
        "tensors": [_local(t) for t in (*state["model"].parameters(), *state["model"].buffers())],
        "moments": [
            {key: _local(value) for key, value in optimizer.state.get(p, {}).items()}
            for group in optimizer.param_groups
            for p in group["params"]
        ],
        "options": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "rng": state["rng"].get_state(),
        "n": [state["n"]["epoch"], state["n"]["t"].clone()],
        "process": [torch.get_rng_state(), str(np.random.get_state()), random.getstate()],
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def fitting(rank: int, root: str | None, remote: str, wanted: dict[str, Any]) -> list[str]:
    """The same target, unchanged, takes the same checkpoint, of which ``wanted`` is what :func:`seen` sees."""
    state = training(1, sharded=True)
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        store.load(state, 1)
    assert_same(wanted["model"], seen(state)["model"])
    assert_same(wanted["moments"], seen(state)["moments"])
    return []


# -- what training does between saves ----------------------------------------------------------------------------------


def _in_place(state: dict[str, Any]) -> None:
    with torch.no_grad():
        for p in state["model"].parameters():
            p.to_local().mul_(-1.5)
        for entry in state["opt"].state.values():
            entry["exp_avg"].to_local().add_(1)


def _swap_storages(state: dict[str, Any]) -> None:
    for p in state["model"].parameters():
        p.data = p.detach() * 0.5


def _step(state: dict[str, Any]) -> None:
    state["model"](torch.ones(3, 4)).square().sum().backward()
    state["opt"].step()
    state["opt"].zero_grad()


def _recreate_moments(state: dict[str, Any]) -> None:
    for entry in state["opt"].state.values():
        entry.update({key: value * 2 for key, value in entry.items()})


def _reload_optimizer(state: dict[str, Any]) -> None:
    state["opt"].load_state_dict(copy.deepcopy(state["opt"].state_dict()))


def _drop_a_moment(state: dict[str, Any]) -> None:
    state["opt"].state.pop(next(state["model"].parameters()))


CHANGES = (_step, _in_place, _swap_storages, _step, _recreate_moments, _reload_optimizer, _step, _drop_a_moment)


def change_between_saves(rank: int, root: str, remote: str) -> list[dict[str, Any]]:
    """The copies taken at each call; everything changes in place right after each."""
    state = training(0, sharded=True)
    copies = []
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        for step, change in enumerate(CHANGES):
            change(state)
            copies.append(seen(state))
            store.save(state, step)
            _in_place(state)
            _in_place(state)
        store.wait("remote")
    return copies
