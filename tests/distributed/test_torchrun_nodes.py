"""Several nodes as people start them: a ``torchrun`` on each, with a disk, an agent and a host of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckptstore.agent.client import AgentClient

SUPPORT = Path(__file__).parents[1] / "support"
LIMIT_S = 150


class Cluster:
    """Simulated nodes below one folder, and a bucket that all of them reach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.launches = 0

    def root(self, node: str) -> Path:
        return self.path / node / "store"

    def lose_disk(self, node: str) -> None:
        """The machine comes back without its disk, its memory and its agent."""
        runtime = str(self.path / node / "run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", runtime)
            agent = AgentClient.observe(self.root(node))
            if agent is not None:
                os.kill(agent.agent_pid, signal.SIGKILL)
                agent.close()
        shutil.rmtree(self.path / node)

    def torchrun(self, *on: str, ranks_per_node: int, end: str = "") -> list[dict[str, Any]]:
        """One job over these nodes, the first of which holds rank 0; what each rank says.

        Args:
            end: how it is to die, if it is.
        """
        self.launches += 1
        folder = self.path / f"job-{self.launches}"
        folder.mkdir()
        port = _free_port()
        started = [
            self._start(node, folder, number, len(on), ranks_per_node, port, end) for number, node in enumerate(on)
        ]
        try:
            codes = [process.wait(LIMIT_S) for process in started]
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
        assert [bool(code) for code in codes] == [bool(end)] * len(on), logs
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(on) * ranks_per_node)]

    def _start(
        self, node: str, folder: Path, number: int, num_nodes: int, ranks_per_node: int, port: int, end: str
    ) -> subprocess.Popen[bytes]:
        runtime = self.path / node / "run"
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "SIMULATED_HOST": node, "OMP_NUM_THREADS": "1"}
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(num_nodes), "--node-rank", str(number), "--nproc-per-node", str(ranks_per_node)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            *(str(SUPPORT / "torchrun_job.py"), str(self.root(node)), f"file://{self.path}/bucket", str(folder), end),
        ]
        with (folder / f"{node}.log").open("wb") as log:
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)


def _free_port() -> int:
    """Below those that the kernel gives to whoever connects, so that it is still free in a moment."""
    while True:
        port = random.randrange(20000, 30000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def only(said: list[dict[str, Any]], key: str) -> Any:
    """What all ranks say."""
    values = {rank[key] for rank in said}
    assert len(values) == 1, values
    return values.pop()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_state_survives_a_lost_disk_swapped_nodes_and_fewer_nodes_under_torchrun(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    first = cluster.torchrun("a", "b", ranks_per_node=2)
    assert [(rank["step"], rank["node"], rank["num_nodes"]) for rank in first] == [(0, n, 2) for n in (0, 0, 1, 1)]
    assert not list(cluster.root("a").rglob("__[23]_0.distcp"))
    assert not list(cluster.root("b").rglob("__[01]_0.distcp")), "each node has its own part only"

    cluster.lose_disk("b")
    second = cluster.torchrun("b", "a", ranks_per_node=1)
    assert only(second, "step") == 1
    assert only(second, "found") == only(first, "left"), "not a bit differs"
    assert [rank["mine"] for rank in second] == [0, 1]
    on_b, on_a = (rank["sources"] for rank in second)
    assert set(on_b) == {"peer", "file"}, "the empty node: most from the other one, and what nobody has"
    assert on_b["peer"] > on_b["file"]
    assert "file" in on_a, "what was on the lost disk"

    shutil.rmtree(tmp_path / "a" / "store")
    (third,) = cluster.torchrun("b", ranks_per_node=1)
    assert (third["step"], third["num_nodes"]) == (2, 1)
    assert third["found"] == only(second, "left")
    assert third["found"] != only(first, "left")
    assert third["mine"] == 0
    assert set(third["sources"]) == {"local", "file"}, "its own half, and the other from the bucket"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_save_that_one_node_of_two_had_committed_is_resumed_by_three_under_torchrun(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    torn = cluster.torchrun("a", "b", ranks_per_node=1, end="torn")
    commits = {node: len(list(cluster.root(node).glob("*/step-0000000002-*/manifest.json"))) for node in ("a", "b")}
    assert commits == {"a": 1, "b": 0}
    more = cluster.torchrun("a", "b", "c", ranks_per_node=1)
    assert only(more, "step") == 2
    assert list(cluster.root("b").glob("*/step-0000000002-*/manifest.json")), "it is complete there too now"
    assert only(more, "found") == only(torn, "left"), "not a bit differs"
    assert [rank["num_nodes"] for rank in more] == [3] * 3
    assert "peer" in more[2]["sources"], "the new node has no part of it"
