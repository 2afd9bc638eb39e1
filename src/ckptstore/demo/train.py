"""The demo's training script, as a user would write it: FSDP2 under torchrun, `store.save` every few steps.

Run by the director as ``torchrun --nproc-per-node N -m ckptstore.demo.train ...``. Rank 0 appends one JSON line per
step to ``--journal``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import sysconfig
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from ckptstore import CheckpointInfo, CheckpointStore
from ckptstore.demo.model import GPT, GPTConfig

GLOBAL_BATCH = 6  # divisible by 1, 2 and 3 ranks


def corpus(limit_bytes: int = 4 << 20) -> torch.Tensor:
    """Real text that every machine with Python has: the sources of its standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


def batch(data: torch.Tensor, generator: torch.Generator, block: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """This rank's rows of the next global batch, and each row's own dropout generator."""
    starts = torch.randint(len(data) - block - 1, (GLOBAL_BATCH,), generator=generator).tolist()
    seeds = torch.randint(2**31, (GLOBAL_BATCH,), generator=generator).tolist()
    rows = GLOBAL_BATCH // dist.get_world_size()
    mine = range(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    text = torch.stack([data[starts[i] : starts[i] + block + 1] for i in mine]).long()
    return text[:, :-1], text[:, 1:], [torch.Generator().manual_seed(seeds[i]) for i in mine]


def main() -> int:
    """Train to ``--steps``; resume from the newest checkpoint unless ``--fresh``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", help="local tier; without it nothing is saved")
    parser.add_argument("--bucket", help="bucket URL")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--no-save", action="store_true", help="resume, but leave the run as it is")
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.999**step)
    sampler = torch.Generator().manual_seed(1234)
    data = corpus()

    def log(**fields: Any) -> None:
        if rank == 0:
            with args.journal.open("a") as file:
                file.write(json.dumps(fields) + "\n")

    def reached(level: str, step: int, called: float, future: Future[CheckpointInfo]) -> None:
        if future.exception() is None:
            log(event=level, step=step, lag_seconds=time.time() - called, bytes=future.result().size_bytes)

    store = CheckpointStore(args.store, remote=args.bucket, run="demo") if args.store else None
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "sampler": sampler.get_state(),
        "step": 0,
    }
    if store is not None:
        began = time.perf_counter()
        info = store.load(state, missing_ok=True)
        if info is not None:
            sampler.set_state(state["sampler"])
            log(event="resumed", step=info.step, seconds=time.perf_counter() - began)

    for step in range(state["step"] + 1, args.steps + 1):
        tokens, targets, generators = batch(data, sampler, config.block)
        model.use_generators(generators)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        log(event="step", step=step, loss=mean.item(), bits=mean.numpy().tobytes().hex())
        if store is not None and not args.no_save and step % args.save_every == 0:
            state.update(step=step, sampler=sampler.get_state())
            began = time.perf_counter()
            handle = store.save(state, step, metrics={"loss": mean})
            stall = time.perf_counter() - began
            log(event="saved", step=step, stall_seconds=stall)
            for level in ("local", "remote") if args.bucket else ("local",):
                getattr(handle, level).add_done_callback(functools.partial(reached, level, step, time.time()))
    log(event="done", step=args.steps)
    if store is not None:
        store.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
