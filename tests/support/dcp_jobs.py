"""What ranks do in the distributed tests of the torch side."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from memory_checkpoint import MemoryCheckpoint, shard_of
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedOptimStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.markers import per_rank
from ckptstore.dcp.prepare import Prepared, Preparer
from ckptstore.errors import IntegrityError


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty; a tied weight; a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 13)
        self.norm = nn.BatchNorm1d(13)
        self.down = nn.Linear(13, 7, bias=False)
        self.one = nn.Linear(7, 1)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.down(self.norm(torch.relu(self.up(self.emb(tokens)))))
        return self.head(x).logsumexp(-1) + self.one(x).squeeze(-1)


def shard(model: nn.Module, mode: str) -> nn.Module:
    """Wrap as the named kind of job does."""
    world_size = dist.get_world_size()
    if mode == "fsdp2":
        for part in (model.up, model.down, model.one):
            fully_shard(part)
        fully_shard(model)
    elif mode == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
        for part in (model.up, model.down):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return model


def make(mode: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = shard(Net(seed), mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int = 3) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(0, 11, (6,), generator=generator)).sum().backward()
        optimizer.step()
        scheduler.step()


def whole(value: Any) -> Any:
    """Everything as plain CPU tensors and values. Collective."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Model, moments and schedule by plain name."""
    if isinstance(model, FullyShardedDataParallel):
        return fsdp1_snapshot(model, optimizer, scheduler)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    names = {id(p): name for name, p in inner.named_parameters()}
    return {
        "model": whole(dict(inner.state_dict())),
        "moments": {names[id(p)]: whole(entry) for p, entry in optimizer.state.items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "schedule": scheduler.state_dict(),
    }


def fsdp1_snapshot(model: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    """Put together from shards: on gloo, FSDP1's own full optimizer state gives one moment's values for both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind, config = StateDictType.SHARDED_STATE_DICT, ShardedOptimStateDictConfig()
        with FullyShardedDataParallel.state_dict_type(model, kind, None, config):
            moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
            weights = model.state_dict()
            return {
                "model": {name: from_shards(t) for name, t in weights.items()},
                "moments": {name: {k: from_shards(t) for k, t in entry.items()} for name, entry in moments.items()},
                "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
                "schedule": scheduler.state_dict(),
            }


def from_shards(tensor: Any) -> torch.Tensor:
    """The global tensor of a ShardedTensor. Collective."""
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone()
    mine = [(s.metadata.shard_offsets, s.metadata.shard_sizes, s.tensor) for s in tensor.local_shards()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    full = torch.empty(tensor.metadata().size)
    for offsets, sizes, part in (shard for shards in everyone for shard in shards):
        full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = part
    return full


def save_job(rank: int, mode: str, folder: Path) -> dict[str, Any]:
    """Train, save, say what the state was."""
    model, optimizer, scheduler = make(mode, 0)
    train(model, optimizer, scheduler)
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "epoch": 7,
        "rng": per_rank(torch.tensor([rank])),
    }
    agreement = Agreement(deadline_s=20)
    prepared = Preparer(agreement).prepare(state, step=3, counter=1)
    MemoryCheckpoint.leave(folder, *shard_of(prepared, rank=rank, world_size=agreement.world_size, chunk_elements=1024))
    seen = snapshot(model, optimizer, scheduler)
    seen["written"] = sum(piece.size_bytes for piece in prepared.plan.pieces)
    seen["world_bytes"] = prepared.plan.world_bytes
    return seen


def load_job(rank: int, mode: str, folder: Path) -> dict[str, Any]:
    """Load into a fresh job of another shape; say what the state is then."""
    model, optimizer, scheduler = make(mode, 99)
    places = {name: p.data_ptr() for name, p in local_parameters(model).items()}
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "epoch": 0,
        "rng": per_rank(torch.tensor([-1])),
    }
    load_into(state, MemoryCheckpoint.open(folder), agreement=Agreement(deadline_s=20))
    seen = snapshot(model, optimizer, scheduler)
    seen["epoch"], seen["rng"] = state["epoch"], int(state["rng"].value)
    seen["moved"] = [name for name, p in local_parameters(model).items() if p.data_ptr() != places[name]]
    return seen


def local_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}


def layout_job(rank: int, folder: Path) -> dict[str, str]:
    """Tensors laid out in every way a mesh allows; which are refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    full = torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5)
    ways = {
        "shard0_shard1": [Shard(0), Shard(1)],
        "shard1_shard0": [Shard(1), Shard(0)],
        "shard0_replicate": [Shard(0), Replicate()],
        "replicate_shard1": [Replicate(), Shard(1)],
        "replicate_replicate": [Replicate(), Replicate()],
        "shard0_shard0": [Shard(0), Shard(0)],
        "shard1_replicate": [Shard(1), Replicate()],
    }
    state = {name: distribute_tensor(full.clone(), mesh, placements) for name, placements in ways.items()}
    agreement = Agreement(deadline_s=20)
    prepared = Preparer(agreement).prepare(state, step=1, counter=1)
    MemoryCheckpoint.leave(folder, *shard_of(prepared, rank=rank, world_size=4))
    dist.barrier()
    # Every layout from every other: names are rotated by a rename.
    source = MemoryCheckpoint.open(folder)
    problems = {}
    names = list(ways)
    for shift in range(len(names)):
        rename = {f"{old}": names[(i + shift) % len(names)] for i, old in enumerate(names)}
        target = {name: distribute_tensor(torch.zeros(7, 5), mesh, placements) for name, placements in ways.items()}
        load_into(
            {"x": target}, Under(source), agreement=agreement, rename={f"x.{a}": f"x.{b}" for a, b in rename.items()}
        )
        for name, tensor in target.items():
            if not torch.equal(tensor.full_tensor(), full):
                problems[f"{name} <- {shift}"] = str(tensor.full_tensor())
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial(), Replicate()])
    try:
        Preparer(agreement).prepare({"grad": partial}, step=1, counter=2)
        problems["partial"] = "not refused"
    except TypeError as error:
        if "grad" not in str(error):
            problems["partial"] = str(error)
    return problems


def tensor_parallel_job(rank: int, folder: Path) -> list[bool]:
    """FSDP2 over tensor parallelism: both cut dimension 0 of a weight, interleaved. Out to plain tensors and back."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    agreement = Agreement(deadline_s=20)
    prepared = Preparer(agreement).prepare({"m": model}, step=1, counter=1)
    MemoryCheckpoint.leave(folder, *shard_of(prepared, rank=rank, world_size=4))
    dist.barrier()
    plain = {"m": {name: torch.zeros_like(tensor) for name, tensor in expected.items()}}
    load_into(plain, MemoryCheckpoint.open(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    load_into({"m": model}, MemoryCheckpoint.open(folder), agreement=agreement)
    return [torch.equal(plain["m"][name], tensor) for name, tensor in expected.items()] + [
        torch.equal(tensor.full_tensor(), expected[name]) for name, tensor in model.state_dict().items()
    ]


class Under:
    """The same checkpoint with its state under one key ``x``."""

    def __init__(self, source: MemoryCheckpoint) -> None:
        self._source = source
        self.tree = {"version": 1, "tree": {"x": source.tree["tree"], "~": [0]}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


# -- agreement ---------------------------------------------------------------------------------------------------------


def prepare_all(rank: int, states: list[Any], steps: list[int], modes: str = "sample", saves: int = 1) -> Any:
    """Each rank prepares its own state and step."""
    preparer = Preparer(Agreement(deadline_s=10), check_replicas=modes)
    prepared: Prepared | None = None
    for counter in range(1, saves + 1):
        prepared = preparer.prepare(states[rank], step=steps[rank], counter=counter)
    assert prepared is not None
    return [piece.fqn for piece in prepared.plan.pieces], sorted(prepared.flags)


def fail_then_go_on(rank: int) -> tuple[str, list[bool]]:
    """One rank's state is bad once; afterwards saving works and the plan is kept."""
    preparer = Preparer(Agreement(deadline_s=10))
    model = nn.Linear(4, 4)
    for p in model.parameters():
        p.data.fill_(1)
    bad: Any = {"model": model, "x": object() if rank == 1 else 1}
    message = ""
    try:
        preparer.prepare(bad, step=1, counter=1)
    except TypeError as error:
        message = str(error)
    good = {"model": model, "x": 1}
    return message, [preparer.prepare(good, step=i, counter=i).is_new_plan for i in (2, 3)]


def replan(rank: int) -> list[bool]:
    """Rank 1's structure changes; all notice."""
    preparer = Preparer(Agreement(deadline_s=10))
    state: dict[str, Any] = {"a": torch.ones(3)}
    new = [
        preparer.prepare(state, step=1, counter=1).is_new_plan,
        preparer.prepare(state, step=2, counter=2).is_new_plan,
    ]
    if rank == 1:
        state["mine"] = per_rank(torch.ones(2))
    else:
        state["mine"] = per_rank(3)
    new.append(preparer.prepare(state, step=3, counter=3).is_new_plan)
    new.append(preparer.prepare(state, step=4, counter=4).is_new_plan)
    return new


def lose_a_peer(rank: int, victim: int, how: str, deadline_s: float) -> tuple[str, Any, float]:
    """``victim`` dies or hangs between two saves; what the others are told and how soon."""
    preparer = Preparer(Agreement(deadline_s=deadline_s))
    state = {"a": torch.ones(3)}
    preparer.prepare(state, step=1, counter=1)
    if rank == victim:
        if how == "die":
            os._exit(9)
        time.sleep(deadline_s + 6)
        return "", None, 0.0
    began = time.monotonic()
    try:
        preparer.prepare(state, step=2, counter=2)
    except Exception as error:
        return f"{type(error).__name__}: {error}", getattr(error, "context", {}).get("ranks"), time.monotonic() - began
    return "saved", None, 0.0


def late_once(rank: int, deadline_s: float) -> list[str]:
    """Rank 1 misses one deadline; the next save of all works."""
    preparer = Preparer(Agreement(deadline_s=deadline_s))
    state = {"a": torch.ones(3), "b": per_rank(rank)}
    seen = []
    for counter in range(1, 4):
        if counter == 2 and rank == 1:
            time.sleep(deadline_s + 3)
        try:
            preparer.prepare(state, step=counter, counter=counter)
            seen.append("saved")
        except Exception as error:
            seen.append(type(error).__name__)
        dist.barrier()  # as training does between saves
    return seen


def break_in_the_middle(rank: int, deadline_s: float) -> list[str]:
    """Rank 1's state breaks at the second save, and it is interrupted there at the third; what became of each save."""

    class Sick:
        failure: BaseException | None = None

        def state_dict(self) -> dict[str, int]:
            if self.failure is not None:
                raise self.failure
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    sick = Sick()
    failures = {2: RuntimeError("no"), 3: KeyboardInterrupt()}
    preparer = Preparer(Agreement(deadline_s=deadline_s))
    seen = []
    for counter in range(1, 8):
        sick.failure = failures.get(counter) if rank == 1 else None
        try:
            preparer.prepare({"x": torch.ones(3), "sick": sick}, step=counter, counter=counter)
            seen.append("saved")
        except BaseException as error:
            seen.append(f"{type(error).__name__}: {error}")
        dist.barrier()  # as training does between saves
    return seen


def words(rank: int) -> Any:
    """The helpers, plainly."""
    torch.set_default_device("meta")  # of no concern to the ranks' words
    agreement = Agreement(deadline_s=10)
    outcome = agreement.agree(
        same={"a": 5, "b": rank}, flags={"x": rank == 2, "y": False}, sets=[7, rank if rank != 1 else None, None]
    )
    return (
        sorted(outcome.differing), sorted(outcome.raised), outcome.unequal_sets,
        agreement.gather({"r": rank, "pad": "x" * rank}), agreement.broadcast(f"from {rank}", src=1),
    )  # fmt: skip


def mismatched_target(rank: int, folder: Path) -> tuple[str, bool]:
    """Rank 1's target doesn't fit; nobody's is touched."""
    save_to = {"a": torch.ones(4), "b": torch.ones(2)}
    agreement = Agreement(deadline_s=10)
    prepared = Preparer(agreement).prepare(save_to, step=1, counter=1)
    MemoryCheckpoint.leave(folder, *shard_of(prepared, rank=rank, world_size=2))
    dist.barrier()
    target = {"a": torch.zeros(4), "b": torch.zeros(3 if rank == 1 else 2)}
    try:
        load_into(target, MemoryCheckpoint.open(folder), agreement=agreement)
    except KeyError as error:
        return str(error), all(bool((t == 0).all()) for t in target.values())
    return "loaded", False


def damage_for_one_rank(rank: int, folder: Path) -> tuple[str, list[str]]:
    """Each rank wants one tensor; that of rank 1 is damaged."""
    save_to = {"a": torch.ones(4), "b": torch.ones(2)}
    agreement = Agreement(deadline_s=10)
    prepared = Preparer(agreement).prepare(save_to, step=1, counter=1)
    manifest, image = shard_of(prepared, rank=rank, world_size=2)
    for piece in manifest.pieces:
        if piece.fqn == "b":
            image = image[: piece.start] + b"?" + image[piece.start + 1 :]
    MemoryCheckpoint.leave(folder, manifest, image)
    dist.barrier()
    try:
        load_into({"ab"[rank]: torch.zeros(4 - 2 * rank)}, MemoryCheckpoint.open(folder), agreement=agreement)
    except IntegrityError as error:
        return str(error), error.context["changed"]
    return "loaded", []
