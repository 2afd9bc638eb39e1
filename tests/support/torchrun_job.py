"""A training job for ``torchrun``: ``torchrun_job.py ROOT BUCKET FOLDER``, one such command a node.

Resumes from wherever the state is, makes a step of training, saves it to the bucket, and writes to FOLDER, a file a
rank, what it found and what it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from store_jobs import QUICK, fingerprint, make

from ckptstore import CheckpointStore, per_rank
from ckptstore.store import nodes


def main(root: str, bucket: str, folder: str) -> None:
    torch.set_num_threads(1)
    host = os.environ["SIMULATED_HOST"]
    setattr(nodes, "_machine", lambda: host)  # noqa: B010 - of this process alone, which plays one node
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer = make("fsdp", seed=1 + rank)
    odd = torch.zeros(1013, dtype=torch.bfloat16)
    mine: dict[str, Any] = {"rank": rank}
    state = {"model": model, "optimizer": optimizer, "odd": odd, "step": 0, "mine": per_rank(mine)}

    def bits() -> str:
        return fingerprint(model, optimizer) + hashlib.sha256(odd.view(torch.uint8).numpy().tobytes()).hexdigest()

    with CheckpointStore(root, bucket, config=QUICK) as store:
        info = store.load(state, missing_ok=True)
        report = info.report if info is not None else None
        said: dict[str, Any] = {
            "step": state["step"],
            "found": bits(),
            "mine": mine["rank"],
            "sources": dict(report.bytes_by_source) if report is not None else {},
        }
        torch.manual_seed(state["step"])
        model(torch.randn(4, 33)).square().mean().backward()
        optimizer.step()
        odd.copy_(torch.randn(1013))
        state["step"] += 1
        mine["rank"] = rank
        store.save(state, state["step"], wait="remote")
        said["left"] = bits()
        session: Any = store._session
        topology = session.link.topology
        said["node"], said["num_nodes"] = topology.node, topology.num_nodes
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
