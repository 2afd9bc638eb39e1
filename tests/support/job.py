"""A training script to be killed in: ``python job.py FOLDER [--option]``. Says where it is on stdout, a line each.

The steps are slow enough to be hit and the state is checked: the weight is the step number, in every element.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptstore import CheckpointManager, StoreConfig


def say(word: str, **facts: object) -> None:
    os.write(1, f"{word} {json.dumps(facts)}\n".encode())  # at once: two threads speak


class Count(torch.optim.Optimizer):
    """Adds one to every element: a state that tells which step it is of."""

    def __init__(self, model: nn.Module, break_at: int, worker_dies_at: int) -> None:
        super().__init__(model.parameters(), {})
        self.break_at, self.worker_dies_at = break_at, worker_dies_at

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for number, parameter in enumerate(self.param_groups[0]["params"]):
                step = self.state.setdefault(parameter, {}).get("n", 0) + 1
                if number == 1 and step == self.break_at:
                    raise RuntimeError("broke in the middle of a step")
                if number == 1 and step == self.worker_dies_at:
                    kill_a_worker()
                parameter.add_(1.0)
                self.state.setdefault(parameter, {}).setdefault("n", 0)
                self.state[parameter]["n"] += 1


def kill_a_worker() -> None:
    """Returns once it is dead, and this process has been told."""
    worker = multiprocessing.active_children()[0]
    worker.kill()
    worker.join()


def stuck_in_c() -> None:
    """As a collective whose peer is gone: no Python runs in this thread any more."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--grace", type=float, default=25.0)
    parser.add_argument("--elements", type=int, default=1000)
    parser.add_argument("--remote")
    parser.add_argument("--at", type=int, default=0, help="step after which --then happens")
    parser.add_argument("--then", choices=["sleep", "c", "raise", "child", "end"], default="end")
    parser.add_argument("--break-at", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--worker-dies-at", type=int, default=0, help="in the middle of this optimizer step")
    parser.add_argument("--own-handler", action="store_true")
    parser.add_argument("--no-save-on-exception", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = nn.ParameterList([torch.zeros(args.elements), torch.zeros(args.elements)])
    optimizer = Count(model, args.break_at, args.worker_dies_at)
    if args.own_handler:
        signal.signal(signal.SIGTERM, lambda number, frame: say("own handler", number=number))
    before = signal.getsignal(signal.SIGTERM)
    manager = CheckpointManager(
        args.folder,
        remote=args.remote,
        save_every_steps=args.every,
        save_every_seconds=0,
        grace_seconds=args.grace,
        keep_last=3,
        keep_best=0,
        config=StoreConfig(agent_idle_exit_seconds=2.0),
        save_on_exception=not args.no_save_on_exception,
    )
    manager.track(model=model, optimizer=optimizer)
    point = manager.resume()
    values = {float(p.detach().min()) for p in model} | {float(p.detach().max()) for p in model}
    say("ready", step=point.step, values=sorted(values), emergency=bool(point.info and point.info.emergency))
    data = TensorDataset(torch.zeros(1 << 16))
    batches = iter(DataLoader(data, batch_size=1, num_workers=args.workers)) if args.workers else itertools.repeat(None)
    with manager:
        for step in range(point.step + 1, args.steps + 1):
            next(batches)
            time.sleep(args.step_seconds)
            optimizer.step()
            handle = manager.step(step)
            if handle is not None:
                handle.local.add_done_callback(lambda f, s=step: None if f.exception() else say("local", step=s))
            if step % 5 == 0:
                say("step", step=step)
            if step == args.at:
                say("then", step=step)
                if args.then == "sleep":
                    time.sleep(600)
                elif args.then == "c":
                    stuck_in_c()
                elif args.then == "raise":
                    raise ValueError("the loss exploded")
                elif args.then == "child":
                    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
                    child.start()
                    child.terminate()
                    child.join()
                    say("child", code=child.exitcode)
                else:
                    break
    say("done", restored=signal.getsignal(signal.SIGTERM) is before)


if __name__ == "__main__":
    main()
    sys.exit(0)
