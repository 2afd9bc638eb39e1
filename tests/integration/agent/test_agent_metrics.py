"""The agent's Prometheus metrics, scraped as Prometheus does, and what is built on them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from agent_node import Node, until
from prometheus_client.parser import text_string_to_metric_families

from ckptstore.agent.client import AgentClient
from ckptstore.config import StoreConfig
from ckptstore.store.tally import LoadTally

ROOT = Path(__file__).parents[3]

CONTRACT = {
    "ckptstore_save_stall_seconds", "ckptstore_save_seconds", "ckptstore_upload_bytes_total",
    "ckptstore_upload_lag_seconds", "ckptstore_last_committed_timestamp_seconds", "ckptstore_jobs",
    "ckptstore_retries_total", "ckptstore_failures_total", "ckptstore_verify_failures_total",
    "ckptstore_local_free_bytes", "ckptstore_build_info", "ckptstore_restored_bytes_total",
    "ckptstore_repaired_files_total", "ckptstore_skipped_saves_total",
}  # fmt: skip


def scrape(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found: Any, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def port_of(trainer: Any) -> int:
    port = trainer.client.status()["metrics"]["port"]
    assert isinstance(port, int)
    return port


def test_metrics_tell_of_saves_and_uploads(node: Node) -> None:
    trainer = node.trainer(remotes={"b": node.remote}, config=StoreConfig(metrics_port=0))
    save_id = trainer.save(1)
    event = trainer.wait("remote", save_id)
    found = scrape(port_of(trainer))
    assert value(found, "ckptstore_upload_bytes_total", run="run", kind="plain") == event.data["summary"]["size_bytes"]
    assert value(found, "ckptstore_upload_bytes_total", run="run", kind="stored") == event.data["stored_bytes"]
    for stage in ("write", "fsync", "commit", "upload"):
        until(lambda s=stage: value(scrape(port_of(trainer)), "ckptstore_save_seconds_count", run="run", stage=s) == 1)
    for tier in ("local", "b"):
        when = value(found, "ckptstore_last_committed_timestamp_seconds", run="run", tier=tier)
        assert when is not None
        assert when > 1.7e9
    assert value(found, "ckptstore_upload_lag_seconds", run="run", remote="b") == 0
    assert value(found, "ckptstore_jobs", run="run", state="uploading") == 0
    assert (value(found, "ckptstore_local_free_bytes") or 0) > 0


def test_metrics_count_failures(node: Node) -> None:
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"b": node.remote}, config=StoreConfig(metrics_port=0))
    failed = trainer.wait("failed", trainer.save(1))
    found = scrape(port_of(trainer))
    error = failed.data["error"]
    assert value(found, "ckptstore_failures_total", run="run", op="remote", error=error) == 1
    assert (value(found, "ckptstore_jobs", run="run", state="queued") or 0) == 1
    (node.path / "bucket").mkdir()


def test_loads_are_counted_by_source_whether_the_agent_runs_already_or_comes_later(node: Node) -> None:
    import torch

    from ckptstore import CheckpointStore

    def state(value: float) -> dict[str, Any]:
        return {"v": torch.full((1 << 18,), value), "w": torch.full((1 << 18,), value)}

    size = 2 * 4 << 18
    config = StoreConfig(metrics_port=0, agent_idle_exit_seconds=20)
    node.watch()
    with CheckpointStore(node.root, {"b": node.remote}, config=config) as store:
        store.save(state(1.0), 1, wait="remote")
    file = next(node.root.rglob("__0_0.distcp"))
    data = bytearray(file.read_bytes())
    data[-8192] ^= 1
    file.write_bytes(data)

    observer = AgentClient.observe(node.root)
    assert observer is not None
    port = observer.status()["metrics"]["port"]
    with CheckpointStore(node.root, {"b": node.remote}, config=config) as store:
        info = store.load(state(0.0))
        assert info is not None
        assert info.report is not None
        by_source, repaired = dict(info.report.bytes_by_source), info.report.repaired
        assert set(by_source) == {"local", "b"}, "a case of both"
        assert repaired == (file.name,)
        found = scrape(port)
        for source in ("local", "b"):
            assert value(found, "ckptstore_restored_bytes_total", run="default", source=source) == by_source[source]
        assert value(found, "ckptstore_repaired_files_total", run="default") == 1
        store.load(state(0.0))
        store.save(state(2.0), 2)
        again = value(scrape(port), "ckptstore_restored_bytes_total", run="default", source="local")
        assert again == by_source["local"] + size, "each load once"
    assert observer.stop(60)
    observer.close()

    with CheckpointStore(node.root, {"b": node.remote}, config=config) as store:
        assert store.load(state(0.0)) is not None
        assert AgentClient.observe(node.root) is None, "a load starts no agent"
        store.save(state(3.0), 3, wait="local")
        observer = AgentClient.observe(node.root)
        assert observer is not None
        found = scrape(observer.status()["metrics"]["port"])
        observer.close()
        assert value(found, "ckptstore_restored_bytes_total", run="default", source="local") == size


@pytest.mark.parametrize("policy", ["skip", "fail", "wait"])
def test_saves_that_no_memory_was_free_for_are_counted(node: Node, policy: Any) -> None:
    import torch

    from ckptstore import CheckpointStore, errors

    gate, told = node.path / "gate", node.path / "told"
    gate.touch()
    node.sick_agent("hold", str(gate))
    config = StoreConfig(
        back_pressure=policy, back_pressure_timeout_s=0.1, metrics_port=0, hook_command=("tee", "-a", str(told))
    )
    store = CheckpointStore(node.root, config=config)
    try:
        for step in (1, 2):
            store.save({"x": torch.ones(9)}, step)
        if policy == "fail":
            with pytest.raises(errors.SaveFailedError, match="still being written"):
                store.save({"x": torch.ones(9)}, 3)
        else:
            assert (store.save({"x": torch.ones(9)}, 3).failure() is not None) == (policy == "wait")
        assert store._session is not None
        found = scrape(store._session.link.client.status()["metrics"]["port"])
        assert (value(found, "ckptstore_skipped_saves_total", run="default") or 0) == (policy == "skip")
        failures = value(found, "ckptstore_failures_total", run="default", op="staged", error="SaveFailedError")
        assert failures == (None if policy == "skip" else 1)
        if policy != "skip":
            news = json.loads(until(lambda: told.exists() and told.read_text()))
            assert (news["event"], news["step"]) == ("save_failed", 3)
    finally:
        gate.unlink()
        with suppress(errors.SaveFailedError):
            store.close()


def test_a_load_is_none_the_worse_when_the_agent_can_not_count_it(node: Node) -> None:
    import torch

    from ckptstore import CheckpointStore

    node.watch()
    with CheckpointStore(node.root) as store:
        store.save({"w": torch.ones(9)}, 1, wait="local")
        target = {"w": torch.zeros(9)}
        assert store.load(target) is not None, "its agent keeps no metrics"
        pid = node.agent_pid()
        assert pid is not None
        told = LoadTally.tell

        def to_a_dead_one(tally: LoadTally, agent: AgentClient | None) -> None:
            os.kill(pid, signal.SIGKILL)
            told(tally, agent)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoadTally, "tell", to_a_dead_one)
            assert store.load(target) is not None
        assert target["w"].sum() == 9


def test_nothing_is_served_when_nobody_asked(node: Node) -> None:
    trainer = node.trainer()
    assert trainer.client.status()["metrics"] is None


def test_training_goes_on_when_the_port_is_taken(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        trainer = node.trainer(config=StoreConfig(metrics_port=taken.getsockname()[1]))
        trainer.wait("local", trainer.save(1))
        told = trainer.client.status()["metrics"]
    assert told["port"] is None
    assert "in use" in told["error"]


@pytest.fixture
def exposition(node: Node) -> str:
    """All the agent serves."""
    trainer = node.trainer(remotes={"b": node.remote}, config=StoreConfig(metrics_port=0))
    trainer.wait("remote", trainer.save(1))
    with urllib.request.urlopen(f"http://127.0.0.1:{port_of(trainer)}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def served_names(exposition: str) -> set[str]:
    """Names of everything the agent serves, series or not."""
    return set(re.findall(r"^# TYPE (\w+)", exposition, re.M))


def test_every_promised_name_is_served(served_names: set[str]) -> None:
    assert served_names >= CONTRACT
    page = (ROOT / "docs/reference/metrics.md").read_text()
    assert set(re.findall(r"^\| `(ckptstore_\w+)", page, re.M)) == CONTRACT


def test_alerts_and_panels_ask_for_names_that_are_served(served_names: set[str]) -> None:
    rules = yaml.safe_load((ROOT / "grafana/alerts.yaml").read_text())["groups"][0]["rules"]
    board = json.loads((ROOT / "grafana/dashboard.json").read_text())
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(expressions) > 15
    for expression in expressions:
        names = set(re.findall(r"\bckptstore_\w+", expression))
        assert names
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} <= served_names, expression
        assert expression.count("(") == expression.count(")")
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in rules)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_alert_is_tried() -> None:
    rules = yaml.safe_load((ROOT / "grafana/alerts.yaml").read_text())["groups"][0]["rules"]
    tried = yaml.safe_load((ROOT / "grafana/alerts_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tried for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules}


def test_prometheus_takes_the_rules_their_tests_the_panels_and_the_metrics(exposition: str, tmp_path: Path) -> None:
    board = json.loads((ROOT / "grafana/dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    panels = [{"record": f"panel:{n}", "expr": _filled(expr)} for n, expr in enumerate(found)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    for command, given in (
        (["check", "rules", "--lint=all", "--lint-fatal", str(ROOT / "grafana/alerts.yaml")], None),
        (["test", "rules", str(ROOT / "grafana/alerts_test.yaml")], None),
        (["check", "rules", str(tmp_path / "panels.yaml")], None),
        (["check", "metrics"], exposition),
    ):
        done = subprocess.run(["promtool", *command], input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def _filled(expression: str) -> str:
    """A panel's expression with Grafana's variables filled in."""
    filled = expression.replace("$__rate_interval", "5m").replace("$__range", "1h").replace("$run", ".*")
    assert "$" not in filled, f"an unknown variable: {expression}"
    return filled
