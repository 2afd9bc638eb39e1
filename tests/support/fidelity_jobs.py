"""What ranks do in the tests of state fidelity; every function here runs in a process of its own."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import numpy as np
import state_tables
import torch
import torch.distributed as dist
from sameness import assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

from ckptstore import CheckpointStore, StoreConfig, per_rank

QUICK = StoreConfig(deadline_s=15, agent_idle_exit_seconds=5)


def whole_state() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    tensors = state_tables.tensors()
    del tensors["quint4x2 odd"]  # torch leaves its last half byte to chance, so replicas differ
    return {"values": state_tables.values(), "tensors": tensors}


def save_tables(rank: int, root: str, remote: str) -> str:
    """The same of everything on every rank, compared in full."""
    with CheckpointStore(root, remote=remote, config=QUICK.model_copy(update={"check_replicas": "full"})) as store:
        store.save(whole_state(), 1, wait="remote")
    return "saved"


def load_tables(rank: int, root: str | None, remote: str) -> str:
    expected = whole_state()
    state = {name: dict.fromkeys(table) for name, table in expected.items()}
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        store.load(state)
    assert_same(expected, state, f"rank {rank}")
    return "same"


def batch_norm(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))


def ddp_buffers(rank: int, root: str) -> Any:
    """Statistics differ by design: rank 0's are everybody's afterwards."""
    model = batch_norm(0)
    torch.manual_seed(50 + rank)
    for _ in range(3):
        model(torch.randn(8, 4)).sum().backward()
    mine = model.module[1].running_mean.clone()
    with CheckpointStore(root, config=QUICK.model_copy(update={"check_replicas": "full"})) as store:
        store.save({"model": model}, 1, wait="local")
        other = batch_norm(1)
        store.load({"model": other})
    return mine, other.module[1].running_mean.clone()


def own_values(rank: int, root: str, mode: str) -> Any:
    """Each rank's own: tensors, plain values, generators, and more on rank 1 than on the others."""
    generator = random.Random(rank)
    value: dict[str, Any] = {
        "t": torch.full((2 + rank,), float(rank)),
        "n": rank,
        "list": [rank] * rank,
        "numpy": np.random.default_rng(rank),
        "random": generator,
        "sparse": torch.sparse_coo_tensor([[rank]], [1.0], (8,), check_invariants=True),
        "large": np.arange(20_000) + rank,
        "key": {f"only {rank}": rank},
    }
    with CheckpointStore(root, config=QUICK) as store:
        if mode == "save":
            store.save({"shared": 1, "mine": per_rank(value)}, 1, wait="local")
            return None
        target = per_rank(None)
        store.load({"mine": target})
        return dist.get_world_size(), int(target.value["n"]), _describe(target.value)


def _describe(value: dict[str, Any]) -> Any:
    return (
        value["t"].tolist(), value["list"], value["numpy"].random(), value["random"].random(),
        value["sparse"].to_dense().tolist(), int(value["large"][0]), value["key"],
    )  # fmt: skip


def expected_own(rank: int) -> Any:
    sparse = [0.0] * 8
    sparse[rank] = 1.0
    return (
        [float(rank)] * (2 + rank), [rank] * rank, np.random.default_rng(rank).random(), random.Random(rank).random(),
        sparse, rank, {f"only {rank}": rank},
    )  # fmt: skip


def differing(rank: int, root: str, what: str) -> Any:
    """Rank 1's is not what the others hold."""
    odd = rank == 1
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state: dict[str, Any] = {"model": model, "opt": optimizer, "n": {"epoch": 3}}
    with torch.no_grad():
        if what == "a parameter":
            model.weight[0, 0] += odd
        elif what == "a moment":
            optimizer.state[model.bias]["exp_avg"][0] += odd
        elif what == "a hyperparameter":
            optimizer.param_groups[0]["lr"] += odd
        elif what == "a counter":
            state["n"]["epoch"] += odd
        elif what == "sparse values":
            state["s"] = torch.sparse_coo_tensor([[1]], [1.0 + odd], (3,), check_invariants=True)
        elif what == "sparse pattern":
            state["s"] = torch.sparse_coo_tensor([[1 + odd]], [1.0], (3,), check_invariants=True)
        elif what == "a quantizer":
            warnings.simplefilter("ignore")
            state["q"] = torch.quantize_per_tensor(torch.zeros(3), 0.1 + odd, 0, torch.qint8)
        elif what == "a random generator":
            state["g"] = torch.Generator().manual_seed(rank)
        elif what == "a large array":
            state["a"] = np.zeros(20_000) + odd
        elif what == "a container":
            state["c"] = [1, 2] if odd else (1, 2)
        elif what == "one bit of a nan":
            state["b"] = torch.tensor([0x7FC00000 + odd], dtype=torch.int32).view(torch.float32)
        elif what == "ties":
            state["u"] = model.weight if odd else model.weight.detach().clone()
    with CheckpointStore(root, config=QUICK.model_copy(update={"check_replicas": "full"})) as store:
        try:
            store.save(state, 1)
        except Exception as error:
            raised = type(error).__name__, getattr(error, "context", {}).get("key"), str(error)
        else:
            raised = ("nothing", None, "")
        return raised, [info.step for info in store.checkpoints()]


def wrapped(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same network, plain or as jobs wrap it, and its optimizer."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    if kind == "compiled in place":
        model.compile(backend="eager")
    if kind in ("fsdp2", "compiled fsdp2"):
        from torch.distributed.fsdp import fully_shard

        for part in (model[0], model[2]):
            fully_shard(part)
        fully_shard(model)
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if kind in ("ddp", "compiled ddp"):
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "data parallel":
        model = nn.DataParallel(model)
    if kind.startswith("compiled ") and kind != "compiled in place":
        model = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    torch.manual_seed(seed + 5)
    for _ in range(2):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def in_order(state: dict[str, Any]) -> dict[str, Any]:
    """Names sorted: FSDP1 has an order of its own."""
    groups = [{**group, "params": sorted(group["params"])} for group in state["opt"]["param_groups"]]
    return {
        "model": dict(sorted(state["model"].items())),
        "state": {name: dict(sorted(entry.items())) for name, entry in sorted(state["opt"]["state"].items())},
        "groups": [dict(sorted(group.items())) for group in groups],
    }


WRAPPERS = ("plain", "compiled in place", "compiled plain", "ddp", "compiled ddp", "fsdp2", "compiled fsdp2", "fsdp1")


def wrappers(rank: int, root: str) -> list[str]:
    """Every way of wrapping saved, and loaded into every other; each checkpoint must give the same values."""
    warnings.simplefilter("ignore")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    problems: list[str] = []
    with CheckpointStore(root, config=QUICK) as store:
        for number, saver in enumerate(WRAPPERS):
            model, optimizer = wrapped(saver, 0)
            store.save({"model": model, "opt": optimizer}, number, wait="local")
            expected = in_order(store.read(number))
            names = set(expected["model"])
            if names != {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
                         "1.num_batches_tracked", "2.weight", "2.bias"}:  # fmt: skip
                problems.append(f"{saver}: names {sorted(names)}")
            for loader in WRAPPERS:
                other, resumed = wrapped(loader, 1)
                try:
                    store.load({"model": other, "opt": resumed}, number)
                    store.save({"model": other, "opt": resumed}, 100, wait="local")
                    assert_same(expected, in_order(store.read(100)), f"{saver} -> {loader}")
                except Exception as error:
                    problems.append(f"{saver} -> {loader}: {type(error).__name__}: {str(error)[:300]}")
    return problems


class RowScaled(torch.Tensor):
    """Integers with a scale for each row and one for all, as weight-only quantization keeps them."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, rows: torch.Tensor, common: torch.Tensor) -> RowScaled:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, strides=data.stride(), dtype=torch.float32)

    def __init__(self, data: torch.Tensor, rows: torch.Tensor, common: torch.Tensor) -> None:
        self.data_, self.rows, self.common = data, rows, common

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data_", "rows", "common"], ["int8", 1]

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> RowScaled:
        return RowScaled(inner["data_"], inner["rows"], inner["common"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default, torch.ops.aten.alias.default):
            return RowScaled(args[0].data_, args[0].rows, args[0].common)
        return NotImplemented

    def __repr__(self) -> str:
        return "RowScaled()"


torch.serialization.add_safe_globals([RowScaled])


def row_scaled(factor: int = 1, rows: slice = slice(None)) -> RowScaled:
    data = torch.arange(35, dtype=torch.int8).reshape(7, 5)[rows] * factor
    return RowScaled(data.contiguous(), torch.arange(7.0)[rows] * factor, torch.tensor(0.5 * factor))


def two_tensor(factor: float = 1, rows: slice = slice(None)) -> TwoTensor:
    a, b, c = ((torch.arange(21.0).reshape(7, 3)[rows] + n).contiguous() * factor for n in (0, 100, 200))
    return TwoTensor(TwoTensor(a, b), TwoTensor(b.clone(), c))


def sharded_wrappers(rank: int, factor: int) -> dict[str, Any]:
    """DTensors around tensors that are made of others; 7 rows, so shards are uneven and some may be empty."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    size = -(-7 // world_size)
    rows = slice(rank * size, (rank + 1) * size)

    def sharded(local: torch.Tensor, width: int) -> DTensor:
        spec: dict[str, Any] = {"run_check": False, "shape": torch.Size((7, width)), "stride": (width, 1)}
        return DTensor.from_local(local, mesh, [Shard(0)], **spec)

    return {"rows": sharded(row_scaled(factor, rows), 5), "two": sharded(two_tensor(factor, rows), 3)}


def save_sharded_wrappers(rank: int, root: str) -> Any:
    """Also: one whose parts can't be placed is refused on all ranks, by key."""
    state = sharded_wrappers(rank, 1)
    local = state["rows"].to_local()
    local = RowScaled(local.data_, torch.ones(17), local.common)
    odd = DTensor.from_local(local, state["rows"].device_mesh, [Shard(0)], run_check=False, shape=(7, 5), stride=(5, 1))
    with CheckpointStore(root, config=QUICK) as store:
        store.save(state, 1, wait="local")
        try:
            store.save({"deep": {"odd": odd}}, 2)
        except TypeError as error:
            return str(error), [info.step for info in store.checkpoints()]
    return "saved", []


def load_sharded_wrappers(rank: int, root: str) -> Any:
    state = sharded_wrappers(rank, 0)
    before = state["rows"].to_local().data_.data_ptr()
    with CheckpointStore(root, config=QUICK) as store:
        store.load(state)
    wanted = sharded_wrappers(rank, 1)
    for name, tensor in state.items():
        assert_same(wanted[name].to_local(), tensor.to_local(), f"{name} on rank {rank}")
    return state["rows"].to_local().data_.data_ptr() == before


def stage(numbers: tuple[int, ...], value: float) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """Some layers of a pipeline, with their own names, and an optimizer of theirs."""
    layers = nn.ModuleDict({str(i): nn.Linear(2, 3 + i) for i in numbers})
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + value * (1 + int(name[0])))
    optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
    for parameter in layers.parameters():
        parameter.grad = parameter.detach() + 1
    if value:
        optimizer.step()
    return layers, optimizer


def pipeline(rank: int, root: str, mode: str, stages: tuple[tuple[int, ...], ...], strict: bool = True) -> Any:
    """Each rank has layers of its own in the same module; each ties two of its own values."""
    layers, optimizer = stage(stages[rank], 1.0 if mode == "save" else 0.0)
    mine = torch.full((3,), float(rank))
    state: dict[str, Any] = {"model": layers, "opt": optimizer, "n": 1, "mine": per_rank([mine, mine])}
    with CheckpointStore(root, config=QUICK) as store:
        if mode == "save":
            store.save(state, 1, wait="local")
            return None
        if mode == "refused":
            state["deep"] = {"x": {"own": torch.ones(1)} if rank else {}}
            try:
                store.save(state, 2)
            except TypeError as error:
                return str(error), [info.step for info in store.checkpoints()]
        state["mine"] = per_rank(None)
        try:
            store.load(state, strict=strict)
        except KeyError as error:
            return error.context["unexpected"]  # type: ignore[attr-defined]
        wanted, stepped = stage(stages[rank], 1.0)
        assert_same(dict(wanted.state_dict()), dict(layers.state_dict()))
        assert_same(stepped.state_dict(), optimizer.state_dict())
        a, b = state["mine"].value
        return a.data_ptr() == b.data_ptr(), a[0].item()


def fsdp1_training(seed: int, steps: int, *, use_orig_params: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two wrapped layers of odd sizes, so that the cut goes through rows and some ranks lack a parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    torch.manual_seed(seed)
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    fsdp1_steps(model, optimizer, steps)
    return model, optimizer


def fsdp1_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp1_resumed(rank: int, root: str, use_orig_params: bool) -> Any:
    """Loaded into a fresh optimizer and into one that has stepped, then trained on; bytes read, and those stored."""
    warnings.simplefilter("ignore")
    model, optimizer = fsdp1_training(0, 2, use_orig_params=use_orig_params)
    read = []
    with CheckpointStore(root, config=QUICK) as store:
        size = store.save({"model": model, "opt": optimizer}, 1).wait("local").size_bytes
        fsdp1_steps(model, optimizer, 2)
        for steps in (0, 3):
            other, resumed = fsdp1_training(1, steps, use_orig_params=use_orig_params)
            held = {id(entry["exp_avg"]) for entry in resumed.state.values() if "exp_avg" in entry}
            info = store.load({"model": other, "opt": resumed}, 1)
            assert info is not None
            assert info.report is not None
            read.append(sum(info.report.bytes_by_source.values()))
            if use_orig_params:
                assert held <= {id(entry["exp_avg"]) for entry in resumed.state.values()}, "in place"
            fsdp1_steps(other, resumed, 2)
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                assert_same(ours.detach(), theirs.detach(), f"rank {rank}")
                entries = (dict(sorted(o.state.get(p, {}).items())) for o, p in ((optimizer, ours), (resumed, theirs)))
                assert_same(*entries, f"rank {rank}")
    return read, size
