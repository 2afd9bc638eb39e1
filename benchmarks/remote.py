"""Time to ``remote`` on a real S3 server, against boto3 and s3torchconnector, in one run.

::

    python benchmarks/remote.py [--copies 4] [--rounds 3] [--cache FILE] [--only dense,lora,sink]

The states are genuine (:mod:`training_states`), repeated ``copies`` times with their numbers moved along, so that no
chunk repeats. The server is SeaweedFS on loopback, on the same machine and cores as the clients: what it takes per byte
bounds everybody alike. Contenders take turns in a shuffled order; ratios are medians over the rounds of ratios within a
round.

* ours: :func:`ckptstore.repo.upload.push` of a committed local checkpoint: read, check, encode, decode again,
  send, commit.
* boto3: ``upload_file`` of the same files, with ``TransferConfig`` as ``aws s3 cp`` has it.
* s3torchconnector: ``dcp.save`` of the same tensors with its ``S3StorageWriter``, when it is installed.

Bodies are guarded by a CRC-32 that the server checks (ours, ``checksum=crc32``), or by a signed SHA-256 (boto3's
default). CPU seconds are the client process's own. ``sink`` sends raw packs to a server that throws them away: the
client's own ceiling.
"""

from __future__ import annotations

import argparse
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import boto3
import numpy as np
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
OURS, BOTO3, CONNECTOR = "ours", "boto3", "s3torchconnector"


@dataclass(frozen=True)
class Run:
    """One upload by one contender."""

    seconds: float
    cpu_seconds: float
    sent_bytes: int


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
    """One server, a folder for local tiers, and what is measured."""

    def __init__(self, server: SeaweedServer, folder: Path, rounds: int, copies: int) -> None:
        self.server, self.folder, self.rounds, self.copies = server, folder, rounds, copies
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def prefix(self) -> Iterator[str]:
        """A fresh prefix that is emptied afterwards."""
        name = new_nonce()
        yield name
        blob = self.blob(name)
        keys = [info.key for info in blob.list()]
        if keys:
            blob.delete(keys)
        blob.close()

    def blob(self, prefix: str) -> BlobStore:
        return open_blob_store(f"{self.server.url(prefix)}&checksum=crc32", environ=self.server.environ)

    def client(self) -> Any:
        config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
        return boto3.client("s3", endpoint_url=self.server.endpoint, region_name=self.server.region, config=config)

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

        return timed(work, sum(file.stat().st_size for file in files))

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
        return timed(lambda: dcp.save(tensors, storage_writer=writer, no_dist=True), size)

    def note(self, name: str, value: float, **more: Any) -> None:
        self.rows.append({"name": name, "value": round(value, 4), **more})
        print(f"{name:72} {value:10.4f}", *(f"{k}={v}" for k, v in more.items()), flush=True)


def timed(work: Callable[[], Any], sent_bytes: int = 0) -> Run:
    began, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Run(seconds, cpu, result.sent_bytes if isinstance(result, PushResult) else sent_bytes)


def ratio(runs: dict[str, list[Run]], other: str, ours: str = OURS) -> float:
    """Median of other's seconds by ours, round by round: above 1 we are faster."""
    return statistics.median(o.seconds / u.seconds for o, u in zip(runs[other], runs[ours], strict=True))


def dense(bench: Bench, states: dict[str, State], scenario: str, bounds: tuple[float, float], *, later: bool) -> None:
    """One save of a dense state, and one ten steps later, by everybody."""
    tier = LocalTier(bench.folder / scenario)
    nonce = new_nonce()
    first = bench.write(tier, states[scenario], 1, f"{nonce}-1")
    second = bench.write(tier, states[f"{scenario}+10"], 2, f"{nonce}-2")
    plain = sum(a.nbytes for a in arrays(states[scenario], bench.copies).values())
    tensors = {
        name: torch.from_numpy(a).view(torch.bfloat16) if a.dtype == np.uint16 else torch.from_numpy(a)
        for name, a in arrays(states[scenario], bench.copies).items()
    }
    runs: dict[str, list[Run]] = {OURS: [], BOTO3: [], "ours +10": [], "restore": []}
    if _has_connector():
        runs[CONNECTOR] = []
    for _ in range(bench.rounds):
        for name in random.sample([n for n in runs if n in (OURS, BOTO3, CONNECTOR)], k=len(runs) - 2):
            with bench.prefix() as prefix:
                if name == BOTO3:
                    runs[name].append(bench.by_boto3(first, prefix))
                elif name == CONNECTOR:
                    runs[name].append(bench.by_connector(tensors, prefix))
                else:
                    watched = WatchedBlobStore(bench.blob(prefix))
                    remote = RemoteTier(watched, "default", "s3")
                    runs[OURS].append(timed(lambda r=remote: push(tier, first, "default", r, config=CONFIG)))
                    requests = {"save": _requests(watched)}
                    runs["ours +10"].append(timed(lambda r=remote: push(tier, second, "default", r, config=CONFIG)))
                    requests["save +10"] = _requests(watched)
                    target = LocalTier(bench.folder / "restored")
                    target.create()
                    runs["restore"].append(timed(lambda r=remote, t=target: pull(r, f"{nonce}-2", t)))
                    requests["restore +10"] = _requests(watched)
                    shutil.rmtree(target.root)
    must, aim = bounds
    for name, made in runs.items():
        median = statistics.median(run.seconds for run in made)
        cpu = statistics.median(run.cpu_seconds for run in made) / plain * 1e9
        sent = made[-1].sent_bytes / plain
        bench.note(f"{scenario}: {name}, s", median, cpu_s_per_gb=round(cpu, 3), sent_share=round(sent, 4))
    for name in (BOTO3, CONNECTOR):
        if name in runs:
            bench.note(f"{scenario}: {name} / ours", ratio(runs, name), must=must, aim=aim)
            if later:
                bench.note(f"{scenario} +10: {name} / ours", ratio(runs, name, "ours +10"), must=1.3, aim=1.5)
    bench.note(f"{scenario}: plain GB", plain / 1e9)
    bench.note(f"{scenario}: requests of a save", sum(requests["save"].values()), **requests["save"])
    bench.note(f"{scenario}: requests of a save +10", sum(requests["save +10"].values()), **requests["save +10"])
    bench.note(
        f"{scenario}: requests of a restore +10", sum(requests["restore +10"].values()), **requests["restore +10"]
    )
    shutil.rmtree(tier.root)


def lora(bench: Bench, states: dict[str, State]) -> None:
    """The second save of a LoRA run against everything again."""
    tier = LocalTier(bench.folder / "lora")
    nonce = new_nonce()
    first = bench.write(tier, states["lora"], 1, f"{nonce}-1")
    second = bench.write(tier, states["lora+10"], 2, f"{nonce}-2")
    runs: dict[str, list[Run]] = {OURS: [], BOTO3: []}
    for _ in range(bench.rounds):
        with bench.prefix() as prefix:
            remote = RemoteTier(bench.blob(prefix), "default", "s3")
            push(tier, first, "default", remote, config=CONFIG)
            runs[OURS].append(timed(lambda r=remote: push(tier, second, "default", r, config=CONFIG)))
        with bench.prefix() as prefix:
            runs[BOTO3].append(bench.by_boto3(second, prefix))
    bench.note("lora: second save, s", statistics.median(r.seconds for r in runs[OURS]), sent=runs[OURS][-1].sent_bytes)
    bench.note("lora: boto3 / ours", ratio(runs, BOTO3), must=5, aim=20)
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
    store = open_blob_store(url, environ=bench.server.environ)
    config = Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config)
    senders: dict[str, Callable[[int], Any]] = {
        OURS: lambda number: store.put(f"pack{number}", body, if_absent=True),
        BOTO3: lambda number: client.put_object(Bucket="bucket", Key=f"pack{number}", Body=body),
    }
    for name, send in senders.items():
        runs = [timed(lambda s=send: _all(s, count)) for _ in range(bench.rounds)]
        rate = count * len(body) / statistics.median(run.seconds for run in runs) / 1e9
        cpu = statistics.median(run.cpu_seconds for run in runs) / (count * len(body)) * 1e9
        bench.note(f"sink: {name}, GB/s", rate, cpu_s_per_gb=round(cpu, 3))
    process.kill()


def _all(send: Callable[[int], Any], count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(count)))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", default="mixed,fp32,lora,sink")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    wanted = options.only.split(",")
    states = load_or_make(Size(), options.cache)
    folder = Path(tempfile.mkdtemp(prefix="ckptstore-bench-"))
    try:
        with SeaweedServer(folder / "s3") as server:
            os.environ.update(server.environ)
            bench = Bench(server, folder, options.rounds, options.copies)
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
