"""What happens between checkpoints: the live curve, where jobs resumed, and where they ended without a goodbye."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from ckptstore.dashboard.journals import Journals, when
from ckptstore.dashboard.source import RunView

#: Points of the live curve that are sent; a longer one is thinned evenly, its end kept.
MAX_POINTS = 4000
#: A gap of so many seconds says nothing about the pace.
PAUSE_SECONDS = 300.0
#: Steps beyond what a browser counts exactly are not ours.
MAX_STEP = 1 << 53
#: Computed here, from the times of the points.
PACE = "steps_per_second"


def live(view: RunView, journals: Journals) -> dict[str, Any]:
    """The curve between checkpoints, by column, and where jobs ended."""
    points = [point for record in journals.records(view.run, "live") if (point := _point(record)) is not None]
    pace = _pace(points)
    every = max(1, -(-len(points) // MAX_POINTS))
    kept = [i for i in range(len(points)) if i % every == 0 or i == len(points) - 1]
    names = sorted({name for i in kept for name in points[i]["metrics"]})
    return {
        "step": [points[i]["step"] for i in kept],
        "time": [points[i]["time"] for i in kept],
        "epoch": [points[i]["epoch"] for i in kept],
        "metrics": {name: [points[i]["metrics"].get(name) for i in kept] for name in names},
        PACE: [pace[i] for i in kept],
        "crashes": _crashes(journals.records(view.run, "jobs"), points),
    }


def resumes(view: RunView) -> list[dict[str, Any]]:
    """Where a line of the run continues from a checkpoint: its step and, as time, the first save that says so."""
    found: dict[int, dict[str, Any]] = {}
    for record, info in zip(view.catalog.records, view.infos, strict=True):
        parent = record.summary.parent
        if parent is not None and record.summary.timeline not in found:
            found[record.summary.timeline] = {
                "timeline": record.summary.timeline,
                "step": parent.step,
                "save_id": parent.save_id,
                "time": info.created_at.timestamp(),
            }
    return list(found.values())


def _point(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """A line of the journal, if it is what we write."""
    time, step, epoch, metrics = when(record), record.get("step"), record.get("epoch"), record.get("metrics")
    if time is None or not isinstance(step, int) or isinstance(step, bool) or abs(step) > MAX_STEP:
        return None
    if not isinstance(metrics, dict):
        return None
    values = {str(name): value for name, value in metrics.items() if _is_value(value)}
    return {
        "time": time.timestamp(),
        "step": step,
        "epoch": epoch if isinstance(epoch, int) else None,
        "metrics": values,
        "begins": record.get("begins") is True,
    }


def _is_value(value: object) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return is_number(value) and math.isfinite(value)


def is_number(value: object) -> TypeGuard[float]:
    """A number that a float can hold; NaN and the infinities are."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def _pace(points: Sequence[Mapping[str, Any]]) -> list[float | None]:
    found: list[float | None] = [None] if points else []
    for before, point in pairwise(points):
        seconds, steps = point["time"] - before["time"], point["step"] - before["step"]
        is_pace = not point["begins"] and 0 < seconds < PAUSE_SECONDS and steps > 0
        found.append(steps / seconds if is_pace else None)
    return found


def _crashes(records: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At the last step that is known of the job: from the live curve, else its last save."""
    found = []
    for record in records:
        time = when(record)
        step = record.get("step")
        if record.get("ended") != "lost" or time is None or not isinstance(step, int):
            continue
        last = [
            p["step"] for p in points if p["time"] <= time.timestamp() and time.timestamp() - p["time"] < PAUSE_SECONDS
        ]
        found.append(
            {"time": time.timestamp(), "step": max(step, last[-1]) if last else step, "rank": record.get("rank")}
        )
    return found
