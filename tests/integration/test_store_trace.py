"""The trace of a save: where its time went, and why binding was slow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from torch import nn

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.agent.client import AgentClient

STAGES = ("reserve", "plan", "copy", "hand_over", "write", "fsync", "commit")


def test_each_stage_is_timed_and_the_slow_path_named(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    model.register_state_dict_post_hook(lambda *_: None)
    root = tmp_path / "store"
    with CheckpointStore(root, config=StoreConfig(metrics_port=0, agent_idle_exit_seconds=2)) as store:
        store.save({"model": model, "x": torch.ones(3)}, 1, wait="local")
        store.save({"model": model, "x": torch.ones(3)}, 2, wait="local")
        agent = AgentClient.observe(root)
        assert agent is not None
        url = f"http://127.0.0.1:{agent.status()['metrics']['port']}/metrics"
        agent.close()
        lines: list[str] = []
        deadline = time.monotonic() + 60
        stalls = "ckptstore_save_stall_seconds_count"
        while not any(line.startswith(stalls) and line.endswith(" 2.0") for line in lines):
            assert time.monotonic() < deadline, lines  # the trace is written after the commit was told, metrics last
            time.sleep(0.02)
            with urllib.request.urlopen(url, timeout=30) as answer:
                lines = answer.read().decode().splitlines()

    told = subprocess.run(
        [sys.executable, "-m", "ckptstore.cli", "-s", root, "show", "1", "--json"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    timing = json.loads(told.stdout)["timing"]
    ours = timing["ranks"]["0"]
    assert "hook" in ours.pop("slow_path")
    assert all(0 <= {**timing, **ours}[stage] < 60 for stage in STAGES)
    for stage in STAGES:
        found = [line for line in lines if line.startswith("ckptstore_save_seconds_count") and f'"{stage}"' in line]
        assert [float(line.split()[-1]) for line in found] == [2.0], stage

    text = subprocess.run(
        [sys.executable, "-m", "ckptstore.cli", "-s", root, "show", "1", "--timing"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "hand the copy over" in text
    assert "state_dict" in text or "hook" in text
