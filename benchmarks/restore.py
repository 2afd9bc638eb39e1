"""How long it takes to have a training state back, against the peers, in one run.

    python benchmarks/restore.py [--mib 1536] [--rounds 5] [--only local,warm,fresh,delta,part,memory,ranks]

About ten minutes on two free cores.

Genuine AdamW training state (weights and both moments after real steps), loaded into a model and optimizer that exist
and have been stepped. In every round every contender runs once, in a shuffled order; figures are medians, ratios are of
medians. *Cold*: the files' pages are dropped from the cache before. *Fresh node*: nothing local, all from a real S3
server on loopback (SeaweedFS). Every byte we load is verified; stock formats are not. Bytes fetched are counted by a
proxy in front of the server. *Warm*: a trainer saved and was killed, its node's agent still holds the save in memory.

The figures that count are printed at the end, and stand under ``figures`` in the results, with what they must be.

``s3torchconnector`` takes part if it is installed; it is no dependency of this project.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from save import large_model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from ckptstore import CheckpointStore, StoreConfig, __version__
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.remote import RemoteTier
from ckptstore.testing.s3_server import SeaweedServer

RESULTS = Path(__file__).parent / "results" / "restore.json"
_BOTO3, _CONNECTOR = "boto3 download of dcp.save's files", "s3torchconnector's reader"
Load = Callable[[], object]
#: (what must be done before, what is timed)
Contender = tuple[Callable[[], object], Load]


class CountingProxy:
    """Passes TCP on and counts the bytes that come back."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self._upstream = host, int(port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.received_bytes = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            server = socket.create_connection(self._upstream)
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                target.sendall(data)
                if is_answer:
                    with self._lock:
                        self.received_bytes += len(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def drop_pages(folder: Path) -> None:
    """Make the files below a folder cold."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def nothing() -> None:
    """No preparation."""


def run(contenders: dict[str, Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Median wall and CPU seconds of each (this process's); the first run of each is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            before, load = contenders[name]
            before()
            gc.collect()
            began, cpu_began = time.perf_counter(), time.process_time()
            load()
            if number:
                samples[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - cpu_began)
    return {
        name: {"seconds": statistics.median(values), "cpu_seconds": statistics.median(cpu[name]), "samples": values}
        for name, values in samples.items()
    }


class State:
    """A trained model and its optimizer."""

    def __init__(self, mib: int) -> None:
        self.model: nn.Module = large_model(mib)
        self.optimizer = train(self.model)

    @property
    def tree(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def stock(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def step_again(self, steps: int = 10) -> None:
        for _ in range(steps):
            self.model(torch.randn(2, 16, 512)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Bench:
    """One state, saved everywhere it will be loaded from."""

    def __init__(self, folder: Path, server: SeaweedServer, mib: int, rounds: int) -> None:
        self.folder, self.server, self.mib, self.rounds = folder, server, mib, rounds
        self.local, self.url = folder / "store", server.url("bench")
        self.state = State(mib)
        self.stock = self.state.stock()
        config = StoreConfig(agent_idle_exit_seconds=0)
        with CheckpointStore(self.local, self.url, config=config) as store:
            store.save(self.state.tree, 1, wait="remote")
            self.state.step_again()
            store.save(self.state.tree, 11, wait="remote")
            self.infos = store.checkpoints()
        self.size_bytes = self.infos[0].size_bytes
        dcp.save(self.stock, checkpoint_id=folder / "dcp", no_dist=True)
        os.sync()

    def load(self, local: Path | None, remote: str | None, step: int = 1, **options: Any) -> Any:
        # Closing is not part of loading, and there is nothing to close.
        return CheckpointStore(local, remote).load(self.state.tree, step, **options)

    def dcp_load(self) -> None:
        dcp.load(self.stock, checkpoint_id=self.folder / "dcp", no_dist=True)

    def remote(self) -> RemoteTier:
        from ckptstore.blob import open_blob_store

        return RemoteTier(open_blob_store(self.url), "default", "s3")

    def load_warm(self, root: Path) -> None:
        info = self.load(root, None, "latest")
        sources = set(info.report.bytes_by_source)
        if sources != {"arena"}:
            raise RuntimeError(f"read from {sources}, not from the agent's memory alone")

    def stored_bytes(self, step: int, prefix: str = "") -> int:
        """Size of the frames a load of these tensors needs, bases of deltas among them."""
        remote = self.remote()
        record = Catalog.read(None, [remote], "default").resolve(step)
        root = remote.root_manifest(record.remote["s3"])
        total = 0
        for ref in root.shards:
            document = remote.remote_shard(record.save_id, ref)
            for piece, row in zip(document.shard.pieces, document.chunks, strict=True):
                for index in row if piece.fqn.startswith(prefix) else ():
                    frame = document.frames[index]
                    total += frame.length + (frame.base.length if frame.base is not None else 0)
        return total


def ratios(results: dict[str, Any], ours: str, peers: list[str]) -> dict[str, float]:
    """How many times as fast as each peer."""
    return {peer: results[peer]["seconds"] / results[ours]["seconds"] for peer in peers if peer in results}


def local(bench: Bench) -> dict[str, Any]:
    """From the local disk."""
    found = {}
    for name, prepare in (("cold", True), ("hot", False)):
        ours, theirs = (bench.local, bench.folder / "dcp") if prepare else (None, None)
        contenders: dict[str, Contender] = {
            "ckptstore": ((lambda o=ours: drop_pages(o)) if ours else nothing, lambda: bench.load(bench.local, None)),
            "dcp.load": ((lambda t=theirs: drop_pages(t)) if theirs else nothing, bench.dcp_load),
        }
        result = run(contenders, bench.rounds)
        found[name] = {**result, "times_as_fast_as": ratios(result, "ckptstore", ["dcp.load"])}
    return found


#: A trainer that is killed right after its save is on the disk; its agent lives on.
_TRAINER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from restore import State
from ckptstore import CheckpointStore, StoreConfig
store = CheckpointStore(sys.argv[2], config=StoreConfig(agent_idle_exit_seconds=600))
store.save(State(int(sys.argv[3])).tree, 1, wait="local")
os.kill(os.getpid(), signal.SIGKILL)
"""


def warm(bench: Bench) -> dict[str, Any]:
    """A restarted trainer reads from the memory of its node's agent; the peer from its files, cold."""
    root = bench.folder / "warm"
    here = str(Path(__file__).parent)
    died = subprocess.run([sys.executable, "-c", _TRAINER, here, str(root), str(bench.mib)], check=False)
    if died.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the trainer ended with {died.returncode}")
    theirs = bench.folder / "dcp"
    try:
        result = run(
            {
                "ckptstore": (nothing, lambda: bench.load_warm(root)),
                "dcp.load": (lambda: drop_pages(theirs), bench.dcp_load),
            },
            bench.rounds,
        )
    finally:
        subprocess.run([sys.executable, "-m", "ckptstore.cli", "-q", "-s", str(root), "agent", "stop"], check=False)
    return {**result, "times_as_fast_as": ratios(result, "ckptstore", ["dcp.load"])}


def fresh(bench: Bench) -> dict[str, Any]:
    """From S3, nothing local."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        endpoint_url=bench.server.endpoint,
        region_name=bench.server.region,
        config=Config(s3={"addressing_style": "path"}),
    )
    files = sorted((bench.folder / "dcp").iterdir())
    for file in files:
        client.upload_file(str(file), bench.server.bucket, f"stock/{file.name}")
    target = bench.folder / "download"

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    def download() -> None:
        for file in files:
            client.download_file(bench.server.bucket, f"stock/{file.name}", str(target / file.name))

    contenders: dict[str, Contender] = {
        "ckptstore": (nothing, lambda: bench.load(None, bench.url)),
        _BOTO3: (clear, download),
    }
    try:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader
    except ImportError:
        pass
    else:
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"] = bench.server.endpoint

        def connector() -> None:
            config = S3ClientConfig(force_path_style=True)
            reader = S3StorageReader(bench.server.region, f"s3://{bench.server.bucket}/stock/", s3client_config=config)
            dcp.load(bench.stock, storage_reader=reader, no_dist=True)

        try:
            connector()
            contenders[_CONNECTOR] = (nothing, connector)
        except Exception as error:
            print(f"s3torchconnector can't read from this server: {error}")
    result = run(contenders, bench.rounds)
    return {**result, "times_as_fast_as": ratios(result, "ckptstore", list(contenders)[1:])}


def part(bench: Bench) -> dict[str, Any]:
    """Only the model out of a full AdamW state: bytes on the wire."""
    proxy = CountingProxy(bench.server.endpoint)
    url = bench.url.replace(bench.server.endpoint, proxy.endpoint)
    began = time.perf_counter()
    bench.load(None, url, only=["model.*"])
    seconds = time.perf_counter() - began
    wanted = bench.stored_bytes(1, "model.")
    return {
        "seconds": seconds,
        "fetched_bytes": proxy.received_bytes,
        "stored_bytes_of_the_model": wanted,
        "ratio": proxy.received_bytes / wanted,
    }


def delta(bench: Bench) -> dict[str, Any]:
    """A save whose chunks are deltas against the first one, and that one, on a fresh node."""
    result = run(
        {
            "full": (nothing, lambda: bench.load(None, bench.url, 1)),
            "delta": (nothing, lambda: bench.load(None, bench.url, 11)),
        },
        bench.rounds,
    )
    return {
        **result,
        "ratio": result["delta"]["seconds"] / result["full"]["seconds"],
        "fetched_bytes": {"full": bench.stored_bytes(1), "delta": bench.stored_bytes(11)},
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Resident memory at its peak during a load, above what the process had with the target in place."""
    found = {}
    places = {"local": (bench.local, None, 1), "fresh node": (None, bench.url, 1), "delta": (None, bench.url, 11)}
    for name, where in places.items():
        for is_first in (True, False):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            bench.load(*where)
            if not is_first:
                found[name] = {"extra_bytes": _status("VmHWM") - before}
    return found


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def ranks(bench: Bench) -> dict[str, Any]:
    """Four ranks of one fresh node, each wanting everything (as DDP does): bytes on the wire."""
    proxy = CountingProxy(bench.server.endpoint)
    url = bench.url.replace(bench.server.endpoint, proxy.endpoint)
    times = bench.folder / "times"
    times.mkdir(exist_ok=True)
    model = bench.state.model
    mib = round(sum(p.nbytes for p in model.parameters()) * 3 / (1 << 20))
    bench.state = State(1)  # room for the ranks
    bench.stock = {}
    torch.multiprocessing.spawn(_rank, (url, mib, str(bench.folder / "rendezvous"), str(times)), nprocs=4)
    stored = bench.stored_bytes(1)
    seconds = [float(path.read_text()) for path in sorted(times.iterdir())]
    return {
        "fetched_bytes": proxy.received_bytes,
        "stored_bytes": stored,
        "ratio": proxy.received_bytes / stored,
        "seconds": max(seconds),
    }


def _rank(rank: int, url: str, mib: int, rendezvous: str, times: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, 4), rank=rank, world_size=4)
    state = State(mib)
    dist.barrier()
    began = time.perf_counter()
    CheckpointStore(None, url).load(state.tree, 1)
    (Path(times) / str(rank)).write_text(str(time.perf_counter() - began))
    dist.barrier()


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "local": local,
    "warm": warm,
    "fresh": fresh,
    "delta": delta,
    "part": part,
    "memory": memory,
    "ranks": ranks,
}


_DCP = "dcp.load"
_MIB = 1 << 20
#: what: (part of the results that holds it, of how it follows from that part, what it must be, what it aims at)
FIGURES: dict[str, tuple[str, Callable[[Any], float], float, float]] = {
    "local, cold / dcp.load": ("local", lambda r: 1 / r["cold"]["times_as_fast_as"][_DCP], 1 / 1.6, 1 / 2.8),
    "local, hot / dcp.load": ("local", lambda r: 1 / r["hot"]["times_as_fast_as"][_DCP], 1 / 2, 1 / 6),
    "agent's memory / dcp.load cold": ("warm", lambda r: 1 / r["times_as_fast_as"][_DCP], 1 / 3, 1 / 8),
    "fresh node / boto3 download": ("fresh", lambda r: 1 / r["times_as_fast_as"][_BOTO3], 1, 1 / 2),
    "fresh node / s3torchconnector": ("fresh", lambda r: 1 / r["times_as_fast_as"].get(_CONNECTOR, 0), 1 / 1.6, 1 / 4),
    "delta / full save": ("delta", lambda r: r["ratio"], 2, 1.5),
    "bytes of 4 ranks / bytes of the checkpoint": ("ranks", lambda r: r["ratio"], 1.05, 1),
    "bytes of the model alone / its bytes": ("part", lambda r: r["ratio"], 1.05, 1),
    "extra memory, MiB": ("memory", lambda r: max(m["extra_bytes"] for m in r.values()) / _MIB, 256, 64),
}


def figures(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was measured, against what it must be."""
    found = {}
    for name, (part_name, take, must, aim) in FIGURES.items():
        with contextlib.suppress(KeyError, ZeroDivisionError):
            found[name] = {"measured": round(take(results[part_name]), 3), "must": round(must, 3), "aim": round(aim, 3)}
    return found


@contextlib.contextmanager
def bench_at(mib: int, rounds: int, folder: Path | None) -> Iterator[Bench]:
    """Everything saved, a server running; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ckptstore-bench-", dir=folder) as name, SeaweedServer() as server:
        os.environ.update(server.environ)
        yield Bench(Path(name), server, mib, rounds)


def main() -> None:
    """Run and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1536, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run")
    parser.add_argument("--folder", type=Path, help="where to work; its disk is what is measured")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with bench_at(args.mib, args.rounds, args.folder) as bench:
        results: dict[str, Any] = {
            "size_bytes": bench.size_bytes,
            "stored_bytes": bench.stored_bytes(1),
            "rounds": args.rounds,
            "versions": {"ckptstore": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "cpus": os.cpu_count(),
        }
        for name in args.only.split(","):
            results[name] = PARTS[name](bench)
            print(name, json.dumps(results[name], indent=2))
        results["load_average"] = os.getloadavg()[0]
        results["figures"] = figures(results)
        for name, figure in results["figures"].items():
            print(f"{name:45s}{figure['measured']:9.3f}   must {figure['must']:7.3f}   aim {figure['aim']:7.3f}")
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
