"""Credentials that change while an upload runs, for real: the server forgets the old ones. And proxies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptstore.agent.protocol import Event
from ckptstore.agent.uploader import Uploader
from ckptstore.blob import open_blob_store
from ckptstore.clock import SYSTEM_CLOCK, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CredentialsError
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.progress import Progress
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint
from ckptstore.testing.faults import FaultProxy
from ckptstore.testing.s3_server import SeaweedServer
from ckptstore.testing.watched import WatchedBlobStore

MIB = 1 << 20
CONFIG = StoreConfig(pack_bytes=MIB, upload_concurrency=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "local")


def checkpoint(tier: LocalTier) -> Path:
    rng = np.random.default_rng(1)
    state = {f"w{n}": rng.normal(size=(256, 256)).astype("float32") for n in range(20)}
    return write_checkpoint(tier, state, step=1, save_id=f"{new_nonce()}-1")


def assert_restores(server: SeaweedServer, prefix: str, path: Path, folder: Path) -> None:
    fresh = LocalTier(folder)
    fresh.create()
    blob = open_blob_store(server.url(prefix), environ=server.environ)
    pulled = pull(RemoteTier(blob, "default", "s3"), path.name.split("-", 2)[2], fresh)
    blob.close()
    for file in path.iterdir():
        assert (pulled / file.name).read_bytes() == file.read_bytes()


def test_push_goes_on_when_its_credentials_are_replaced_and_the_old_ones_are_unknown(
    server: SeaweedServer, tier: LocalTier, tmp_path: Path
) -> None:
    """The environment is kept current, as a trainer's attachment does: one refusal, and nothing is sent twice."""
    path, prefix = checkpoint(tier), new_nonce()
    environ = dict(server.environ)
    retries: list[str] = []
    blob = open_blob_store(server.url(prefix), environ=environ, on_retry=lambda retry: retries.append(retry.reason))
    watched = WatchedBlobStore(blob)
    rotated = False

    def rotate_after_two_packs(progress: Progress) -> None:
        nonlocal rotated
        if progress.sent_bytes > 1.5 * MIB and not rotated:
            rotated = True
            server.rotate()
            environ.update(server.environ)

    result = push(
        tier, path, "default", RemoteTier(watched, "default", "s3"), config=CONFIG, progress=rotate_after_two_packs
    )
    assert rotated
    assert result.committed is not None
    assert "expired" in retries
    assert result.sent_bytes == result.stored_bytes == watched.sent_bytes("put", "/packs/")
    blob.close()
    assert_restores(server, prefix, path, tmp_path / "fresh")


def test_the_queue_says_so_and_waits_until_a_trainer_brings_the_new_ones(
    server: SeaweedServer, tier: LocalTier, tmp_path: Path
) -> None:
    path, prefix = checkpoint(tier), new_nonce()
    stale = dict(server.environ)
    server.rotate()
    told: list[Event] = []
    uploader = Uploader(
        tier, "default", "s3", server.url(prefix), stale, CONFIG, told.append, lambda root: None, SYSTEM_CLOCK
    )
    try:
        until(lambda: told)
        assert told[0].data["error"] == CredentialsError.__name__
        described = uploader.describe()
        assert described["is_refused"]
        assert [one["step"] for one in described["queue"]] == [1]
        assert not uploader.has_work(), "waiting can't help: whoever waits for this agent is let go"
        uploader.refresh(dict(server.environ), CONFIG)
        until(uploader.is_settled)
        assert told[-1].kind == "remote"
    finally:
        uploader.stop()
        uploader.join(10)
    assert_restores(server, prefix, path, tmp_path / "fresh")


@pytest.mark.parametrize("through", ["proxy", "no proxy"])
def test_requests_go_through_the_proxy_of_the_trainers_environment(
    server: SeaweedServer, tier: LocalTier, through: str
) -> None:
    """The agent's own environment has none: what the trainer passed on counts."""
    host, port = "bucket-server.invalid", server.endpoint.rpartition(":")[2]
    with FaultProxy(server.endpoint) as proxy:
        environ = {**server.environ, "HTTP_PROXY": proxy.endpoint}
        if through != "proxy":
            environ["NO_PROXY"] = "127.0.0.1,.invalid"
        url = server.url(new_nonce()).replace("127.0.0.1", host)
        blob = open_blob_store(url, environ=environ, retry=False)
        try:
            if through == "proxy":
                result = push(tier, checkpoint(tier), "default", RemoteTier(blob, "default", "s3"), config=CONFIG)
                assert result.committed is not None
                assert all(seen.path.startswith(f"http://{host}:{port}/") for seen in proxy.seen)
            else:
                with pytest.raises(Exception, match="can't be resolved"):
                    blob.get("k")
                assert not proxy.seen
        finally:
            blob.close()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
