"""What the agent tells people and programs: hooks, log lines in JSON, and how jobs ended."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from agent_node import Node, until
from fake_trainer import ForkServer

from ckptstore.agent.hooks import Hooks, Targets
from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier

SECRET = "s3cr3t-in-the-path"


class Receiver:
    """A real HTTP server that keeps what it is sent; ``answers`` come first, then 204."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.hangs = threading.Event()
        self.hangs.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.hangs.wait(60)
                status = receiver.answers.pop(0) if receiver.answers else 204
                if status == 204:
                    receiver.received.append({"path": self.path, **json.loads(body)})
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{SECRET}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self) -> list[str]:
        return [one["event"] for one in self.received]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.hangs.set()
    made.server.shutdown()
    made.server.server_close()


def test_hooks_hear_of_refused_uploads_and_damage_and_keep_secrets(
    node: Node, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAGER_URL", receiver.url)
    receiver.answers = [503, 302]
    note = tmp_path / "told"
    command = (sys.executable, "-c", f"import sys; open({str(note)!r}, 'a').write(sys.stdin.read() + chr(10))")
    config = StoreConfig(hook_url="env:PAGER_URL", hook_command=command)
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"b": node.remote}, config=config)
    save_id = trainer.save(1)
    trainer.wait("failed", save_id)
    (told,) = until(lambda: receiver.received)
    assert told["path"] == f"/{SECRET}"
    assert (told["event"], told["run"], told["step"], told["save_id"], told["remote"]) == (
        "upload_failed", "run", 1, save_id, "b",
    )  # fmt: skip
    assert {"time", "node", "root", "message", "error", "text", "schema_version"} <= told.keys()
    assert (
        json.loads(until(lambda: note.exists() and note.read_text().endswith("\n") and note.read_text()))["step"] == 1
    )
    save = LocalTier(node.root).find("run", save_id)
    assert save is not None
    shard = save.path / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (node.path / "bucket").mkdir()
    node.trainer(remotes={"b": node.remote}, config=config)  # who attaches makes the uploader try again
    until(lambda: "damaged" in receiver.events())
    assert receiver.events().count("upload_failed") == 1, "the same trouble is told once"
    assert SECRET not in node.log()


def test_hooks_hear_of_a_full_disk(node: Node, receiver: Receiver) -> None:
    node.sick_agent("fail", str(errno.ENOSPC), "1000")
    trainer = node.trainer(config=StoreConfig(hook_url=receiver.url))
    trainer.wait("failed", trainer.save(1))
    (told,) = until(lambda: receiver.received)
    assert (told["event"], told["error"], told["level"]) == ("no_space", "NoSpaceError", "local")
    assert "ENOSPC" in told["message"]
    assert told["hint"]


def test_a_hook_that_hangs_is_killed_and_saves_go_on(node: Node) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"b": node.remote}, config=StoreConfig(hook_command=command, hook_timeout_s=0.2))
    trainer.wait("failed", trainer.save(1))
    trainer.wait("local", trainer.save(2))
    until(lambda: "could not be told of upload_failed of run: it took longer than 0.2 s" in node.log())


def test_what_creeps_up_is_told_too(receiver: Receiver, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    remote = {"lag_seconds": 7200.0}
    hooks = Hooks(lambda: {"runs": {"bert": {"remotes": {"s3": remote}}}}, tmp_path)
    hooks._sizes["bert"] = free
    receiver.hangs.clear()
    hooks.aim(Targets(receiver.url, timeout_s=60.0))
    hooks.aim(Targets(receiver.url, timeout_s=60.0))
    receiver.hangs.set()
    until(lambda: len(receiver.received) == 2)
    by_kind = {one["event"]: one for one in receiver.received}
    assert (by_kind["upload_lag"]["remote"], by_kind["upload_lag"]["lag_seconds"]) == ("s3", 7200.0)
    assert "bytes free" in by_kind["no_space"]["message"]
    hooks._look()
    hooks.close(30.0)
    assert len(receiver.received) == 2, "not again within the hour"


@pytest.mark.parametrize(
    "fields", [{"hook_url": "ftp://x"}, {"hook_url": "slack"}, {"hook_url": "env:"}, {"hook_command": ()}]
)
def test_a_hook_that_can_not_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="hook"):
        StoreConfig(**fields)
    assert SECRET not in repr(StoreConfig(hook_url=f"http://h/{SECRET}"))


def test_log_lines_are_json_when_that_is_asked_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_LOG_FORMAT", "json")
    trainer = node.trainer(remotes={"b": node.remote})
    save_id = trainer.save(7)
    trainer.wait("remote", save_id)
    lines = [json.loads(line) for line in node.log().splitlines()]
    events = {line["event"]: line for line in lines if "event" in line}
    for name in ("committed", "uploaded"):
        assert (events[name]["run"], events[name]["step"], events[name]["save_id"]) == ("run", 7, save_id)
    assert all({"time", "level", "logger", "pid", "thread", "message"} <= line.keys() for line in lines)


def test_a_job_that_dies_without_a_goodbye_is_noted_once(node: Node, forks: ForkServer) -> None:
    tier = LocalTier(node.root)
    closed = node.trainer()
    closed.wait("local", closed.save(1))
    closed.client.close()
    nonce = "0123456789ab"
    forks.wait(forks.start(root=str(node.root), saves=1, nonce=nonce, remotes={}, die_when_sealed=True), "dying")
    (record,) = until(lambda: journal.read(tier, "run", "jobs"))
    assert (record["ended"], record["job"]) == ("lost", nonce)
    assert record["step"] >= 1
