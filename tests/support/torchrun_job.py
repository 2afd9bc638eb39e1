"""A training job for ``torchrun``: ``torchrun_job.py ROOT BUCKET FOLDER [torn]``, one such command a node.

Resumes from wherever the state is, makes a step of training, saves it to the bucket, and writes to FOLDER, a file a
rank, what it found and what it left. With ``torn`` it has no bucket, makes one more step, and is killed when the first
node has committed that and the others, whose agents die too, have not.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from store_jobs import QUICK, fingerprint, make

from ckptstore import CheckpointStore, per_rank
from ckptstore.store import nodes


def main(root: str, bucket: str, folder: str, end: str = "") -> None:
    torch.set_num_threads(1)
    host = os.environ["SIMULATED_HOST"]
    mock.patch.object(nodes, "_machine", return_value=host).start()  # ends with this process
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer = make("fsdp", seed=1 + rank)
    odd = torch.zeros(1013, dtype=torch.bfloat16)
    mine: dict[str, Any] = {"rank": rank}
    state = {"model": model, "optimizer": optimizer, "odd": odd, "step": 0, "mine": per_rank(mine)}

    def bits() -> str:
        return fingerprint(model, optimizer) + hashlib.sha256(odd.view(torch.uint8).numpy().tobytes()).hexdigest()

    with CheckpointStore(root, None if end == "torn" else bucket, config=QUICK) as store:
        info = store.load(state, missing_ok=True)
        report = info.report if info is not None else None
        said: dict[str, Any] = {
            "step": state["step"],
            "found": bits(),
            "mine": mine["rank"],
            "sources": dict(report.bytes_by_source) if report is not None else {},
        }

        def train() -> None:
            torch.manual_seed(state["step"])
            model(torch.randn(4, 33)).square().mean().backward()
            optimizer.step()
            odd.copy_(torch.randn(1013))
            state["step"] += 1
            mine["rank"] = rank

        def tell() -> None:
            said["left"] = bits()
            (Path(folder) / f"{rank}.json").write_text(json.dumps(said))

        train()
        store.save(state, state["step"]).wait("local" if end == "torn" else "remote")
        session: Any = store._session
        topology = session.link.topology
        said["node"], said["num_nodes"] = topology.node, topology.num_nodes
        if end == "torn":
            train()
            _commit_on_the_first_node_only(session, Path(root), Path(folder), lambda: store.save(state, 2), tell)
        tell()
    dist.barrier()
    dist.destroy_process_group()


def _commit_on_the_first_node_only(
    session: Any, root: Path, folder: Path, save: Callable[[], object], tell: Callable[[], None]
) -> None:
    """Save, and die between the two commits."""
    is_first, agent = session.link.topology.node == 0, session.link.client.agent_pid
    if not is_first:
        session.link.client.complete = lambda *_: None  # its agent never hears that all nodes are prepared
    save()
    tell()
    committed = folder / "committed"
    while not (committed.exists() or (is_first and list(root.glob("*/step-0000000002-*/manifest.json")))):
        time.sleep(0.01)
    committed.touch()
    if not is_first:
        os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
