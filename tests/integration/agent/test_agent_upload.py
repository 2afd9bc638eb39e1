"""Uploads by the agent: order, refusals, outages, several nodes, new credentials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import Node, until
from fake_trainer import complete_saves

from ckptstore.blob import open_blob_store
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.testing.s3_server import SeaweedServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with SeaweedServer(tmp_path_factory.mktemp("s3")) as running:
        yield running


def committed(url: str, environ: object = None) -> list[str]:
    store = open_blob_store(url, environ=environ)  # type: ignore[arg-type]
    try:
        return [save.save_id for save in RemoteTier(store, "run", "r").saves()]
    finally:
        store.close()


def test_saves_reach_every_remote(node: Node) -> None:
    second = f"file://{node.path / 'bucket' / 'second'}"
    trainer = node.trainer(remotes={"a": node.remote, "b": second})
    save_id = trainer.save(1)
    events = {trainer.wait("remote", save_id).data["remote"]}
    until(lambda: len([e for e in trainer.events if e.kind == "remote"]) == 2)
    events = {e.data["remote"] for e in trainer.events if e.kind == "remote"}
    assert events == {"a", "b"}
    data = trainer.wait("remote", save_id).data
    assert data["summary"]["save_id"] == save_id
    assert 0 < data["stored_bytes"] == data["sent_bytes"]
    assert committed(node.remote) == committed(second) == [save_id]


def test_the_newest_save_goes_first_when_several_wait(node: Node) -> None:
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"file": node.remote})
    saves = [trainer.save(number) for number in (1, 2, 3)]
    for save_id in saves:
        trainer.wait("failed", save_id)
    assert sorted(e.save_id for e in trainer.events if e.kind == "failed") == saves  # once each
    (node.path / "bucket").mkdir()
    again = node.trainer(remotes={"file": node.remote})  # an attachment is a reason to try again
    assert again.client.drain(60)
    assert [e.save_id for e in again.events if e.kind == "remote"] == saves[::-1]
    status = again.client.status()["runs"]["run"]["remotes"]["file"]
    assert (status["queue"], status["lag_seconds"], status["error"]) == ([], 0.0, None)
    assert status["last_remote"]["save_id"] == saves[-1]


def test_a_deleted_save_is_no_longer_waited_for(node: Node) -> None:
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"file": node.remote})
    first = trainer.save(1)
    trainer.wait("failed", first)
    LocalTier(node.root).delete("run", first)
    (node.path / "bucket").mkdir()
    second = trainer.save(2)
    trainer.wait("remote", second)
    assert trainer.client.drain(60)
    assert committed(node.remote) == [second]


def test_a_job_hears_of_it_when_a_newer_one_leaves_its_remote_out(node: Node) -> None:
    nowhere = "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=here"
    secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    trainer = node.trainer(remotes={"s3": nowhere}, environ=secrets)
    waiting = trainer.save(1)
    until(lambda: trainer.client.status()["runs"]["run"]["remotes"]["s3"]["queue"])
    node.trainer()
    data = trainer.wait("failed", waiting).data
    assert (data["level"], data["remote"]) == ("remote", "s3")


def test_a_part_is_complete_when_the_remote_has_all_of_them_though_nobody_said_so(node: Node) -> None:
    """All trainers and the coordinator are gone after *prepared*: the agents still bring the save home."""
    roots = [node.path / "node0", node.path / "node1"]
    nodes = [
        node.trainer(
            roots[i], ranks=2, local_ranks=[i], node=i, num_nodes=2, nonce="0123456789ab", remotes={"r": node.remote}
        )
        for i in (0, 1)
    ]
    save_id = nodes[0].save(1)
    nodes[0].wait("prepared", save_id)
    remote = lambda: nodes[0].client.status()["runs"]["run"]["remotes"]["r"]  # noqa: E731
    until(lambda: [upload["state"] for upload in remote()["queue"]] == ["waiting"])
    assert committed(node.remote) == []
    nodes[1].save(1)
    for trainer in nodes:
        trainer.wait("local", save_id)
        trainer.wait("remote", save_id)
    assert committed(node.remote) == [save_id]
    first, second = (LocalTier(root).saves("run")[0] for root in roots)
    assert (first.path / "manifest.json").read_bytes() == (second.path / "manifest.json").read_bytes()


def test_new_credentials_are_used_when_a_trainer_brings_them(node: Node, server: SeaweedServer) -> None:
    url = server.url("credentials")
    wrong = {**server.environ, "AWS_SECRET_ACCESS_KEY": "wrong"}
    trainer = node.trainer(remotes={"s3": url}, environ=wrong)
    save_id = trainer.save(1)
    failed = trainer.wait("failed", save_id)
    assert (failed.data["level"], failed.data["error"]) == ("remote", "CredentialsError")
    assert trainer.client.status()["runs"]["run"]["remotes"]["s3"]["is_refused"]
    second = trainer.save(2)
    trainer.wait("failed", second)  # every save's trainer hears of it
    again = node.trainer(remotes={"s3": url}, environ=server.environ)
    again.wait("remote", save_id)
    again.wait("remote", second)
    assert sorted(committed(url, server.environ)) == [save_id, second]
    assert list(complete_saves(node.root)) == [save_id, second]
    assert server.environ["AWS_SECRET_ACCESS_KEY"] not in node.log()
    until(lambda: again.client.status()["rss_bytes"]["own"] < 80e6)  # what the uploads took is given back


@pytest.mark.slow
def test_saves_wait_for_a_server_that_is_down(node: Node, tmp_path: Path) -> None:
    with SeaweedServer(tmp_path / "s3") as server:
        url = server.url("outage")
        server.kill()
        trainer = node.trainer(remotes={"s3": url}, environ=server.environ)
        save_id = trainer.save(1)
        trainer.wait("local", save_id)
        until(lambda: trainer.client.status()["runs"]["run"]["remotes"]["s3"]["error"] is not None)
        error = trainer.client.status()["runs"]["run"]["remotes"]["s3"]["error"]
        assert error["class"] == "TransientError"
        assert "failed" not in trainer.kinds()
        server.restart()
        trainer.wait("remote", save_id, timeout_s=150)
        assert committed(url, server.environ) == [save_id]
