"""A node to test on: a root, a private runtime directory, and the certainty that no agent outlives the test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_node import Node
from fake_trainer import ForkServer, fork_server


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    machine = Node(tmp_path)
    yield machine
    machine.close()


@pytest.fixture
def forks(node: Node) -> Iterator[ForkServer]:
    with fork_server({"XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]}) as server:
        yield server
