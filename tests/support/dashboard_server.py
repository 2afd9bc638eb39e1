"""A dashboard to look at: a real server over a store, and stores worth looking at."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ckptstore.blob import open_blob_store
from ckptstore.clock import rfc3339
from ckptstore.config import StoreConfig
from ckptstore.format.manifest import RootManifest, Summary
from ckptstore.ops.open import open_place
from ckptstore.repo import timings
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint

EVIL = "<script>document.title='owned'</script>"
JOB = "0123456789ab"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A running dashboard."""

    port: int
    source: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str = "/", method: str = "GET", body: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, headers={k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()


@contextmanager
def served(
    store: str, remote: str | None = None, *, remote_seconds: float = 0.5, shown: str | None = None, **options: Any
) -> Iterator[Served]:
    """The dashboard of a store on a free port of this machine; ``shown``: as what pages name the store."""
    import uvicorn

    from ckptstore.dashboard.app import create_app
    from ckptstore.dashboard.serve import _listen
    from ckptstore.dashboard.source import Source

    place = open_place(store, remote)
    source = Source(place, remote_seconds=remote_seconds)
    try:
        app = create_app(source, store=shown or store, **options)
        listener = _listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(listener.getsockname()[1], source)
        finally:
            server.should_exit = True
            thread.join(10)
            listener.close()
    finally:
        source.close()
        place.close()


def add_save(root: Path, step: int, *, run: str = "bert", **fields: Any) -> str:
    """A save as far as listings look at it: summary and manifest, committed by rename."""
    tier = LocalTier(root)
    tier.create()
    save_id = fields.pop("save_id", f"{JOB}-{step}")
    fields = {
        "timeline": 1,
        "job": "job",
        "world_size": 1,
        "size_bytes": 1 << 20,
        "created_at": rfc3339(now()),
        **fields,
    }
    summary = Summary(run=run, step=step, save_id=save_id, **fields)
    staging = tier.make_run(run) / f".staging-{save_id}"
    staging.mkdir()
    (staging / "summary.json").write_bytes(summary.encode())
    (staging / "manifest.json").write_bytes(RootManifest(summary=summary, shards=()).encode())
    staging.rename(staging.with_name(f"step-{step:010d}-{save_id}"))
    return save_id


def write_run(folder: Path, run: str, saves: int, *, pushed: int | None = None, **extras: object) -> None:
    """A run of real checkpoints below ``folder/store``, the first ``pushed`` of them in ``folder/bucket`` too."""
    tier = LocalTier(folder / "store")
    remote = RemoteTier(open_blob_store(f"file://{folder}/bucket"), run, "file")
    rng = np.random.default_rng(0)
    weight, fixed = rng.standard_normal((64, 64)).astype("f4"), rng.standard_normal((128, 64)).astype("f4")
    for number in range(1, saves + 1):
        weight = weight + rng.standard_normal(weight.shape).astype("f4") * np.float32(1e-3)
        save_id = f"{JOB}-{number}"
        path = write_checkpoint(
            tier,
            {"model.layer.weight": weight, "model.embed.weight": fixed},
            run=run,
            step=number * 100,
            save_id=save_id,
            extras={"loss_history": [4.0 / (i + 1) for i in range(number * 5)], **extras},
        )
        timings.note(
            tier,
            run,
            save_id,
            {"ranks": {"0": {"reserve": 0.01, "copy": 0.2}}, "write": 0.5, "fsync": 0.2, "commit": 0.1},
        )
        if pushed is None or number <= pushed:
            result = push(tier, path, run, remote, config=StoreConfig())
            timings.note(tier, run, save_id, {"remote file": {"lag": 2.0, **result.notes()}})


def now() -> datetime:
    return datetime.now(timezone.utc)


def eventually(look: Any, timeout_s: float = 15.0) -> Any:
    """The first truthy value of ``look()``."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"it never came: last {found!r}"
        time.sleep(0.05)
