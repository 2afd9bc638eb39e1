"""What the manager costs and what it saves: overhead per step, and what is lost when a job is killed.

    python benchmarks/manager.py overhead              # one process, and 4 gloo ranks
    python benchmarks/manager.py kill --rounds 200     # kill -9 at random moments: lost steps against the interval
    python benchmarks/manager.py sigterm --rounds 100  # SIGTERM with 5 s grace: what is resumed, how long it took
    python benchmarks/manager.py disk --rounds 20      # the machine's disk is lost: lost steps against interval + lag

Writes ``benchmarks/results/manager_<what>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

RESULTS = Path(__file__).parent / "results"
EVERY = 5


def trainer(folder: str, seed: int, pipe: Connection, last: int, remote: str | None = None) -> None:
    """A job in a process of its own: 4 ms steps, saves every 5; tells each step it has done, and what is where."""
    import torch
    from torch import nn

    from ckptstore import CheckpointManager, StoreConfig

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    dice = random.Random(seed)
    weight = nn.Linear(200, 200)
    nn.init.zeros_(weight.weight)
    manager = CheckpointManager(
        folder,
        remote=remote,
        save_every_steps=EVERY,
        save_every_seconds=0,
        grace_seconds=5,
        keep_last=3,
        keep_best=0,
        config=StoreConfig(agent_idle_exit_seconds=1.0),
    ).track(model=weight)
    point = manager.resume()
    values = weight.weight.unique().tolist()
    pipe.send(("ready", point.step, values == [float(point.step)], bool(point.info and point.info.emergency)))
    with manager:
        for step in range(point.step + 1, last + 1):
            time.sleep(0.004 * dice.random() * 2)
            with torch.no_grad():
                weight.weight.add_(1.0)
            if (handle := manager.step(step)) is not None:
                pipe.send(("saved", step, time.monotonic()))
                if remote is not None:
                    handle.remote.add_done_callback(lambda future, step=step: tell(pipe, future, step))
            pipe.send(("step", step, time.monotonic()))


def tell(pipe: Connection, future: Any, step: int) -> None:
    """A save is in the bucket, unless it was superseded before its turn came."""
    if future.exception() is None and not future.result().skipped:
        pipe.send(("remote", step, time.monotonic()))


def lose(what: str, rounds: int) -> dict[str, Any]:
    """Rounds of start, strike, start again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ckptstore.manager"])
    dice = random.Random(0)
    found: list[dict[str, Any]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ckptstore-bench-") as folder:
            mine, theirs = context.Pipe(duplex=False)
            job = context.Process(target=trainer, args=(folder, number, theirs, 1_000_000))
            job.start()
            theirs.close()
            reached = saved = 0
            strike = 0.0
            try:
                while True:
                    word, step, *_ = mine.recv()
                    saved = step if word == "saved" else saved
                    reached = step if word == "step" else reached
                    if not strike and saved:
                        strike = time.monotonic() + dice.uniform(0, 0.4)
                    if strike and strike < time.monotonic():
                        break
            except EOFError:
                pass
            assert job.pid is not None
            os.kill(job.pid, signal.SIGKILL if what == "kill" else signal.SIGTERM)
            struck = time.monotonic()
            try:
                while True:
                    word, step, *_ = mine.recv()
                    reached = step if word == "step" else reached
            except EOFError:
                pass
            job.join(10)
            took, is_hung = time.monotonic() - struck, job.is_alive()
            if is_hung:
                job.kill()
            mine, theirs = context.Pipe(duplex=False)
            again = context.Process(target=trainer, args=(folder, number, theirs, 0))
            again.start()
            theirs.close()
            _, step, is_whole, is_emergency = mine.recv()
            again.join(20)
            found.append(
                {
                    "reached": reached,
                    "resumed": step,
                    "lost": reached - step,
                    "whole": is_whole,
                    "emergency": is_emergency,
                    "hung": is_hung,
                    "seconds": round(took, 3),
                    "exit_code": job.exitcode,
                }
            )
    return {
        "rounds": rounds,
        "interval": EVERY,
        "within_one_interval": sum(r["lost"] <= EVERY and r["whole"] for r in found),
        "emergency": sum(r["emergency"] for r in found),
        "hung": sum(r["hung"] for r in found),
        "longest_seconds": max(r["seconds"] for r in found),
        "most_lost": max(r["lost"] for r in found),
        "details": found,
    }


def lose_disk(rounds: int) -> dict[str, Any]:
    """Rounds of start, kill everything at a random moment and remove the local tier, start again from the bucket.

    The lag at the loss is the age of the oldest save that the bucket had not confirmed. What may be lost is the steps
    done within that lag, and the interval before it.
    """
    from contextlib import suppress

    from ckptstore.agent.runtime import RuntimeDir

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ckptstore.manager"])
    dice = random.Random(0)
    found: list[dict[str, Any]] = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ckptstore-bench-") as folder:
            local, remote = Path(folder, "disk"), f"file://{folder}/bucket/prefix"
            Path(folder, "bucket").mkdir()
            mine, theirs = context.Pipe(duplex=False)
            job = context.Process(target=trainer, args=(str(local), number, theirs, 1_000_000, remote))
            job.start()
            theirs.close()
            told: dict[str, dict[int, float]] = {"step": {}, "saved": {}, "remote": {}}
            strike = math.inf
            while time.monotonic() < strike:
                if not mine.poll(0.01):
                    continue
                word, step, when, *_ = mine.recv()
                told.setdefault(word, {})[step] = when
                if word == "remote":
                    strike = min(strike, time.monotonic() + dice.uniform(0, 2.0))
            assert job.pid is not None
            agent = int(RuntimeDir.of(local).lock.read_text())
            for pid in (job.pid, agent):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            struck = time.monotonic()
            with suppress(EOFError):
                while True:
                    word, step, when, *_ = mine.recv()
                    told.setdefault(word, {})[step] = when
            job.join(10)
            shutil.rmtree(local)
            mine, theirs = context.Pipe(duplex=False)
            again = context.Process(target=trainer, args=(str(local), number, theirs, 0, remote))
            again.start()
            theirs.close()
            _, resumed, is_whole, _ = mine.recv()
            again.join(60)
            reached, confirmed = max(told["step"]), max(told["remote"])
            waiting = [when for step, when in told["saved"].items() if step > confirmed]
            lag = struck - min(waiting) if waiting else 0.0
            in_lag = sum(when >= struck - lag for when in told["step"].values())
            took = [when - told["saved"][step] for step, when in told["remote"].items()]
            found.append(
                {
                    "reached": reached,
                    "confirmed": confirmed,
                    "resumed": resumed,
                    "lost": reached - resumed,
                    "lag_seconds": round(lag, 3),
                    "steps_in_lag": in_lag,
                    "median_upload_seconds": round(statistics.median(took), 3),
                    "whole": is_whole,
                }
            )
    return {
        "rounds": rounds,
        "interval": EVERY,
        "within_interval_and_lag": sum(r["lost"] <= EVERY + r["steps_in_lag"] and r["whole"] for r in found),
        "most_lost": max(r["lost"] for r in found),
        "longest_lag_seconds": max(r["lag_seconds"] for r in found),
        "confirmed_and_gone": sum(r["resumed"] < r["confirmed"] for r in found),
        "details": found,
    }


def overhead() -> dict[str, Any]:
    """Seconds per ``step()`` with no save due, 50 ms steps for the ranks."""
    import torch
    from manager_jobs import overhead as on_ranks
    from ranks import run_ranks
    from training import manager

    with tempfile.TemporaryDirectory() as folder:
        m = manager(Path(folder), save_every_steps=10**9, save_every_seconds=3600).track(w=torch.zeros(2))
        with m:
            m.step(1)
            began = time.perf_counter()
            for step in range(2, 20_002):
                m.step(step, epoch=1, metrics={"loss": 1.0})
            alone = (time.perf_counter() - began) / 20_000
        ranks = run_ranks(4, on_ranks, Path(folder) / "ranks", 0.05, 240)
    return {
        "one_process_seconds_per_step": alone,
        "one_process_share_of_50_ms": alone / 0.05,
        "four_ranks_median_seconds_per_step": max(r[0] for r in ranks),
        "four_ranks_mean_seconds_per_step": max(r[1] for r in ranks),
        "four_ranks_asked_every": ranks[0][2],
    }


def main() -> None:
    """Run one of them and write its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["overhead", "kill", "sigterm", "disk"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if args.what == "overhead":
        result = overhead()
    elif args.what == "disk":
        result = lose_disk(args.rounds)
    else:
        result = lose(args.what, args.rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"manager_{args.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "details"}, indent=1))


if __name__ == "__main__":
    main()
