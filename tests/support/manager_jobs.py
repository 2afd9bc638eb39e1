"""What ranks run in the manager's distributed tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from training import Training, manager

from ckptstore import CheckpointManager, Preempted
from ckptstore.errors import ConfigError
from ckptstore.format.manifest import ShardManifest
from ckptstore.manager import ResumableLoader
from ckptstore.policy import AtSteps, EverySeconds


def train(rank: int, folder: Path, last: int, save_at: tuple[int, ...], seed: int, resume: bool) -> dict[str, bytes]:
    """DDP training to ``last``; what must be equal bit for bit."""
    job = Training(seed, rank=rank, ddp=True)
    m = job.track(manager(folder, policy=AtSteps(save_at)))
    if resume:
        assert m.resume().step == save_at[-1]
    with m:
        job.run(m, last)
    job.noise[:] = job.noise[-3:]
    return job.bits()


def signalled(rank: int, folder: Path, victim: int, step_s: float) -> tuple[int | None, int, float, int]:
    """One rank gets SIGTERM in mid-run: exit code, the last local step, seconds until the end, the last step done."""
    model = nn.Linear(4, 4)
    m = manager(folder, save_every_steps=0, grace_seconds=10).track(model=model)
    done, sent, code = 0, 0.0, None
    random.seed(rank)
    try:
        with m:
            for step in range(1, 2000):
                time.sleep(step_s * random.random() * 2)
                done = step
                m.step(step)
                if step == 30:
                    sent = time.monotonic()
                    if rank == victim:
                        os.kill(os.getpid(), signal.SIGTERM)
    except Preempted as preempted:
        code = int(preempted.code or 0)
    took = time.monotonic() - sent
    return code, max(m._block._parts.safety.steps.values(), default=-1), took, done


def timed(rank: int, folder: Path) -> list[int]:
    """Time is due at different moments by each rank's clock; the steps saved."""
    m = manager(folder, policy=EverySeconds(0.4), keep_last=50).track(w=torch.zeros(2))
    if rank:
        m._progress.clock = lambda: 0.0  # this rank's clock stands still: it must not matter
    with m:
        return [step for step in range(1, 150) if (time.sleep(0.01), m.step(step))[1] is not None]


def drifting(rank: int, folder: Path) -> list[int]:
    """Rank 0 evaluates alone, longer than any deadline of a save; nobody may be thrown out."""
    m = manager(folder, save_every_steps=50, keep_last=9).track(w=torch.zeros(2))
    saved = []
    with m:
        for step in range(1, 101):
            time.sleep(0.005)
            if step == 60 and rank == 0:
                time.sleep(18)  # the deadline is 15 s
            dist.barrier()  # as training does
            if m.step(step) is not None:
                saved.append(step)
    return saved


def raising(rank: int, folder: Path, who: tuple[int, ...]) -> tuple[str, float, int]:
    """These ranks raise after step 7; what is resumed by a look at the store."""
    m = manager(folder, save_every_steps=5).track(w=torch.full((2,), 1.0))
    began = 0.0
    try:
        with m:
            for step in range(1, 30):
                m.step(step)
                if step == 7:
                    if rank in who:
                        began = time.monotonic()
                        raise ValueError("loss is bad")
                    time.sleep(25)  # in a collective, waiting for the rank that raised
                    os._exit(9)
    except ValueError as error:
        return str(error), time.monotonic() - began, m.store.latest().step  # type: ignore[union-attr]
    return "", 0.0, 0


def bereaved(rank: int, folder: Path) -> tuple[int | None, float, int]:
    """Rank 1 dies after a save; rank 0 gets SIGTERM some time later: exit code, seconds it took, newest step."""
    m = manager(folder, policy=AtSteps((20,))).track(w=torch.zeros(2))
    sent, code = 0.0, None
    try:
        with m:
            for step in range(1, 3000):
                time.sleep(0.01)
                m.step(step)
                if step == 40 and rank == 1:
                    m.store.wait("local")
                    os._exit(1)
                if step == 400:
                    sent = time.monotonic()
                    os.kill(os.getpid(), signal.SIGTERM)
    except Preempted as preempted:
        code = int(preempted.code or 0)
    return code, time.monotonic() - sent, m._block._parts.safety.steps.get("local", -1)


def resized(rank: int, folder: Path, resume: bool) -> tuple[Any, list[float]]:
    """Per-rank state and random numbers over a change of the world size."""
    torch.manual_seed(1000 + rank)
    seen = [rank]
    w = torch.zeros(8)
    m = manager(folder).track(w=w, seen=seen)
    if not resume:
        w += 1
        torch.rand(3)
        with m:
            m.save_checkpoint(global_step=5)
        return seen, torch.rand(2).tolist()
    m.resume()
    return seen, torch.rand(2).tolist()


def overhead(rank: int, folder: Path, step_s: float, steps: int) -> tuple[float, float, int]:
    """Seconds per ``step()`` with no save due: the median, the mean, and how often the ranks were asked at the end."""
    m = manager(folder, save_every_steps=0, save_every_seconds=3600).track(w=torch.zeros(2))
    spent = []
    with m:
        for step in range(1, steps + 1):
            time.sleep(step_s)
            began = time.perf_counter()
            m.step(step)
            spent.append(time.perf_counter() - began)
        every = m._agenda.every if m._agenda else 0
    settled = spent[steps // 3 :]
    return float(np.median(settled)), float(np.mean(settled)), every


def told_apart(rank: int, folder: Path) -> tuple[int, str]:
    """Rank 0's environment has a setting and then a remote that the other's lacks: what is in force, what is said."""
    os.chdir(folder)
    if rank == 0:
        os.environ["CKPTSTORE_CONFIG__CHUNK_ELEMENTS"] = "2048"
    m = CheckpointManager(folder / "a").track(w=torch.zeros(2))
    m.save_checkpoint(global_step=1)
    chunk_elements = m.store._session.config.chunk_elements  # type: ignore[union-attr]
    m.close()
    if rank == 0:
        os.environ["CKPTSTORE_REMOTE"] = f"file://{folder}/bucket"
    try:
        CheckpointManager(folder / "b").track(w=torch.zeros(2)).save_checkpoint(global_step=1)
    except ConfigError as error:
        return chunk_elements, error.message
    return chunk_elements, ""


def struck(rank: int, folder: Path) -> tuple[int | None, int, int, int]:
    """SIGTERM to every process of the job: exit code, the newest step, workers that live, the last step done."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # which may have children
    loader = ResumableLoader(DataLoader(TensorDataset(torch.zeros(4000)), batch_size=1, num_workers=2))
    m = manager(folder, save_every_steps=0).track(w=torch.zeros(2), dataloader=loader)
    alive, done, code = 0, 0, None
    batches = iter(loader)
    try:
        with m:
            for step, _ in enumerate(batches, start=1):
                time.sleep(0.01)
                dist.barrier()  # as training does: no rank goes on without the other
                done = step
                m.step(step)
                if step == 30:
                    workers = multiprocessing.active_children()
                    for pid in [os.getpid(), *(worker.pid for worker in workers)]:
                        os.kill(pid, signal.SIGTERM)  # type: ignore[arg-type]
    except Preempted as preempted:
        code = int(preempted.code or 0)
        alive = len(multiprocessing.active_children())
    util._exit_function()  # type: ignore[attr-defined]  # as at the end of a process: must not hang
    return code, m._block._parts.safety.newest() or 0, alive, done


def fall_back(rank: int, folder: Path) -> tuple[int, bool]:
    """The newest save is damaged where only rank 1 reads: the step resumed, and whether its values are there."""
    model = nn.Linear(64, 6, bias=False)
    fully_shard(model)
    with manager(folder, save_every_steps=0).track(model=model) as m:
        for step in (1, 2):
            nn.init.constant_(model.weight, float(step))
            m.save_checkpoint(global_step=step).wait("local")
    dist.barrier()
    if rank == 1:
        (file,) = folder.glob("default/step-*2-*/__1_0.distcp")
        shard = ShardManifest.decode((file.parent / "shard-00001.json").read_bytes(), what="shard")
        data = bytearray(file.read_bytes())
        for piece in shard.pieces:
            data[piece.start] ^= 1
        file.write_bytes(data)
    dist.barrier()
    nn.init.zeros_(model.weight)
    m = manager(folder).track(model=model)
    point = m.resume()
    m.close()
    return point.step, bool((model.weight.full_tensor() == point.step).all())
