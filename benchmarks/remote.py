"""Time to ``remote`` on a real S3 server, against boto3 and s3torchconnector, in one run.

::

    python benchmarks/remote.py [--copies 5] [--rounds 5] [--cache FILE] [--only sink,lora,mixed,fp32]

About 12 minutes on 2 quiet cores, 4 of them for the states, which ``--cache`` keeps (``codec.py`` takes the same file).

The states are genuine (:mod:`training_states`), repeated ``copies`` times with their numbers moved along, so that no
chunk repeats: 1.8 GB of mixed-precision state, 1.55 GB in fp32. The server is SeaweedFS on loopback, on the same
machine and cores as the clients: what it takes per byte bounds everybody alike, and is told. Each round has a fresh
server; contenders take turns in a shuffled order, each after a ``sync``; ratios are medians over the rounds of ratios
within a round.

* ours: :func:`ckptstore.repo.upload.push` of a committed local checkpoint: read, check, encode, decode again,
  send, commit.
* boto3: ``upload_file`` of the same files, with ``TransferConfig`` as ``aws s3 cp`` has it.
* s3torchconnector: ``dcp.save`` of the same tensors with its ``S3StorageWriter``, when it is installed; in the first
  ``CONNECTOR_ROUNDS`` rounds, since it takes longest.
* ours +10: the state ten optimizer steps later, after the first; against everybody's whole upload, since they know no
  other. Its requests are counted by the same process, as an agent's second save is.

Bodies are guarded by a CRC-32 that the server checks (ours, ``checksum=crc32``), or by a signed SHA-256 (boto3's
default). CPU seconds are the client process's own, and the server's. ``sink`` sends raw packs to a server that throws
them away: the client's own ceiling.
"""

from __future__ import annotations

import argparse
import filecmp
import gc
import json
import multiprocessing
import os
import platform
import random
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import boto3
import numpy as np
import psutil
import torch
import torch.distributed.checkpoint as dcp
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from training_states import Size, State, load_or_make

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.testing.checkpoints import write_checkpoint
from ckptstore.testing.s3_server import SeaweedServer
from ckptstore.testing.watched import WatchedBlobStore

RESULTS = Path(__file__).parent / "results" / "remote.json"
CONFIG = StoreConfig()
NUMPY = {"bfloat16": "<u2", "float32": "<f4"}
OURS, LATER, RESTORE, BOTO3, CONNECTOR = "ours", "ours +10", "restore +10", "boto3", "s3torchconnector"
CONNECTOR_ROUNDS = 2


@dataclass(frozen=True)
class Run:
    """One upload by one contender."""

    seconds: float
    cpu_seconds: float
    sent_bytes: int
    server_seconds: float = 0.0


def arrays(state: State, copies: int) -> dict[str, np.ndarray]:
    """The state's tensors, ``copies`` times. Each copy is moved along by an odd number, so that no chunk repeats."""
    result = {}
    for copy in range(copies):
        for name, (dtype, data) in state.items():
            numbers = data.view(NUMPY[dtype])
            result[f"{name.partition('.')[0]}.copy{copy}.{name.partition('.')[2]}"] = np.roll(numbers, 1013 * copy)
    return result


def dtypes(state: State, copies: int) -> dict[str, str]:
    return {
        f"{name.partition('.')[0]}.copy{copy}.{name.partition('.')[2]}": "bfloat16"
        for copy in range(copies)
        for name, (dtype, _) in state.items()
        if dtype == "bfloat16"
    }


class Bench:
    """A server, fresh for each round, a folder for local tiers, and what is measured."""

    def __init__(self, folder: Path, rounds: int, copies: int) -> None:
        self.folder, self.rounds, self.copies = folder, rounds, copies
        self.rows: list[dict[str, Any]] = []
        self.server = SeaweedServer()

    def each_round(self) -> Iterator[int]:
        """The numbers of the rounds, a server running in each."""
        for number in range(self.rounds):
            data = self.folder / "s3"
            with SeaweedServer(data) as self.server:
                os.environ.update(self.server.environ)
                yield number
            shutil.rmtree(data)

    def timed(self, work: Callable[[], Any], sent_bytes: int = 0) -> Run:
        """Do it once, with nothing of what came before still on its way to the disk."""
        os.sync()
        server = psutil.Process(self.server.pid)
        before, began, cpu = _cpu_of(server), time.perf_counter(), time.process_time()
        result = work()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        sent = result.sent_bytes if isinstance(result, PushResult) else sent_bytes
        return Run(seconds, cpu, sent, _cpu_of(server) - before)

    def blob(self, prefix: str) -> BlobStore:
        return open_blob_store(f"{self.server.url(prefix)}&checksum=crc32", environ=self.server.environ)

    def client(self) -> Any:
        config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
        keys = {
            "aws_access_key_id": self.server.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": self.server.environ["AWS_SECRET_ACCESS_KEY"],
        }
        place = {"endpoint_url": self.server.endpoint, "region_name": self.server.region}
        return boto3.client("s3", config=config, **place, **keys)

    def write(self, tier: LocalTier, state: State, step: int, save_id: str) -> Path:
        return write_checkpoint(
            tier,
            arrays(state, self.copies),
            step=step,
            save_id=save_id,
            dtypes=dtypes(state, self.copies),
            chunk_elements=CONFIG.chunk_elements,
        )

    def by_boto3(self, path: Path, prefix: str) -> Run:
        transfer = TransferConfig(multipart_threshold=8 << 20, multipart_chunksize=8 << 20, max_concurrency=10)
        client = self.client()
        files = [file for file in path.iterdir() if file.is_file()]

        def work() -> None:
            for file in files:
                client.upload_file(str(file), self.server.bucket, f"{prefix}/{file.name}", Config=transfer)

        return self.timed(work, sum(file.stat().st_size for file in files))

    def by_connector(self, tensors: dict[str, torch.Tensor], prefix: str) -> Run:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client
        from s3torchconnector.dcp import S3StorageWriter
        from s3torchconnector.dcp.s3_file_system import S3FileSystem

        config = S3ClientConfig(force_path_style=True)
        writer = S3StorageWriter(self.server.region, f"s3://{self.server.bucket}/{prefix}/", s3client_config=config)
        made = S3Client(self.server.region, endpoint=self.server.endpoint, s3client_config=config)
        writer.fs = S3FileSystem(self.server.region, s3_client=made)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        return self.timed(lambda: dcp.save(tensors, storage_writer=writer, no_dist=True), size)

    def note(self, name: str, value: float, **more: Any) -> None:
        self.rows.append({"name": name, "value": round(value, 4), **more})
        print(f"{name:72} {value:10.4f}", *(f"{k}={v}" for k, v in more.items()), flush=True)


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def ratio(runs: dict[str, list[Run]], other: str, ours: str = OURS) -> float:
    """Median of other's seconds by ours, round by round: above 1 we are faster."""
    return statistics.median(o.seconds / u.seconds for o, u in zip(runs[other], runs[ours], strict=False))


def dense(bench: Bench, states: dict[str, State], scenario: str, bounds: tuple[float, float], *, later: bool) -> None:
    """One save of a dense state by everybody, and with ``later`` ours of ten steps later, and its restore."""
    tier = LocalTier(bench.folder / scenario)
    nonce = new_nonce()
    state = arrays(states[scenario], bench.copies)
    plain = sum(a.nbytes for a in state.values())
    tensors = {
        name: torch.from_numpy(a).view(torch.bfloat16) if a.dtype == np.uint16 else torch.from_numpy(a)
        for name, a in state.items()
    }
    del state
    first = bench.write(tier, states[scenario], 1, f"{nonce}-1")
    second = bench.write(tier, states[f"{scenario}+10"], 2, f"{nonce}-2") if later else None
    runs: dict[str, list[Run]] = {}
    requests: dict[str, Counter[str]] = {}

    def ours(prefix: str) -> None:
        watched = WatchedBlobStore(bench.blob(prefix))
        remote = RemoteTier(watched, "default", "s3")
        note(OURS, bench.timed(lambda: push(tier, first, "default", remote, config=CONFIG)))
        requests["save"] = _requests(watched)
        if second is not None:
            note(LATER, bench.timed(lambda: push(tier, second, "default", remote, config=CONFIG)))
            requests["save +10"] = _requests(watched)
            target = LocalTier(bench.folder / "restored")
            target.create()
            fresh = RemoteTier(watched, "default", "s3")
            note(RESTORE, bench.timed(lambda: pull(fresh, f"{nonce}-2", target)))
            requests["restore +10"] = _requests(watched)
            for file in second.iterdir():
                restored = target.root / "default" / second.name / file.name
                assert filecmp.cmp(file, restored, shallow=False), file.name
            shutil.rmtree(target.root)
        watched.close()

    def note(name: str, run: Run) -> None:
        runs.setdefault(name, []).append(run)

    contenders: dict[str, Callable[[str], None]] = {
        OURS: ours,
        BOTO3: lambda prefix: note(BOTO3, bench.by_boto3(first, prefix)),
    }
    if _has_connector():
        contenders[CONNECTOR] = lambda prefix: note(CONNECTOR, bench.by_connector(tensors, prefix))
    # What uploads is no process with torch in it, whose objects each collection would look at.
    gc.collect()
    gc.freeze()
    for number in bench.each_round():
        for name in random.sample(sorted(contenders), k=len(contenders)):
            if name != CONNECTOR or number < CONNECTOR_ROUNDS:
                contenders[name](new_nonce())
    must, aim = bounds
    for name, made in runs.items():
        per_gb = {
            "cpu_s_per_gb": round(statistics.median(run.cpu_seconds for run in made) / plain * 1e9, 3),
            "server_cpu_s_per_gb": round(statistics.median(run.server_seconds for run in made) / plain * 1e9, 3),
        }
        seconds = [round(run.seconds, 2) for run in made]
        sent = round(made[-1].sent_bytes / plain, 4)
        bench.note(f"{scenario}: {name}, s", statistics.median(seconds), **per_gb, sent_share=sent, rounds=seconds)
    for name in (BOTO3, CONNECTOR):
        if name in runs:
            bench.note(f"{scenario}: {name} / ours", ratio(runs, name), must=must, aim=aim)
            if later:
                bench.note(f"{scenario} +10: {name} / ours", ratio(runs, name, LATER), must=1.3, aim=1.5)
    bench.note(f"{scenario}: plain GB", plain / 1e9)
    for what, counted in requests.items():
        bench.note(f"{scenario}: requests of a {what}", sum(counted.values()), **counted)
    shutil.rmtree(tier.root)


def lora(bench: Bench, states: dict[str, State]) -> None:
    """The second save of a LoRA run against everything again."""
    tier = LocalTier(bench.folder / "lora")
    nonce = new_nonce()
    first = bench.write(tier, states["lora"], 1, f"{nonce}-1")
    second = bench.write(tier, states["lora+10"], 2, f"{nonce}-2")
    runs: dict[str, list[Run]] = {OURS: [], BOTO3: []}
    for _ in bench.each_round():
        watched = WatchedBlobStore(bench.blob(new_nonce()))
        remote = RemoteTier(watched, "default", "s3")
        push(tier, first, "default", remote, config=CONFIG)
        watched.requests.clear()
        runs[OURS].append(bench.timed(lambda r=remote: push(tier, second, "default", r, config=CONFIG)))
        counted = _requests(watched)
        watched.close()
        runs[BOTO3].append(bench.by_boto3(second, new_nonce()))
    bench.note("lora: second save, s", statistics.median(r.seconds for r in runs[OURS]), sent=runs[OURS][-1].sent_bytes)
    bench.note("lora: boto3 / ours", ratio(runs, BOTO3), must=5, aim=20)
    bench.note("lora: requests of a second save", sum(counted.values()), **counted)
    shutil.rmtree(tier.root)


def _requests(watched: WatchedBlobStore) -> Counter[str]:
    counted = Counter(request.op for request in watched.requests)
    watched.requests.clear()
    return counted


def _has_connector() -> bool:
    try:
        import s3torchconnector.dcp  # noqa: F401
    except ImportError:
        return False
    return True


# --- a server that throws everything away


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_swallow, args=(connection,), daemon=True).start()


def _swallow(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(1 << 20))
    held = b""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        while b"\r\n\r\n" not in held:
            got = connection.recv(1 << 16)
            if not got:
                return
            held += got
        head, _, held = held.partition(b"\r\n\r\n")
        fields = {
            k.strip().lower(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        if fields.get(b"expect", b"").lower() == b"100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        left = int(fields.get(b"content-length", b"0")) - len(held)
        held = b""
        while left > 0:
            left -= connection.recv_into(buffer, min(left, len(buffer)))
        connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nServer: sink\r\nContent-Length: 0\r\n\r\n')


def sink(bench: Bench, total_bytes: int = 2 << 30) -> None:
    """The client's own ceiling: 64 MiB packs, four at a time, ours and a bare boto3 client."""
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
    process.start()
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    body = np.random.default_rng(0).bytes(64 << 20)
    count = total_bytes // len(body)
    url = f"s3://bucket/sink?endpoint={endpoint}&region=us-east-1&checksum=crc32"
    environ = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "checks"}
    store = open_blob_store(url, environ=environ)
    keys = {"aws_access_key_id": "nobody", "aws_secret_access_key": "checks"}
    config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config, **keys)
    senders: dict[str, Callable[[int], Any]] = {
        OURS: lambda number: store.put(f"pack{number}", body, if_absent=True),
        BOTO3: lambda number: client.put_object(Bucket="bucket", Key=f"pack{number}", Body=body),
    }
    measured: dict[str, list[Run]] = {name: [] for name in senders}
    for _ in range(bench.rounds):
        for name, send in random.sample(sorted(senders.items()), k=len(senders)):
            began, cpu = time.perf_counter(), time.process_time()
            _all(send, count)
            measured[name].append(Run(time.perf_counter() - began, time.process_time() - cpu, count * len(body)))
    for name, runs in measured.items():
        rate = count * len(body) / statistics.median(run.seconds for run in runs) / 1e9
        cpu = statistics.median(run.cpu_seconds for run in runs) / (count * len(body)) * 1e9
        bench.note(f"sink: {name}, GB/s", rate, cpu_s_per_gb=round(cpu, 3))
    process.kill()
    process.join()
    store.close()


def _all(send: Callable[[int], Any], count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(count)))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", default="sink,lora,mixed,fp32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    wanted = options.only.split(",")
    states = load_or_make(Size(), options.cache)
    folder = Path(tempfile.mkdtemp(prefix="ckptstore-bench-"))
    try:
        bench = Bench(folder, options.rounds, options.copies)
        if "sink" in wanted:
            sink(bench)
        if "lora" in wanted:
            lora(bench, states)
        if "mixed" in wanted:
            dense(bench, states, "mixed", (1.1, 1.35), later=True)
        if "fp32" in wanted:
            dense(bench, states, "fp32", (1.0, 1.15), later=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    document = {
        "benchmark": "remote",
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "versions": {"boto3": boto3.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "arguments": {"copies": options.copies, "rounds": options.rounds, "load_average": os.getloadavg()},
        "rows": bench.rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
