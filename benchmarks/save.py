"""How long a save holds up training, and how long until it is on disk, against the peers, in one run.

    python benchmarks/save.py [--mib 1536] [--rounds 5] [--threads 2] [--only large,first,small,small-fsdp2,ddp,...]
    python benchmarks/save.py --only shares --output benchmarks/results/shares.json

Genuine AdamW training state (weights and both moments after real steps). In every round every contender saves once, in
a shuffled order, so that drift of the machine hits all alike; figures are medians, ratios are of medians. ``stall`` is
how long the call holds the training thread; ``durable`` the time from the call until the bytes are fsynced (for stock
DCP: until its own call or future is done, although a power cut still loses that result). First saves are measured in
processes of their own, since whoever comes later finds memory that somebody else has warmed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shares import SPLITS, noted, shares, split
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ckptstore import CheckpointStore, StoreConfig, __version__

RESULTS = Path(__file__).parent / "results" / "save.json"
DEFAULT = "dcp.async_save, default"
HELPERS = "state-dict helpers + dcp.async_save"
#: After a first save the memory for later ones is made ready, once.
SETTLE_SECONDS = 15.0
#: Between preparing and the first save: a run saves after minutes.
PREPARED_SECONDS = 10.0

Waiter = Callable[[], Any]
Contender = Callable[[], Waiter]


def large_model(mib: int) -> nn.Module:
    """Transformer layers whose AdamW state is about ``mib`` MiB."""
    torch.manual_seed(0)
    width = 512
    layers = max(1, round(mib * (1 << 20) / (12 * width * width * 12)))
    return nn.Sequential(*(nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True) for _ in range(layers)))


def train(model: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        model(torch.randn(2, 16, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


class Bench:
    """Runs contenders in rounds and keeps (stall, durable) of each."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.numbers = count(1)
        self.stores: list[CheckpointStore] = []

    def store(self, name: str, **config: Any) -> CheckpointStore:
        store = CheckpointStore(self.folder / name, run="bench", config=StoreConfig(**config))
        self.stores.append(store)
        return store

    def path(self) -> Path:
        return self.folder / f"peer-{next(self.numbers)}"

    def run(self, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
        first = {name: self._once(save) for name, save in contenders.items()}
        time.sleep(SETTLE_SECONDS)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for round_number in range(self.rounds):
            for name in random.Random(round_number).sample(list(contenders), len(contenders)):
                samples[name].append(self._once(contenders[name]))
        return {
            name: {
                "first_stall_seconds": first[name][0],
                "stall_seconds": statistics.median(s for s, _ in values),
                "durable_seconds": statistics.median(d for _, d in values),
                "samples": values,
            }
            for name, values in samples.items()
        }

    def _once(self, save: Contender) -> tuple[float, float]:
        began = time.perf_counter()
        wait = save()
        stall = time.perf_counter() - began
        wait()
        durable = time.perf_counter() - began
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._tidy()
        if dist.is_initialized():
            dist.barrier()
        return stall, durable

    def _tidy(self) -> None:
        """Keep the disk and the page cache as they were."""
        for old in self.folder.glob("peer-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for store in self.stores:
            for info in store.checkpoints()[:-1]:
                store.delete(info.save_id)
        os.sync()

    def close(self) -> None:
        for store in self.stores:
            store.close()


def fsynced(path: Path, write: Callable[[Any], None]) -> Waiter:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return lambda: None


def dd_like(path: Path, memory: memoryview) -> Waiter:
    """The same number of bytes, written as fast as this disk takes them: O_DIRECT, 8 MiB blocks, fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600)
    try:
        os.posix_fallocate(fd, 0, len(memory))
        for at in range(0, len(memory), 8 << 20):
            os.pwrite(fd, memory[at : at + (8 << 20)], at)
        os.fsync(fd)
    finally:
        os.close(fd)
    return lambda: None


def async_default(state: dict[str, Any], path: Path, no_dist: bool = True) -> Waiter:
    return dcp.async_save(state, checkpoint_id=path, no_dist=no_dist).result


def copies(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in copies(value)]


def large(bench: Bench, mib: int) -> dict[str, Any]:
    """One rank, a large state."""
    import mmap

    from safetensors.torch import save_file

    model = large_model(mib)
    optimizer = train(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    prebuilt = {"model": model_state, "optimizer": optimizer_state}
    sources = [t.detach() for t in copies(prebuilt)]
    targets = [torch.zeros_like(t) for t in sources]
    size = sum(t.nbytes for t in sources)
    raw = mmap.mmap(-1, -(-size // (8 << 20)) * (8 << 20))
    for at in range(0, len(raw), 4096):
        raw[at] = 1
    flat = {str(i): t.contiguous() for i, t in enumerate(sources)}
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    plain, modules = bench.store("ours"), bench.store("ours-modules")
    overlapping = bench.store("ours-overlap", overlap=True)
    overlapping.guard(optimizer)
    live = {"model": model, "optimizer": optimizer}

    def memcpy() -> Waiter:
        torch._foreach_copy_(targets, sources)
        return lambda: None

    def best() -> Waiter:
        answer = dcp.async_save(
            prebuilt,
            checkpoint_id=bench.path(),
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=stager,
            no_dist=True,
        )
        return getattr(answer, "upload_completion", answer).result

    def helpers() -> Waiter:
        parts = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        return async_default(parts, bench.path())

    def stock() -> Waiter:
        dcp.save(prebuilt, checkpoint_id=bench.path(), no_dist=True)
        return lambda: None

    def safetensors() -> Waiter:
        path = bench.path()
        save_file(flat, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return lambda: None

    view = memoryview(raw)
    rows = bench.run(
        {
            "memcpy into warm memory": memcpy,
            "plain write + fsync": lambda: dd_like(bench.path(), view),
            "torch.save + fsync": lambda: fsynced(bench.path(), lambda file: torch.save(prebuilt, file)),
            "safetensors + fsync": safetensors,
            "dcp.save": stock,
            DEFAULT: lambda: async_default(prebuilt, bench.path()),
            "dcp.async_save, shared stager reused": best,
            HELPERS: helpers,
            "ckptstore, prebuilt state dict": lambda: plain.save(prebuilt, next(bench.numbers)).local.result,
            "ckptstore, model and optimizer": lambda: modules.save(live, next(bench.numbers)).local.result,
            "ckptstore, overlap": lambda: overlapping.save(live, next(bench.numbers)).local.result,
        }
    )
    ours, direct = rows["ckptstore, prebuilt state dict"], rows["ckptstore, model and optimizer"]

    def ratio(row: dict[str, Any], peer: str, figure: str = "stall_seconds") -> float:
        return float(row[figure] / rows[peer][figure])

    ratios = {
        "stall, prebuilt, vs async default": ratio(ours, DEFAULT),
        "stall, modules, vs helpers + async": ratio(direct, HELPERS),
        "stall, prebuilt, vs async with its stager reused": ratio(ours, "dcp.async_save, shared stager reused"),
        "stall, overlap, vs async default": ratio(rows["ckptstore, overlap"], DEFAULT),
        "stall, prebuilt, vs memcpy": ratio(ours, "memcpy into warm memory"),
        "durable vs dcp.save": ratio(ours, "dcp.save", "durable_seconds"),
        "durable vs torch.save + fsync": ratio(ours, "torch.save + fsync", "durable_seconds"),
        "durable vs safetensors + fsync": ratio(ours, "safetensors + fsync", "durable_seconds"),
        "durable vs plain write + fsync": ratio(ours, "plain write + fsync", "durable_seconds"),
    }
    return {"size_bytes": size, "tensors": len(sources), "rows": rows, "ratios": ratios}


def first(kind: str, bench: Bench, mib: int) -> dict[str, Any]:
    """The very first save of a process: no agent, no arena, nothing imported."""
    model = large_model(mib)
    optimizer = train(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    prebuilt = {"model": model_state, "optimizer": optimizer_state}
    before = pss_bytes(os.getpid())
    began = time.perf_counter()
    if kind == "async":
        wait = async_default(prebuilt, bench.path())
        stall = time.perf_counter() - began
        wait()
        return {"stall_seconds": stall}
    store = bench.store("ours-first")
    preparing = 0.0
    if kind == "prepared":
        store.prepare(prebuilt)
        preparing = time.perf_counter() - began
        time.sleep(PREPARED_SECONDS)  # training would go on meanwhile
        began = time.perf_counter()
    handle = store.save(prebuilt, 1)
    stall = time.perf_counter() - began
    if kind == "prepared":
        handle.wait("local")
        return {"stall_seconds": stall, "preparing_seconds": preparing}
    size = handle.wait("local").size_bytes
    with Memory(os.getpid(), store._session.link.client.agent_pid, before=before) as memory:
        for step in range(2, 6):
            store.save(prebuilt, step).wait("local")
    return {"stall_seconds": stall, "shard_bytes": size, "peak_extra_bytes": memory.extra_bytes}


def firsts(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    names = {
        "async": DEFAULT,
        "ours": "ckptstore, prebuilt state dict",
        "prepared": f"ckptstore, {PREPARED_SECONDS:.0f} s after prepare",
    }
    samples: dict[str, list[float]] = {kind: [] for kind in names}
    preparing: list[float] = []
    memory: dict[str, Any] = {}
    for round_number in range(args.rounds):
        for kind in random.Random(round_number).sample(list(samples), len(samples)):
            folder = bench.folder / f"{kind}-{round_number}"
            folder.mkdir()
            result = in_process(f"first-{kind}", args, folder)
            samples[kind].append(result.pop("stall_seconds"))
            if kind == "prepared":
                preparing.append(result.pop("preparing_seconds"))
            memory |= result
            shutil.rmtree(folder)
            os.sync()
    medians = {kind: statistics.median(values) for kind, values in samples.items()}
    rows = {name: {"first_stall_seconds": medians[kind], "samples": samples[kind]} for kind, name in names.items()}
    ratios = {
        "first stall vs first async default": medians["ours"] / medians["async"],
        "first stall after prepare vs first async default": medians["prepared"] / medians["async"],
    }
    return {**memory, "preparing_seconds": statistics.median(preparing), "rows": rows, "ratios": ratios}


def many_tensors(count: int) -> nn.Module:
    return nn.ModuleList(nn.ParameterList(torch.rand(64) for _ in range(100)) for _ in range(count // 100))


def small(bench: Bench, tensors: int = 10_000) -> dict[str, Any]:
    """Many small tensors; on several ranks they are FSDP2's."""
    model = many_tensors(tensors)
    is_sharded = dist.is_initialized()
    if is_sharded:
        from torch.distributed.fsdp import fully_shard

        for block in model:
            fully_shard(block)
    state = {"model": get_model_state_dict(model)}
    ours = bench.store("ours-small")
    planning: list[float] = []

    def save() -> Waiter:
        handle = ours.save(state, next(bench.numbers))

        def wait() -> None:
            info = handle.wait("local")
            planning.extend(sum(s.values()) - s["copy"] for s in spans_of(ours, info.save_id))

        return wait

    def peer() -> Waiter:
        return async_default(state, bench.folder / f"peer-{next(bench.numbers)}", no_dist=not is_sharded)

    rows = bench.run({DEFAULT: peer, "ckptstore": save})
    ratio = rows["ckptstore"]["stall_seconds"] / rows[DEFAULT]["stall_seconds"]
    return {
        "tensors": tensors,
        "everything_but_the_copy_seconds": statistics.median(planning),
        "rows": rows,
        "ratios": {"stall vs async default": ratio},
    }


def spans_of(store: CheckpointStore, save_id: str) -> list[dict[str, float]]:
    """What each rank noted of its save."""
    return list(noted(store, save_id)["ranks"].values())


def pss_bytes(*pids: int) -> int:
    """Memory that would be free without these processes: shared pages count once."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


class Memory:
    """The most memory these processes take meanwhile, beyond what was taken before."""

    def __init__(self, *pids: int, before: int) -> None:
        self.extra_bytes = 0
        self._pids, self._before = pids, before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.extra_bytes = max(self.extra_bytes, pss_bytes(*self._pids) - self._before)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def ranks(bench: Bench, kind: str, mib: int) -> dict[str, Any]:
    """Runs on each of several ranks: DDP or FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = large_model(mib)
    if kind == "fsdp2":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = train(model, 1)
    live = {"model": model, "optimizer": optimizer}
    ours = bench.store("ours-ranks")

    def peer() -> Waiter:
        parts = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        return async_default(parts, bench.folder / f"peer-{next(bench.numbers)}", no_dist=False)

    rows = bench.run({HELPERS: peer, "ckptstore": lambda: ours.save(live, next(bench.numbers)).local.result})
    ratios = {
        "stall vs helpers + async": rows["ckptstore"]["stall_seconds"] / rows[HELPERS]["stall_seconds"],
        "durable vs helpers + async": rows["ckptstore"]["durable_seconds"] / rows[HELPERS]["durable_seconds"],
    }
    return {"kind": kind, "world_size": dist.get_world_size(), "rows": rows, "ratios": ratios}


def training(bench: Bench, mib: int, threads: int, seconds: float = 25.0) -> dict[str, Any]:
    """Steps per second of a loop of so many threads, alone and with a save every 25 s that is written and uploaded."""
    torch.set_num_threads(threads)
    model = large_model(mib)
    optimizer = train(model, 1)
    bucket = f"file://{bench.folder}/sink"
    store = CheckpointStore(bench.folder / "ours-training", remote=bucket, run="bench")
    live = {"model": model, "optimizer": optimizer}
    store.save(live, next(bench.numbers)).remote.result(300)
    work = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    x = torch.randn(64, 1024)

    def loop(with_save: bool) -> float:
        began, steps = time.perf_counter(), 0
        if with_save:
            store.save(live, next(bench.numbers))
        while (spent := time.perf_counter() - began) < seconds:
            work(x).sum().backward()
            steps += 1
        return steps / spent

    pairs = [(loop(False), loop(True)) for _ in range(max(3, bench.rounds - 2))]
    store.wait("remote", timeout_s=600)
    store.close()
    return {
        "cpus": os.cpu_count(),
        "threads": threads,
        "pairs_steps_per_second": pairs,
        "ratios": {"slowdown": statistics.median(alone / with_save for alone, with_save in pairs)},
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in result.items() if isinstance(v, int | float | str)))
    if "rows" in result:
        columns = ["first_stall_seconds", "stall_seconds", "durable_seconds"]
        print(f"  {'':<44}{'first stall':>13}{'stall':>13}{'durable':>13}")
        for row, figures in result["rows"].items():
            cells = [f"{figures[column]:.3f} s" if column in figures else "" for column in columns]
            print(f"  {row:<44}" + "".join(f"{cell:>13}" for cell in cells))
    for ratio, value in result["ratios"].items():
        print(f"  {ratio:<56}{value:>9.3f}" + (f"  (1/{1 / value:.1f})" if value < 1 else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="large,first,small,small-fsdp2,ddp,fsdp2,training,training-full")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("ckptstore").addHandler(logging.StreamHandler())
    torch.set_num_threads(args.threads)
    if args.part:
        part(args)
        return
    results: dict[str, Any] = {}
    for name in args.only.split(","):
        folder = Path(tempfile.mkdtemp(prefix="ckptstore-bench-", dir=args.folder))
        bench = Bench(folder, args.rounds)
        load = os.getloadavg()[0]
        try:
            if name in ("ddp", "fsdp2", "small-fsdp2"):
                results[name] = in_process(name, args, folder, ranks=2)
            elif name == "large":
                results[name] = large(bench, args.mib)
            elif name == "first":
                results[name] = firsts(args, bench)
            elif name == "shares":
                results[name] = shares(folder, args.mib, args.rounds, partial(in_shares, args, folder), os.sync)
            elif name == "small":
                results[name] = small(bench)
            else:
                results[name] = training(bench, args.mib // 3, (os.cpu_count() or 1) if name == "training-full" else 1)
        finally:
            bench.close()
            shutil.rmtree(folder, ignore_errors=True)
        results[name]["load_1min_before"] = load
        show(name, results[name])
        document = {
            "schema_version": 2,
            "rounds": args.rounds,
            "threads": args.threads,
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "versions": {"torch": torch.__version__, "ckptstore": __version__},
            "results": results,
        }
        args.output.parent.mkdir(exist_ok=True)
        args.output.write_text(json.dumps(document, indent=1) + "\n")


def in_process(part: str, args: argparse.Namespace, folder: Path, ranks: int = 0) -> dict[str, Any]:
    """A part in a process of its own, or in ``ranks`` of them with one thread each."""
    output = folder / "result.json"
    threads = 1 if ranks else args.threads
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks else []
    command = [
        sys.executable, *torchrun, __file__, "--part", part, "--mib", str(args.mib), "--rounds", str(args.rounds),
        "--threads", str(threads), "--folder", str(folder), "--output", str(output),
    ]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, **({"OMP_NUM_THREADS": "1"} if ranks else {})})
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def in_shares(args: argparse.Namespace, folder: Path, number: int, ranks: int) -> list[float]:
    seconds: list[float] = in_process(f"shares-{number}", args, folder, ranks)["seconds"]
    return seconds


def part(args: argparse.Namespace) -> None:
    bench = Bench(args.folder / "part", args.rounds)
    if args.part.startswith("first-"):
        bench.folder.mkdir()
        args.output.write_text(json.dumps(first(args.part.removeprefix("first-"), bench, args.mib)))
        bench.close()
        return
    dist.init_process_group("gloo")
    bench.folder.mkdir(exist_ok=True)
    if args.part.startswith("shares-"):
        weights = list(SPLITS.values())[int(args.part.removeprefix("shares-"))]
        result = {"seconds": split(bench.store("shares"), weights, args.mib, bench._tidy)}
    elif args.part == "small-fsdp2":
        result = small(bench)
    else:
        result = ranks(bench, args.part, args.mib)
    if dist.get_rank() == 0:
        args.output.write_text(json.dumps(result))
    bench.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
