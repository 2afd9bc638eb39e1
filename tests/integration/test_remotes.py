"""Several remotes at once: each with its own queue and state, a quorum, and a restore that needs only one of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.agent.client import AgentClient
from ckptstore.errors import TransientError
from ckptstore.testing.s3_server import SeaweedServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path / "s3") as running:
        for name, value in running.environ.items():
            monkeypatch.setenv(name, value)
        yield running


def state_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {"model": nn.Linear(128, 256)}


def bits(state: dict[str, Any]) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in state["model"].parameters()]


def queue_of(root: Path, name: str) -> dict[str, Any]:
    client = AgentClient.observe(root)
    assert client is not None
    try:
        found: dict[str, Any] = client.status()["runs"]["default"]["remotes"][name]
        return found
    finally:
        client.close()


def test_the_quorum_decides_and_restores_fall_back_when_one_remote_is_dead(
    server: SeaweedServer, tmp_path: Path
) -> None:
    remotes = {"s3": server.url("main"), "mirror": f"file://{tmp_path}/mirror"}
    config = StoreConfig(remote_quorum=1)
    first, second = state_of(1), state_of(2)
    store = CheckpointStore(tmp_path / "store", remote=remotes, config=config)
    both = store.save(first, 1)
    for name in remotes:
        assert both.remotes[name].result(60).tiers[name] == "complete"
    server.kill()
    alone = store.save(second, 2)
    info = alone.wait("remote", timeout_s=60)
    assert info.tiers == {"local": "complete", "mirror": "complete"}
    assert not alone.remotes["s3"].done()
    assert [u["step"] for u in queue_of(tmp_path / "store", "s3")["queue"]] == [2]
    assert queue_of(tmp_path / "store", "mirror")["queue"] == []

    places: list[tuple[str | int, Path | None]] = [("latest", None), (1, tmp_path / "fresh")]
    for known, local in places:  # step 1 is on both, and the first of them does not answer
        target = state_of(9)
        with CheckpointStore(local, remote=remotes, config=config) as fresh:
            loaded = fresh.load(target, known)
        assert loaded is not None
        assert loaded.report is not None
        assert set(loaded.report.bytes_by_source) == {"mirror"}
        assert bits(target) == bits({1: first, 2: second}[loaded.step])
        said = [line for line in loaded.report.passed_over if "remote s3" in line]
        assert len(said) == (known == "latest"), "something newer may be there"

    with pytest.raises(TransientError):  # half of it would be worse than none
        store.delete(1)
    assert len(list((tmp_path / "store" / "default").glob("step-*"))) == 2

    server.restart()
    again = CheckpointStore(tmp_path / "store", remote=remotes, config=config)
    last = again.save(second, 3)  # an attachment is a reason to try again
    assert last.remotes["s3"].result(60).tiers["s3"] == "complete"
    assert alone.remotes["s3"].result(60).step == 2
    store.close()
    again.close()
    shutil.rmtree(tmp_path / "mirror")
    with CheckpointStore(None, remote=server.url("main")) as reader:
        assert [i.step for i in reader.checkpoints(include_superseded=True)] == [1, 2, 3]


def test_an_upload_resolves_as_skipped_when_newer_ones_go_first(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    config = StoreConfig(upload_backlog=1, upload_bytes_per_s=400_000)
    with CheckpointStore(tmp_path / "store", remote=url, config=config) as store:
        handles = []
        for step in range(1, 6):
            torch.manual_seed(step)
            handles.append(store.save({"model": nn.Linear(512, 512)}, step, wait="local"))
        infos = [handle.wait("remote", timeout_s=60) for handle in handles]
        skipped = [info.step for info in infos if info.skipped]
        assert skipped, "four saves came while the first was being sent"
        assert 5 not in skipped
        assert all(info.tiers == {"local": "complete"} for info in infos if info.skipped)
        assert queue_of(tmp_path / "store", "file")["skipped"] == len(skipped)
    with CheckpointStore(None, remote=url) as reader:
        assert [info.step for info in reader.checkpoints()] == [s for s in range(1, 6) if s not in skipped]


def test_a_local_copy_that_lost_a_file_is_read_from_the_remote_and_made_whole_again(tmp_path: Path) -> None:
    root, remote = tmp_path / "store", f"file://{tmp_path}/bucket"
    with CheckpointStore(root, remote=remote) as store:
        store.save(state_of(1), 1, wait="remote")
    [lost] = root.glob("default/step-*/__0_0.distcp")
    before = lost.read_bytes()
    lost.unlink()
    with CheckpointStore(root, remote=remote, config=StoreConfig(agent_idle_exit_seconds=2)) as store:
        target = state_of(2)
        info = store.load(target)
        assert bits(target) == bits(state_of(1))
        assert info is not None
        assert set(info.report.bytes_by_source) == {"file"}
        store.save(target, 2, wait="local")
        deadline = time.monotonic() + 60
        while not lost.exists() or lost.read_bytes() != before:
            assert time.monotonic() < deadline, "the agent did not bring the file back"
            time.sleep(0.05)
