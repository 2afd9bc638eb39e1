"""Runs a function on several gloo ranks, each a process of its own, and gives back what each returned or raised.

The job's key-value store lives in the test process, as it lives in torchrun's agent, so it survives any rank.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "ckptstore.dcp.loader", "ckptstore.dcp.prepare"])

#: What a rank that was killed "returns".
DEAD = "dead"


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """``function(rank, *args)`` on every rank; results by rank, exceptions as values, :data:`DEAD` for a dead one.

    ``function`` lives at the top level of an importable module.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(rank, world_size, store.port, theirs, function, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    results: list[Any] = []
    try:
        for pipe in pipes:
            try:
                here = pipe.poll(timeout_s)
                results.append(pickle.loads(pipe.recv_bytes()) if here else TimeoutError("the rank did not end"))
            except EOFError:
                results.append(DEAD)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _rank(
    rank: int, world_size: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TORCH_DIST_INIT_BARRIER"] = "0"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("job", store), rank=rank, world_size=world_size)
    try:
        result = function(rank, *args)
    except BaseException as error:
        if os.environ.get("CKPTSTORE_TEST_TRACE"):
            traceback.print_exc()
        result = error
        result.__cause__ = result.__context__ = None
    pipe.send_bytes(pickle.dumps(result))  # not send(): that would share tensors through files of a process that ends
    pipe.close()
    # No orderly shutdown: peers may be dead or stuck on purpose.
    os._exit(0)
