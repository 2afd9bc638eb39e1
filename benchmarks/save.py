"""How long a save holds up training, and how long until it is on disk, against the peers, in one run.

    python benchmarks/save.py [--mib 1536] [--rounds 5] [--threads 2] [--folder DIR]

One process, genuine AdamW training state (weights, gradients applied, both moments). Every round runs every contender
once, in a shuffled order, so that drift of the machine hits all alike; figures are medians, ratios are of medians.
``stall`` is the time the call holds the training thread; ``durable`` the time from the call until the bytes are fsynced
(for stock DCP: until its own call or future is done, although a power cut still loses that result).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ckptstore import CheckpointStore, __version__

RESULTS = Path(__file__).parent / "results" / "save.json"


def training_state(mib: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A stack of transformer layers after three real AdamW steps; about ``mib`` MiB of weights and moments."""
    torch.manual_seed(0)
    width = 512
    per_layer = 12 * width * width * 12  # parameters * (4 bytes of weight + 8 of moments)
    layers = max(1, round(mib * (1 << 20) / per_layer))
    layer = lambda: nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)  # noqa: E731
    model = nn.Sequential(*(layer() for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        loss = model(torch.randn(2, 16, width)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def timed(call: Callable[[], Callable[[], Any]]) -> tuple[float, float]:
    """(stall, durable) seconds; ``call`` returns what waits for durability."""
    began = time.perf_counter()
    wait = call()
    stall = time.perf_counter() - began
    wait()
    return stall, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="ckptstore-bench-", dir=args.folder))
    model, optimizer = training_state(args.mib)
    from torch.distributed.checkpoint.state_dict import get_state_dict

    prebuilt_model, prebuilt_optimizer = get_state_dict(model, optimizer)
    prebuilt = {"model": prebuilt_model, "optimizer": prebuilt_optimizer}
    size = sum(p.numel() * 4 * 3 for p in model.parameters())
    store = CheckpointStore(folder / "ours", run="bench")
    modules_store = CheckpointStore(folder / "ours-modules", run="bench")
    counter = iter(range(1, 1 << 30))

    def torch_save() -> Callable[[], Any]:
        path = folder / "torch.pt"
        with path.open("wb") as file:
            torch.save(prebuilt, file)
            file.flush()
            os.fsync(file.fileno())
        return lambda: None

    def dcp_save() -> Callable[[], Any]:
        dcp.save(prebuilt, checkpoint_id=folder / f"dcp-{next(counter)}", no_dist=True)
        return lambda: None

    def dcp_async() -> Callable[[], Any]:
        future = dcp.async_save(prebuilt, checkpoint_id=folder / f"async-{next(counter)}", no_dist=True)
        return future.result

    def ours_prebuilt() -> Callable[[], Any]:
        return store.save(prebuilt, next(counter)).local.result

    def ours_modules() -> Callable[[], Any]:
        return modules_store.save({"model": model, "optimizer": optimizer}, next(counter)).local.result

    def memcpy() -> Callable[[], Any]:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return lambda: None

    sources = list(model.parameters()) + [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    sources = [t.detach() for t in sources]
    targets = [torch.zeros_like(t) for t in sources]
    contenders = {
        "memcpy into warm memory": memcpy,
        "torch.save + fsync": torch_save,
        "dcp.save": dcp_save,
        "dcp.async_save (default)": dcp_async,
        "ckptstore, prebuilt state dict": ours_prebuilt,
        "ckptstore, model and optimizer": ours_modules,
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    first = {name: timed(contenders[name]) for name in contenders}
    for round_number in range(args.rounds):
        for name in random.Random(round_number).sample(list(contenders), len(contenders)):
            samples[name].append(timed(contenders[name]))
            for old in [*folder.glob("dcp-*"), *folder.glob("async-*")]:
                shutil.rmtree(old)
            for each in (store, modules_store):
                for info in each.checkpoints()[:-1]:
                    each.delete(info.save_id)
    store.close()
    modules_store.close()
    shutil.rmtree(folder)

    medians = {
        name: {
            "first_stall_seconds": first[name][0],
            "stall_seconds": statistics.median(s for s, _ in values),
            "durable_seconds": statistics.median(d for _, d in values),
        }
        for name, values in samples.items()
    }
    ours = medians["ckptstore, prebuilt state dict"]
    ratios = {
        "stall vs dcp.async_save": ours["stall_seconds"] / medians["dcp.async_save (default)"]["stall_seconds"],
        "stall vs memcpy": ours["stall_seconds"] / medians["memcpy into warm memory"]["stall_seconds"],
        "durable vs dcp.save": ours["durable_seconds"] / medians["dcp.save"]["durable_seconds"],
        "durable vs torch.save+fsync": ours["durable_seconds"] / medians["torch.save + fsync"]["durable_seconds"],
        "first stall vs dcp.async_save": ours["first_stall_seconds"]
        / medians["dcp.async_save (default)"]["first_stall_seconds"],
    }
    print(f"{size / 1e9:.2f} GB of AdamW state, {args.rounds} rounds, {args.threads} threads, medians")
    print(f"{'':<34}{'first stall':>12}{'stall':>10}{'durable':>10}")
    for name, row in medians.items():
        stall, durable = row["stall_seconds"], row["durable_seconds"]
        print(f"{name:<34}{row['first_stall_seconds']:>10.3f} s{stall:>8.3f} s{durable:>8.3f} s")
    for name, ratio in ratios.items():
        print(f"{name:<34}{ratio:>10.3f}")
    args.output.parent.mkdir(exist_ok=True)
    document = {
        "schema_version": 1,
        "size_bytes": size,
        "rounds": args.rounds,
        "threads": args.threads,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load_1min": os.getloadavg()[0]},
        "versions": {"torch": torch.__version__, "ckptstore": __version__},
        "medians": medians,
        "ratios": ratios,
        "samples": samples,
    }
    args.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
