"""Prometheus metrics of the agent: what happened is counted as it happens, what is now is looked up when asked.

Served on 127.0.0.1 only, and only where ``StoreConfig(metrics_port=...)`` asks for it. Needs ``ckptstore[metrics]``.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore._version import __version__
from ckptstore.agent.protocol import Event
from ckptstore.clock import SYSTEM_CLOCK, Clock, parse_rfc3339
from ckptstore.errors import ConfigError

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ConfigError(
        f"StoreConfig(metrics_port=...) needs {error.name}", hint="pip install 'ckptstore[metrics]'"
    ) from None

log = logging.getLogger("ckptstore.agent")

#: From an arena copy of a small model to an upload over a bad line.
STALL_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
STAGE_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

JOB_STATES = ("gathering", "writing", "queued", "uploading", "waiting", "failed")


class Metrics(Collector):
    """The metrics of one agent. Thread-safe; nothing here blocks or raises into a save.

    Args:
        status: the agent's ``status``.
        root: of the local tier.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]], root: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self.registry = CollectorRegistry()
        self._status = status
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._servers: list[Any] = []
        self._port: int | None = None
        self._error: str | None = None
        self._committed: dict[tuple[str, str], float] = {}
        common: dict[str, Any] = {"registry": self.registry, "namespace": "ckptstore"}
        self._stall = Histogram(
            "save_stall_seconds", "Time training waited for a save: the slowest rank of this node.", ["run"],
            buckets=STALL_BUCKETS, **common,
        )  # fmt: skip
        self._save = Histogram(
            "save_seconds", "Time of one stage of a save: reserve, plan, copy (slowest rank), write, commit, upload.",
            ["run", "stage"], buckets=STAGE_BUCKETS, **common,
        )  # fmt: skip
        self._bytes = Counter(
            "upload_bytes", "Bytes of uploaded saves: as loaded, and as stored.", ["run", "kind"], **common
        )
        self._retries = Counter("retries", "Requests that were tried again.", ["op", "reason"], **common)
        self._failures = Counter("failures", "Saves that failed, by level and error.", ["run", "op", "error"], **common)
        self._left_out = Counter(
            "skipped_saves", "Saves left out because those before were still being written.", ["run"], **common
        )
        self._verify = Counter("verify_failures", "Copies that did not hold what they should.", ["run"], **common)
        self._restored = Counter(
            "restored_bytes", "Plain bytes this node's ranks have loaded, by where they came from.", ["run", "source"],
            **common,
        )  # fmt: skip
        self._repaired = Counter(
            "repaired_files", "Local shard files in which a load put good bytes in the place of damaged ones.", ["run"],
            **common,
        )  # fmt: skip
        self.registry.register(self)

    # ------------------------------------------------------------------ told

    def event(self, run: str, event: Event) -> None:
        """Count what trainers are told."""
        if event.kind == "failed":
            kind = str(event.data.get("error") or event.data.get("class") or "CkptError")
            self._failures.labels(run, str(event.data.get("level", "local")), kind).inc()
            if kind == "IntegrityError":
                self._verify.labels(run).inc()
        elif event.kind == "left_out":
            self._left_out.labels(run).inc()
        elif event.kind in ("local", "remote"):
            summary = event.data["summary"]
            tier = "local" if event.kind == "local" else str(event.data["remote"])
            created = parse_rfc3339(summary["created_at"])
            with self._lock:
                self._committed[run, tier] = max(self._committed.get((run, tier), 0.0), created.timestamp())
            if event.kind == "remote":
                self._bytes.labels(run, "plain").inc(summary["size_bytes"])
                self._bytes.labels(run, "stored").inc(event.data["stored_bytes"])
                lag = (self._clock.now() - created).total_seconds()
                self._save.labels(run, "upload").observe(max(0.0, lag))

    def written(self, run: str, ranks: Mapping[str, Mapping[str, float]], timing: Mapping[str, float]) -> None:
        """Measure a part that is on disk."""
        stages: dict[str, float] = {}
        for spans in ranks.values():
            for stage, seconds in spans.items():
                stages[stage] = max(stages.get(stage, 0.0), seconds)
        if ranks:
            self._stall.labels(run).observe(max(sum(spans.values()) for spans in ranks.values()))
        for stage, seconds in {**stages, **timing}.items():
            self._save.labels(run, stage).observe(seconds)

    def retried(self, op: str, reason: str) -> None:
        """Count a request that is about to be tried again."""
        self._retries.labels(op, reason).inc()

    def restored(self, run: str, bytes_by_source: Mapping[str, int], repaired_files: int) -> None:
        """Count what a rank has loaded."""
        for source, size in bytes_by_source.items():
            self._restored.labels(run, source).inc(size)
        self._repaired.labels(run).inc(repaired_files)

    # ------------------------------------------------------------------ asked

    def collect(self) -> Iterator[Metric]:
        """What is now. Called for every scrape."""
        status = self._status()
        yield _gauge("build_info", "Which ckptstore this is.", ["version"], {(__version__,): 1.0})
        with suppress(OSError):
            free = float(shutil.disk_usage(self._root).free)
            yield _gauge("local_free_bytes", "Free space below the local tier.", [], {(): free})
        lag: dict[tuple[str, ...], float] = {}
        jobs: dict[tuple[str, ...], float] = {}
        with self._lock:
            committed = dict(self._committed)
        for run, said in status["runs"].items():
            states = Tally(save["stage"] for save in said["saves"])
            for name, remote in said["remotes"].items():
                lag[run, name] = float(remote["lag_seconds"])
                states.update(upload["state"] for upload in remote["queue"])
                _keep_newest(committed, (run, name), remote["last_remote"])
            _keep_newest(committed, (run, "local"), said["last_local"])
            self._left_out.labels(run)
            self._verify.labels(run)  # begins at 0, so that the first one is an increase
            self._repaired.labels(run)
            jobs.update({(run, state): float(states[state]) for state in JOB_STATES})
        yield _gauge("upload_lag_seconds", "Age of the oldest save that a remote lacks.", ["run", "remote"], lag)
        yield _gauge("jobs", "Saves under way, by state.", ["run", "state"], jobs)
        yield _gauge(
            "last_committed_timestamp_seconds", "When the newest save that a tier holds was taken.", ["run", "tier"],
            committed,
        )  # fmt: skip

    # ------------------------------------------------------------------ serving

    def serve(self, port: int) -> None:
        """Serve on this port of 127.0.0.1; does nothing if it is served there. Never raises: a save matters more."""
        if self._port is not None and port in (0, self._port):
            return
        try:
            server, _ = start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except OSError as error:
            self._error = f"port {port}: {error.strerror or error}"
            log.warning("metrics can't be served on %s", self._error)
            return
        self._port, self._error = server.server_address[1], None
        for old in self._servers:
            old.shutdown()
            old.server_close()
        self._servers = [server]
        log.info("metrics are served on http://127.0.0.1:%d/metrics", self._port)

    def place(self) -> dict[str, Any]:
        """For ``status``."""
        return {"port": self._port, "error": self._error}


def _keep_newest(times: dict[tuple[str, str], float], key: tuple[str, str], save: Mapping[str, Any] | None) -> None:
    if save is not None:
        with suppress(ValueError):
            times[key] = max(times.get(key, 0.0), parse_rfc3339(save["created_at"]).timestamp())


def _gauge(name: str, help_text: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(f"ckptstore_{name}", help_text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
