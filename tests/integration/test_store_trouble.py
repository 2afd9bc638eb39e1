"""What a user meets when something is wrong with the disk or the bucket: a plain error, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptstore import CheckpointStore, StoreConfig, errors
from ckptstore.agent.client import AgentClient
from ckptstore.repo.holding import alone
from ckptstore.repo.reader import CheckpointReader
from ckptstore.testing.faults import CutReply, FaultProxy, LoseReply, Reply, Rule
from ckptstore.testing.s3_server import SeaweedServer

QUICK = StoreConfig(agent_idle_exit_seconds=2)


@pytest.fixture(scope="module")
def server() -> Iterator[SeaweedServer]:
    with SeaweedServer() as server:
        yield server


@pytest.fixture
def s3(server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> SeaweedServer:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((1000,), float(step)), "n": step}


def test_s3_holds_the_checkpoint_when_everything_here_is_gone(s3: SeaweedServer, tmp_path: Path) -> None:
    url = s3.url("plain")
    with CheckpointStore(tmp_path / "store", remote=url, config=QUICK) as store:
        info = store.save(state(1), 1).wait("remote", 60)
        assert info.tiers == {"local": "complete", "s3": "complete"}
    with CheckpointStore(tmp_path / "other", remote=url) as fresh:
        target = state(0)
        fresh.load(target)
    assert target["n"] == 1
    assert torch.equal(target["w"], state(1)["w"])


@pytest.mark.parametrize(
    ("bucket", "environ", "error"),
    [
        pytest.param("no-such-bucket", {}, "NoStoreError", id="bucket missing"),
        pytest.param("ckptstore", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "CredentialsError", id="bad credentials"),
    ],
)
def test_save_stays_local_and_says_why_when_the_bucket_refuses(
    s3: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str, environ: dict[str, str], error: str
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    url = s3.url("x").replace("s3://ckptstore/", f"s3://{bucket}/")
    store = CheckpointStore(tmp_path / "store", remote=url, config=QUICK)
    handle = store.save(state(1), 1)
    handle.wait("local", 30)
    with pytest.raises(errors.SaveFailedError) as caught:
        handle.wait("remote", 60)
    assert caught.value.context["error"] == error
    assert "wrong" not in str(caught.value)
    with pytest.raises(errors.SaveFailedError):
        store.close()
    # Later, with the right bucket and credentials, the save that waited is completed.
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    with CheckpointStore(tmp_path / "store", remote=s3.url(f"late-{error}"), config=QUICK) as again:
        again.save(state(2), 2).wait("remote", 60)
        deadline = time.monotonic() + 60
        while [i.step for i in again.checkpoints() if i.tiers["s3"] == "complete"] != [1, 2]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_load_names_what_is_wrong_when_the_bucket_refuses(
    s3: SeaweedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(None, remote=s3.url("x").replace("s3://ckptstore/", "s3://no-such-bucket/")) as store:
        with pytest.raises(errors.NoStoreError, match="no-such-bucket"):
            store.load(state(0))
        with pytest.raises(errors.NoStoreError):
            store.checkpoints()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with CheckpointStore(None, remote=s3.url("x")) as store, pytest.raises(errors.CredentialsError):
        store.load(state(0))


def test_uploads_wait_and_training_goes_on_when_the_server_is_away(tmp_path: Path) -> None:
    with SeaweedServer(tmp_path / "data") as server:
        environ = {**os.environ, **server.environ}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environ.items():
                patch.setenv(name, value)
            store = CheckpointStore(tmp_path / "store", remote=server.url("away"), config=QUICK)
            store.save(state(1), 1).wait("remote", 60)
            server.kill()
            began = time.monotonic()
            handle = store.save(state(2), 2)
            handle.wait("local", 30)
            assert time.monotonic() - began < 10
            with pytest.raises(errors.SaveTimeoutError):
                handle.wait("remote", 1)
            server.restart()
            assert handle.wait("remote", 90).tiers["s3"] == "complete"
            store.close()


def test_upload_is_right_when_requests_fail_on_the_way(s3: SeaweedServer, tmp_path: Path) -> None:
    with FaultProxy(s3.endpoint) as proxy:
        proxy.add(Rule(Reply(503, "SlowDown"), method="PUT", nth={2, 5, 9}))
        lost = proxy.add(Rule(LoseReply(), method="PUT", path="commits/", nth={1}))
        proxy.add(Rule(CutReply(10), method="GET", nth={4, 11}))
        url = proxy.rewrite(s3.url("faults"))
        with CheckpointStore(tmp_path / "store", remote=url, config=QUICK) as store:
            for step in (1, 2, 3):
                store.save(state(step), step)
            store.wait("remote", 90)
        assert lost.num_applied == 1
        with CheckpointStore(None, remote=url) as fresh:
            assert [i.step for i in fresh.checkpoints()] == [1, 2, 3]
            target = state(0)
            fresh.load(target)
            assert target["n"] == 3


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_older_checkpoints_stay_and_saving_works_again_when_the_disk_was_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], check=True)
    try:
        store = CheckpointStore(mount / "store", config=QUICK)
        small, large = {"w": torch.rand(200_000)}, {"w": torch.rand(1_000_000)}
        store.save(small, 1).wait("local", 30)
        handle = store.save(large, 2)
        with pytest.raises(errors.SaveFailedError) as caught:
            handle.wait("local", 30)
        assert caught.value.context["error"] == "NoSpaceError"
        assert "ENOSPC" in str(caught.value)
        assert [i.step for i in store.checkpoints()] == [1]
        assert not list(mount.rglob(".staging-*"))
        store.save(small, 3).wait("local", 30)
        assert [i.step for i in store.checkpoints()] == [1, 3]
        with pytest.raises(errors.SaveFailedError):
            store.wait("local")
        store.close()
        pid = store_agent(mount / "store")
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def store_agent(root: Path) -> int | None:
    from ckptstore.agent.client import AgentClient

    client = AgentClient.observe(root)
    if client is None:
        return None
    client.close()
    return client.agent_pid


def test_damaged_manifest_is_passed_over_and_reported_when_an_older_one_is_good(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "store", config=QUICK) as store:
        for step in (1, 2, 3):
            store.save(state(step), step, wait="local")
        for name in ("manifest.json", "summary.json"):  # nobody can even tell what it was
            next((tmp_path / "store").rglob(f"step-*3-*/{name}")).write_bytes(b"{")
        newest = next((tmp_path / "store").rglob("step-*2-*/shard-00000.json"))
        newest.write_bytes(newest.read_bytes()[:-30])
        target = state(0)
        info = store.load(target)
        assert info is not None
        assert info.step == 1
        assert info.report is not None
        assert [line.partition(" (")[0] for line in info.report.passed_over] == ["step 3", "step 2"]
        with pytest.raises(errors.CkptError):
            store.load(target, 2)
        oldest = next((tmp_path / "store").rglob("step-*1-*/shard-00000.json"))
        oldest.write_bytes(b"{}")
        with pytest.raises(errors.IntegrityError, match="damaged"):
            store.load(target)


def test_the_newer_of_two_jobs_goes_on_when_the_agent_was_lost_and_the_older_comes_back(tmp_path: Path) -> None:
    older, newer = (CheckpointStore(tmp_path / "store", config=QUICK) for _ in range(2))
    older.save(state(1), 1, wait="local")
    newer.save(state(2), 2, wait="local")
    clients = [store._session.link.client for store in (older, newer) if store._session is not None]
    os.kill(clients[0].agent_pid, signal.SIGKILL)
    while not all(client.is_lost for client in clients):
        time.sleep(0.01)
    for step in (3, 5):
        newer.save(state(step), step, wait="local")
        with pytest.raises(errors.LockedError, match="newer job has taken over"):
            older.save(state(step + 1), step + 1)
    newer.close()
    older.close()
    assert [info.step for info in older.checkpoints()] == [1, 2, 3, 5]


def test_no_room_at_the_first_save_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, refusals = AgentClient.connect, [errors.NoSpaceError("no room"), errors.TransientError("not now")]

    def connect(*arguments: Any, **options: Any) -> AgentClient:
        if refusals:
            raise refusals.pop(0)
        return genuine(*arguments, **options)

    monkeypatch.setattr(AgentClient, "connect", connect)
    store = CheckpointStore(tmp_path / "store", config=QUICK)
    for step, said in ((1, "no room"), (2, "not now")):
        assert said in str(store.save(state(step), step).failure())
    store.save(state(3), 3, wait="local")
    assert [info.step for info in store.checkpoints()] == [3]
    with pytest.raises(errors.SaveFailedError, match="no room"):
        store.close()


def test_failed_save_is_raised_by_the_next_when_configured(tmp_path: Path) -> None:
    config = StoreConfig(on_failure="raise", agent_idle_exit_seconds=2)
    store = CheckpointStore(tmp_path / "store", config=config)
    handle = store.save(state(1), 1)
    handle.wait("local")
    session = store._session
    assert session is not None
    handle = store.save(state(2), 2)
    session.link.client.discard(handle.save_id, "for a test")
    if handle.local.exception(30) is not None:
        with pytest.raises(errors.SaveFailedError):
            store.save(state(3), 3)
    store.save(state(4), 4, wait="local")
    store.close()


def test_a_load_that_fails_or_finds_a_busy_agent_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(tmp_path, config=QUICK) as store:
        store.save(state(1), 1, wait="local")
    (path,) = tmp_path.glob("default/step-*")
    with CheckpointStore(tmp_path, config=QUICK) as store:
        store.load(state(0))
        descriptors, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())

        def fails(*_: Any) -> Any:
            raise errors.StorageError("the disk answers no more")

        def takes_long(*_: Any, **__: Any) -> Any:
            raise errors.SaveTimeoutError("still writing")

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "ranks_here", property(fails))
            with pytest.raises(errors.StorageError, match="answers no more") as caught:
                store.load(state(0))
            with alone(path):
                assert caught.value is not None, "nobody reads it, although the error is still at hand"
        with monkeypatch.context() as patch:
            patch.setattr(AgentClient, "settle", takes_long)
            assert store.load(state(0)) is not None
        left = {thread.name for thread in set(threading.enumerate()) - threads}
        assert left <= {"ckptstore-agent-events"}, "that one says goodbye and ends"
        assert set(os.listdir("/proc/self/fd")) <= descriptors
