"""One line for a queue."""

from __future__ import annotations

from ckptstore.cli.queues import queue_line


def test_line_tells_rate_cap_time_left_and_trouble_when_known() -> None:
    quiet = {"queue": [], "lag_seconds": 0.0, "rate_bytes_per_s": None, "eta_seconds": 0.0, "skipped": 0, "error": None}
    assert queue_line("r", "s3", quiet) == "run r -> s3: 0 waiting, lag 0 s"
    busy = {
        "queue": [{}, {}],
        "lag_seconds": 75.0,
        "rate_bytes_per_s": 5 << 20,
        "cap_bytes_per_s": 1e7,
        "eta_seconds": 600.0,
        "skipped": 3,
        "error": {"class": "TransientError", "message": "busy\x1b[2J"},
    }
    line = queue_line("r", "s3", busy)
    assert line.startswith(
        "run r -> s3: 2 waiting, lag 75 s, 5.0 MiB/s, capped at 9.5 MiB/s, 10 min left, 3 skipped, busy"
    )
    assert "\x1b" not in line
