"""Every way of laying out one training state over 1 to 8 ranks, saved and loaded into others.

No rank trains: parameters and moments are known by name, so each rank can tell what its part has to be, without a word
to the others and without the code that placed it.
"""

from __future__ import annotations

import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from dcp_jobs import Net, fsdp1_snapshot
from memory_checkpoint import MemoryCheckpoint, shard_of
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.prepare import Preparer

WORLD_SIZES = range(1, 9)


class Layout(NamedTuple):
    """How a job of ``world_size`` ranks holds its state; ``rows`` of a two-dimensional mesh, or 0."""

    kind: str
    world_size: int
    rows: int = 0


LAYOUTS = [
    Layout("plain", 1),
    *(Layout("fsdp2", n) for n in WORLD_SIZES),
    *(Layout("tensor parallel", n) for n in (2, 3, 5, 8)),
    *(Layout("ddp", n) for n in (2, 3, 8)),
    *(Layout("fsdp1", n) for n in (2, 3, 4)),
    *(Layout("hsdp", n, rows) for n, rows in ((4, 2), (6, 2), (8, 2), (8, 4))),
    *(Layout("fsdp2 over tensor parallel", n, rows) for n, rows in ((4, 2), (6, 3), (8, 2))),
]

#: One of each kind: what layouts other than ``fsdp2`` are filled from. Those are filled from all.
ONE_OF_EACH = {
    Layout("plain", 1),
    Layout("fsdp2", 3),
    Layout("fsdp2", 8),
    Layout("tensor parallel", 5),
    Layout("ddp", 3),
    Layout("fsdp1", 3),
    Layout("hsdp", 6, 2),
    Layout("fsdp2 over tensor parallel", 6, 3),
}


@cache
def known(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The global value of this name."""
    numbers = torch.arange(max(1, torch.Size(shape).numel())) * 37 % 1009 + zlib.crc32(name.encode()) % 997
    return numbers.to(dtype).reshape(shape)


class Job:
    """A model and its optimizer, laid out."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        plain = Net()
        self.shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}
        with torch.no_grad():
            for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
                tensor.copy_(known(name, tuple(tensor.shape), tensor.dtype))
        self.model = _laid_out(plain, layout)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.5)
        inner = self.model.module if layout.kind == "ddp" else self.model
        self.parameters = {} if layout.kind == "fsdp1" else dict(inner.named_parameters())
        self.buffers = dict(inner.named_buffers())

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        """The moments that are known by name, as if steps had been made."""
        for name, parameter in self.parameters.items():
            entry = self.optimizer.state[parameter]
            entry["step"] = torch.tensor(3.0)
            for field in ("exp_avg", "exp_avg_sq"):
                entry[field] = torch.empty_like(parameter.detach())
                full = known(f"{name}.{field}", self.shapes[name], torch.float32)
                _local(entry[field]).copy_(_part_of(full, parameter))

    def spoil(self) -> None:
        """Forget everything."""
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.buffers.values()):
                _local(tensor).fill_(-1)
        self.optimizer.param_groups[0]["lr"] = 9.0
        self.optimizer.state.clear()

    def problems(self) -> list[str]:
        """Names of what is not as it is known to be. Collective for FSDP1."""
        wrong = [
            name for name, b in self.buffers.items() if not torch.equal(b, known(_bare(name), tuple(b.shape), b.dtype))
        ]
        if self.optimizer.param_groups[0]["lr"] != 0.5:
            wrong.append("lr")
        if self.layout.kind == "fsdp1":
            seen = fsdp1_snapshot(self.model, self.optimizer, _NoSchedule())
            for name, shape in self.shapes.items():
                entry = {"": seen["model"][name], **seen["moments"][name]}
                wrong += [f"{name}.{k}" for k, v in entry.items() if not torch.equal(v, _known_field(name, k, shape))]
            return wrong
        for name, parameter in self.parameters.items():
            entry = {"": parameter.detach(), **self.optimizer.state[parameter]}
            if len(entry) != 4:
                wrong.append(f"{name}: {list(entry)}")
            for field, value in entry.items():
                full = _known_field(name, field, self.shapes[name])
                if not torch.equal(_local(value), _part_of(full, value)):
                    wrong.append(f"{name}.{field}")
        return wrong


class _NoSchedule:
    def state_dict(self) -> dict[str, Any]:
        return {}


def _known_field(name: str, field: str, shape: tuple[int, ...]) -> torch.Tensor:
    if field == "step":
        return torch.tensor(3.0)
    return known(f"{name}.{field}" if field else name, shape, torch.float32)


def _bare(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def _laid_out(model: nn.Module, layout: Layout) -> nn.Module:
    n, rows = layout.world_size, layout.rows
    if layout.kind == "fsdp2":
        for part in (model.up, model.down, model.one):
            fully_shard(part)
        return fully_shard(model)
    if layout.kind == "hsdp":
        mesh = init_device_mesh("cpu", (rows, n // rows), mesh_dim_names=("replicate", "shard"))
        for part in (model.up, model.down):
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if layout.kind == "fsdp2 over tensor parallel":
        mesh = init_device_mesh("cpu", (rows, n // rows), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(model, mesh["tp"])
        return fully_shard(model, mesh=mesh["dp"])
    if layout.kind == "tensor parallel":
        _tensor_parallel(model, init_device_mesh("cpu", (n,)))
    if layout.kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout.kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return model


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Dimension 0 of one weight and dimension 1 of the other are cut."""
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``full``, cut as ``like`` is, by nothing but arithmetic.

    Placements cut in the order of the mesh, but FSDP2 over tensor parallelism cuts what that has left.
    """
    if not isinstance(like, DTensor):
        return full
    mesh, where = like.device_mesh, like.device_mesh.get_coordinate()
    assert where is not None
    cuts = [(d, p) for d, p in enumerate(like.placements) if not p.is_replicate()]
    for d, placement in sorted(cuts, key=lambda cut: type(cut[1]).__name__ == "_StridedShard"):
        extent, count = full.shape[placement.dim], mesh.shape[d]
        size = -(-extent // count)
        start = min(size * where[d], extent)
        full = full.narrow(placement.dim, start, min(size, extent - start))
    return full


def matrix(rank: int, folder: Path) -> list[str]:
    """Save every layout, load layouts into others; what went wrong."""
    warnings.simplefilter("ignore")
    store = distributed_c10d._get_default_store()
    dist.destroy_process_group()
    worlds = ((n, what) for what, sizes in (("save", WORLD_SIZES), ("load", reversed(WORLD_SIZES))) for n in sizes)
    saved: dict[Layout, MemoryCheckpoint] = {}
    problems: list[str] = []
    for n, what in worlds:
        if rank >= n:
            continue
        dist.init_process_group("gloo", store=dist.PrefixStore(f"{what}/{n}", store), rank=rank, world_size=n)
        agreement = Agreement(deadline_s=60)
        for layout in (each for each in LAYOUTS if each.world_size == n):
            job = Job(layout)
            if what == "save":
                problems += _save(job, agreement, folder)
                continue
            dist.barrier()  # with all 8 ranks there at first, everything is saved by now
            saved = saved or {each: MemoryCheckpoint.open(folder / str(LAYOUTS.index(each))) for each in LAYOUTS}
            for source, checkpoint in saved.items():
                if layout.kind != "fsdp2" and source not in ONE_OF_EACH:
                    continue
                job.spoil()
                load_into(job.state, checkpoint, agreement=agreement, threads=1)
                problems += [f"{source} -> {layout}, rank {rank}: {problem}" for problem in job.problems()]
        agreement.close()
        dist.destroy_process_group()
    return problems


def _save(job: Job, agreement: Agreement, folder: Path) -> list[str]:
    if job.layout.kind == "fsdp1":  # whose state only it can lay out
        load_into(job.state, MemoryCheckpoint.open(folder / "0"), agreement=agreement)
    else:
        job.step()
    problems = [f"{job.layout}: {problem} before it was saved" for problem in job.problems()]
    prepared = Preparer(agreement).prepare(job.state, step=1, counter=1)
    here = folder / str(LAYOUTS.index(job.layout))
    here.mkdir(exist_ok=True)
    shard = shard_of(prepared, rank=agreement.rank, world_size=agreement.world_size, chunk_elements=64)
    MemoryCheckpoint.leave(here, *shard)
    dist.barrier()
    return problems
