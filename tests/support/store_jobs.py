"""What ranks do in the tests of the store; every function here runs in a process of its own."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckptstore import CheckpointStore, StoreConfig, per_rank

QUICK = StoreConfig(deadline_s=10, agent_idle_exit_seconds=5)


def make(kind: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after two real steps; ``kind`` is plain, ddp, fsdp or hsdp."""
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 65), nn.Linear(65, 7, bias=False))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        torch.manual_seed(100 + step)
        model(torch.randn(4, 33)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of every global value, the same for every way of sharding. Collective for FSDP."""
    total = hashlib.sha256()
    parameters = dict(model.named_parameters())
    for name in sorted(parameters, key=lambda n: n.removeprefix("module.")):
        parameter = parameters[name]
        state = optimizer.state[parameter]
        for value in (parameter, state["exp_avg"], state["exp_avg_sq"], state["step"]):
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            total.update(full.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save(rank: int, kind: str, root: str, remote: str | None, level: str = "local") -> Any:
    model, optimizer = make(kind)
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        state = {"model": model, "optimizer": optimizer, "epoch": 3, "mine": per_rank({"rank": rank})}
        info = store.save(state, 10, metrics={"loss": 0.25}).wait(level, 60)
    return fingerprint(model, optimizer), info.step, dict(info.tiers)


def _session(store: CheckpointStore) -> Any:
    """Open once something was saved."""
    return store._session


def save_in_turn(rank: int, root: str) -> Any:
    """The whole state and its model in turn, another agent in between: collective calls of each, what came back."""
    model, optimizer = make("fsdp")
    states: list[dict[str, Any]] = [{"model": model, "optimizer": optimizer}, {"model": model}]
    calls, saved = [], {}
    with CheckpointStore(root, config=QUICK) as store:
        for step in range(8):
            if step == 6:
                dist.barrier()
                link = _session(store).link
                if rank == 0:
                    os.kill(link.client.agent_pid, signal.SIGKILL)
                while link._client is not None:  # until this rank has heard of it
                    time.sleep(0.01)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            before = _session(store).agreement.calls if step else 0
            handle = store.save(states[step % 2], step)
            calls.append(_session(store).agreement.calls - before)
            handle.wait("local", 60)
            saved[step] = fingerprint(model, optimizer)
        for step in (7, 6, 5, 2):
            store.load(states[step % 2], step)
            saved[step] = saved[step] == fingerprint(model, optimizer)
    return calls[2:], saved[7], saved[6], saved[5], saved[2]


def load(rank: int, kind: str, root: str, remote: str | None) -> Any:
    model, optimizer = make(kind, seed=1)
    mine: dict[str, Any] = {"rank": None}
    state = {"model": model, "optimizer": optimizer, "epoch": 0, "mine": per_rank(mine)}
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        info = store.load(state)
    assert info is not None
    assert info.report is not None
    return fingerprint(model, optimizer), state["epoch"], mine["rank"], dict(info.report.bytes_by_source)


def load_each(rank: int, roots: dict[str, str], remote: str | None) -> Any:
    """Loads one after another: kind -> the root it loads from."""
    return {kind: load(rank, kind, root, remote) for kind, root in roots.items()}


def node_root(root: str, rank: int, ranks_per_node: int = 1) -> str:
    """Each simulated node has its own root, and by that its own agent."""
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_node)
    return str(Path(root) / f"node-{rank // ranks_per_node}")


def save_on_nodes(rank: int, root: str, remote: str | None, level: str = "local") -> Any:
    return save(rank, "fsdp", node_root(root, rank), remote, level)


def save_on_a_shared_root(rank: int, root: str, runtime: str) -> Any:
    """Two nodes, each with an agent of its own, that see one directory; what else lies there afterwards."""
    os.environ["XDG_RUNTIME_DIR"] = f"{runtime}/{rank}"
    Path(os.environ["XDG_RUNTIME_DIR"]).mkdir(parents=True)
    return save(rank, "fsdp", root, None)


def load_on_nodes(rank: int, root: str, remote: str | None) -> Any:
    return load(rank, "fsdp", node_root(root, rank), remote)


def go_on_on_nodes(rank: int, root: str, remote: str, lost: str, was: bytes) -> Any:
    """A job goes on where a file is lost: what it loads, and whether the file is back after the next save."""
    file = Path(lost)
    model, optimizer = make("fsdp", seed=1)
    state = {"model": model, "optimizer": optimizer}
    with CheckpointStore(node_root(root, rank), remote=remote, config=QUICK) as store:
        store.load(state)
        loaded = fingerprint(model, optimizer)
        store.save(state, 11, wait="local")
        deadline = time.monotonic() + 60
        while not (is_back := file.exists() and file.read_bytes() == was) and time.monotonic() < deadline:
            time.sleep(0.05)
    return loaded, is_back


def load_from(rank: int, kind: str, roots: list[str], remote: str | None) -> Any:
    """Rank r runs on the node whose local root is ``roots[r]``."""
    return load(rank, kind, roots[rank], remote)


def load_and_fetch(rank: int, kind: str, remote: str) -> Any:
    """A job on a fresh node: what it took from where, and the bytes of the checkpoint."""
    model, optimizer = make(kind, seed=1)
    with CheckpointStore(None, remote=remote, config=QUICK) as store:
        info = store.load({"model": model, "optimizer": optimizer})
    assert info is not None
    assert info.report is not None
    return fingerprint(model, optimizer), dict(info.report.bytes_by_source), info.size_bytes


def fetch_on_nodes(rank: int, root: str, remote: str, ranks_per_node: int) -> Any:
    """Jobs on fresh nodes, by kind and by how often a byte may be fetched, which only rank 0 is told."""
    seen = {}
    for kind in ("ddp", "hsdp"):
        for fetch_once in ("per_node", "per_job"):
            model, optimizer = make(kind, seed=1)
            config = QUICK.model_copy(update={"fetch_once": fetch_once if rank == 0 else "per_node"})
            folder = node_root(f"{root}/{kind}-{fetch_once}", rank, ranks_per_node)
            with CheckpointStore(folder, remote=remote, config=config) as store:
                info = store.load({"model": model, "optimizer": optimizer})
            assert info is not None
            assert info.report is not None
            fetched = info.report.bytes_by_source.get("file", 0)
            seen[kind, fetch_once] = fingerprint(model, optimizer), fetched, info.size_bytes
    return seen


def stock_calls(rank: int, root: str) -> Any:
    """A save and a load through stock PyTorch's own calls."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = make("fsdp")
    other, other_optimizer = make("fsdp", seed=1)
    with CheckpointStore(root, config=QUICK) as store:
        dcp.save({"model": model.state_dict(), "n": 3}, storage_writer=store.writer(10))
        target = {"model": other.state_dict(), "n": 0}
        dcp.load(target, storage_reader=store.reader())
        other.load_state_dict(target["model"])
        for parameter, source in zip(other.parameters(), model.parameters(), strict=True):
            other_optimizer.state[parameter] = optimizer.state[source]
        steps = [info.step for info in store.checkpoints()]
    return fingerprint(model, optimizer) == fingerprint(other, other_optimizer), target["n"], steps


def load_with_trouble(rank: int, root: str, trouble: str) -> Any:
    """Rank 1 is slow to read, or dies, in the middle of a load; the deadline is 2 s."""
    from ckptstore.repo.reader import CheckpointReader

    read_nearby = CheckpointReader.read_nearby

    def troubled(self: CheckpointReader, wanted: Any) -> Any:
        if trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5)
        return read_nearby(self, wanted)

    if rank == 1:
        mock.patch.object(CheckpointReader, "read_nearby", troubled).start()  # ends with this process
    model, optimizer = make("ddp", seed=1)
    store = CheckpointStore(root, config=StoreConfig(deadline_s=2, agent_idle_exit_seconds=5))
    store.load({"model": model, "optimizer": optimizer})
    return fingerprint(model, optimizer)


def load_from_a_dying_remote(rank: int, remote: str) -> Any:
    """The remote answers no more once the checkpoint is open: the error, and how often this rank asked for bytes."""
    from ckptstore.errors import TransientError
    from ckptstore.repo.remote import RemoteTier

    asked: list[str] = []

    def silent(self: RemoteTier, pack: str, *_: int) -> bytes:
        asked.append(pack)
        raise TransientError("the bucket answers no more")

    mock.patch.object(RemoteTier, "get_range", silent).start()  # ends with this process
    with CheckpointStore(None, remote=remote, config=QUICK) as store:
        try:
            store.load({f"t{n}": torch.zeros(5) for n in range(200)})
        except TransientError as error:
            return str(error), len(asked)
    return None


def save_many(rank: int, root: str, remote: str) -> Any:
    """Many small tensors, the same on all ranks."""
    with CheckpointStore(root, remote=remote, config=QUICK) as store:
        store.save({f"t{n}": torch.full((5,), float(n)) for n in range(200)}, 1, wait="remote")


def die(rank: int, moment: str, root: str, remote: str | None) -> Any:
    """Two nodes of one rank each; somebody dies at ``moment`` of the second save, after a first one is complete."""
    folder = node_root(root, rank)
    model, optimizer = make("fsdp")
    state = {"model": model, "optimizer": optimizer, "epoch": 3, "mine": per_rank({"rank": rank})}
    store = CheckpointStore(folder, remote=remote, config=QUICK)
    store.save(state, 10).wait("local", 60)
    session = store._session
    assert session is not None
    agent = session.link.client.agent_pid
    if moment == "between seals" and rank == 1:
        session.link.client.seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    elif moment == "between prepares" and rank == 1:
        relay = session.link.relay
        assert relay is not None
        relay.sealed = lambda _: os.kill(agent, signal.SIGKILL)  # type: ignore[method-assign]
    elif moment == "before complete":
        relay = session.link.relay
        assert relay is not None
        relay._root = lambda _: (time.sleep(1), os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[method-assign,assignment,return-value]
    state["epoch"] = 4
    handle = store.save(state, 20)
    if moment == "before complete" and rank == 1:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)
    error = handle.local.exception(timeout=60)
    return type(error).__name__, str(error)


def latest(rank: int, root: str, remote: str | None) -> Any:
    """What a restarted job finds."""
    folder = node_root(root, rank)
    model, optimizer = make("fsdp", seed=1)
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    with CheckpointStore(folder, remote=remote, config=QUICK) as store:
        info = store.load(state)
        assert info is not None
        return info.step, state["epoch"], fingerprint(model, optimizer)


def different_step(rank: int, root: str) -> Any:
    with CheckpointStore(root, config=QUICK) as store:
        store.save({"n": 1}, 5 + rank)


def refuse_on_one_rank(rank: int, root: str) -> Any:
    with CheckpointStore(root, config=QUICK) as store:
        bad: dict[str, Any] = {"n": 1, "extra": {"hook": (lambda: None) if rank == 1 else None}}
        try:
            store.save(bad, 1)
        except Exception as error:
            first: Any = type(error).__name__, str(error)
        store.save({"n": 1, "extra": {"hook": None}}, 2).wait("local", 60)
        return first, [info.step for info in store.checkpoints()]


def killed_in_copy(rank: int, root: str, victim: int, after_bytes: float) -> Any:
    """Saves a different pattern each time; ``victim`` is killed somewhere in the copy of the second save."""
    generator = torch.Generator().manual_seed(dist.get_world_size())
    big = torch.rand(1 << 20, generator=generator)
    state = {"w": per_rank({"t": big + rank}), "n": 1}
    store = CheckpointStore(root, config=QUICK)
    store.save(state, 1).wait("local", 60)
    big.add_(1)
    if rank == victim:
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(after_bytes)
            os.kill(pid, signal.SIGKILL)
            os._exit(0)
    handle = None
    for step in range(2, 200):
        big.add_(1)
        handle = store.save(state, step)
    return handle is not None


def prepare_on_ranks(rank: int, root: str) -> Any:
    model, optimizer = make("fsdp")
    state = {"model": model, "optimizer": optimizer}
    with CheckpointStore(root, config=QUICK) as store:
        store.prepare(state)
        arena = _session(store)._lease.arena
        store.save(state, 7).wait("local", 60)
        return _session(store)._lease.arena is arena, [info.step for info in store.checkpoints()]


def prepare_in_vain(rank: int, root: str) -> Any:
    with CheckpointStore(root, config=QUICK) as store:
        try:
            store.prepare({"w": torch.ones(3)}) if rank else store.save({"w": torch.ones(3)}, 1)
        except Exception as error:
            return error
