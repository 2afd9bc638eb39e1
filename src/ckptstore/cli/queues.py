"""An agent's upload queue in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.cli.output import plain
from ckptstore.ops.words import human_bytes, human_seconds


def queue_line(run: str, remote: str, said: Mapping[str, Any]) -> str:
    """How many saves wait for a remote, for how long, how fast they go, and when they will be there."""
    parts = [f"{len(said['queue'])} waiting, lag {human_seconds(said['lag_seconds'])}"]
    if said.get("rate_bytes_per_s") is not None:
        parts.append(f"{human_bytes(said['rate_bytes_per_s'])}/s")
    if said.get("cap_bytes_per_s") is not None:
        parts.append(f"capped at {human_bytes(int(said['cap_bytes_per_s']))}/s")
    if said["queue"] and said.get("eta_seconds") is not None:
        parts.append(f"{human_seconds(said['eta_seconds'])} left")
    if said.get("skipped"):
        parts.append(f"{said['skipped']} skipped")
    if said.get("error"):
        parts.append(str(said["error"]["message"]))
    return plain(f"run {run} -> {remote}: {', '.join(parts)}")
