"""The arena is full on one node of two, whose disk hangs: every rank does the same, and saving goes on afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pressure_jobs import save_when_the_disk_comes_back, save_while_the_disk_hangs
from ranks import run_ranks

from ckptstore.agent.client import AgentClient

SICK_AGENT = Path(__file__).parents[1] / "integration" / "agent" / "sick_agent.py"


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, str]]:
    """Root of the nodes, their runtime directory, and the file that makes the disk of the second one hang."""
    runtime, gate, root = tmp_path / "runtime", tmp_path / "gate", tmp_path / "nodes"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    command = [sys.executable, str(SICK_AGENT), "hold", str(gate), "--", "--root", str(root / "node-1")]
    agent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while (observer := AgentClient.observe(root / "node-1")) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        observer.close()
        yield str(root), str(runtime), str(gate)
    finally:
        agent.kill()
        agent.wait(10)


def test_all_ranks_do_the_same(nodes: tuple[str, str, str]) -> None:
    results = run_ranks(2, save_while_the_disk_hangs, *nodes)
    said = "step 3 was not saved: the previous saves are still being written"
    kept = ["1", "2", "4"]
    assert results[0] == {
        "skip": kept,
        "fail": [f"raised: {said}", *kept],
        "wait": [f"failed: {said}", "told by wait: step 3", *kept],
    }
    assert results[1] == results[0]


def test_peers_wait_for_a_rank_that_waits_for_its_disk(nodes: tuple[str, str, str]) -> None:
    results = run_ranks(2, save_when_the_disk_comes_back, *nodes, 8.0)
    assert results == [[1, 2, 3]] * 2
