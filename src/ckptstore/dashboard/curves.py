"""Training curves: a metric per checkpoint, and the longer histories that training scripts keep in their state."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

from ckptstore.dashboard import marks
from ckptstore.dashboard.source import RunView
from ckptstore.errors import FormatError
from ckptstore.format import tree
from ckptstore.format.manifest import Json
from ckptstore.types import CheckpointInfo, json_number

#: Points of one history that are sent; longer ones are thinned evenly, the last point kept.
MAX_POINTS = 5000
MAX_HISTORIES = 24
#: Metrics of these names are better when higher; all others when lower.
HIGHER_IS_BETTER = ("acc", "auc", "bleu", "f1", "map", "precision", "recall", "reward", "rouge", "score")


def higher_is_better(metric: str) -> bool:
    """A guess by name; the page says which way it went."""
    last = metric.replace("-", "_").replace("/", "_").lower().split("_")
    return any(part.startswith(word) for part in last for word in HIGHER_IS_BETTER)


def best_of(infos: Sequence[CheckpointInfo], metric: str) -> CheckpointInfo | None:
    """The save whose metric is best; ties go to the newest, NaN is never best."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    best: tuple[float, CheckpointInfo] | None = None
    for info in infos:
        value = info.metrics.get(metric)
        if value is not None and value == value and (best is None or sign * value >= best[0]):
            best = sign * value, info
    return best[1] if best else None


def metric_names(infos: Sequence[CheckpointInfo]) -> list[str]:
    """Every metric of any save: losses first, then by name."""
    names = {name for info in infos for name in info.metrics}
    return sorted(names, key=lambda name: (not name.endswith("loss"), name))


def series(view: RunView) -> dict[str, Any]:
    """Everything a chart needs, by column: one entry per save, oldest first, superseded ones marked."""
    infos = view.infos
    names = metric_names(infos)
    best = {name: found.save_id for name in names if (found := best_of(view.line, name)) is not None}
    resumes = marks.resumes(view)
    parents = {resume["save_id"] for resume in resumes}
    return {
        "run": view.run,
        "revision": view.revision,
        "step": [info.step for info in infos],
        "epoch": [info.epoch for info in infos],
        "time": [info.created_at.timestamp() for info in infos],
        "save_id": [info.save_id for info in infos],
        "flags": ["".join(_flags(info, parents)) for info in infos],
        "tags": {info.save_id: list(info.tags) for info in infos if info.tags},
        "metrics": {name: [_value(info, name) for info in infos] for name in names},
        "best": best,
        "direction": {name: "highest" if higher_is_better(name) else "lowest" for name in names},
        "resumes": resumes,
        "steps_per_second": _rates(infos),
    }


def _value(info: CheckpointInfo, name: str) -> float | str | None:
    value = info.metrics.get(name)
    return None if value is None else json_number(value)


def _flags(info: CheckpointInfo, parents: Collection[str]) -> Iterator[str]:
    """p: pinned, e: emergency, r: a job resumed from it, s: superseded, d: damaged in a tier."""
    if info.pinned:
        yield "p"
    if info.emergency:
        yield "e"
    if info.save_id in parents:
        yield "r"
    if info.superseded:
        yield "s"
    if "damaged" in info.tiers.values():
        yield "d"


def _rates(infos: Sequence[CheckpointInfo]) -> list[float | None]:
    """Steps per second since the job's previous save."""
    rates: list[float | None] = [None] if infos else []
    for before, info in pairwise(infos):
        seconds = (info.created_at - before.created_at).total_seconds()
        same = before.save_id.partition("-")[0] == info.save_id.partition("-")[0] and before.timeline == info.timeline
        rates.append((info.step - before.step) / seconds if same and seconds > 0 else None)
    return rates


def histories(encoded: Json | None) -> list[dict[str, Any]]:
    """Lists of numbers, and lists of records with numbers, anywhere in a state tree, longest first.

    Each is ``{"name", "x": [...] | None, "y": [...], "length"}``; ``x`` are the steps the records name; one without a
    finite step is left out.
    """
    if encoded is None:
        return []
    found: list[dict[str, Any]] = []
    try:
        for path, value in _lists(encoded):
            found += _as_histories(".".join(map(str, path)), value)
    except FormatError:
        return found
    found.sort(key=lambda one: (-one["length"], one["name"]))
    return found[:MAX_HISTORIES]


def _lists(encoded: Json) -> Iterator[tuple[tuple[str | int, ...], list[Any]]]:
    """Leaves that are lists; records in a list are gathered back into it."""
    rows: dict[tuple[str | int, ...], dict[int, dict[str, Any]]] = {}
    for path, value in tree.iter_leaves(encoded):
        if "param_groups" in path:
            continue  # an optimizer's settings, such as betas
        if isinstance(value, (list, tuple)):
            yield path, list(value)
        elif len(path) >= 3 and isinstance(path[-2], int) and isinstance(value, (int, float)):
            rows.setdefault(path[:-2], {}).setdefault(path[-2], {})[str(path[-1])] = value
    for path, by_index in rows.items():
        yield path, [by_index[index] for index in sorted(by_index)]


def _as_histories(name: str, values: list[Any]) -> Iterator[dict[str, Any]]:
    if len(values) < 2:
        return
    if all(marks.is_number(value) for value in values):
        # Small integers are shapes, seeds and random states far more often than curves.
        if any(isinstance(value, float) for value in values):
            yield _history(name, None, values)
        return
    if all(map(_is_pair, values)):
        rows = [value for value in values if _is_place(value[0])]
        if len(rows) >= 2:
            yield _history(name, [row[0] for row in rows], [row[1] for row in rows])
        return
    if not all(isinstance(value, dict) for value in values):
        return
    keys = dict.fromkeys(key for value in values for key in value)
    axis = next((key for key in ("step", "global_step", "iteration", "epoch") if key in keys), None)
    for key in keys:
        if key in ("step", "global_step", "iteration", "epoch", "time"):
            continue
        found = [row for row in values if marks.is_number(row.get(key)) and (axis is None or _is_place(row.get(axis)))]
        if len(found) >= 2:
            x = [row[axis] for row in found] if axis else None
            yield _history(f"{name}.{key}", x, [row[key] for row in found])


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(marks.is_number, value))


def _is_place(value: object) -> bool:
    """Whether it can be drawn along the axis."""
    return marks.is_number(value) and math.isfinite(value)


def _history(name: str, x: list[Any] | None, y: list[Any]) -> dict[str, Any]:
    length = len(y)
    every = -(-length // MAX_POINTS)
    kept = list(range(0, length, every))
    if kept[-1] != length - 1:
        kept.append(length - 1)
    axis = [x[i] for i in kept] if x is not None else [i + 1 for i in kept]
    return {
        "name": name,
        "axis": "step" if x is not None else "entry",
        "x": axis,
        "y": [json_number(float(y[i])) for i in kept],
        "length": length,
    }


def to_csv(view: RunView) -> str:
    """The same as a table for a spreadsheet; names can't become formulas there."""
    names = metric_names(view.infos)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["run", "step", "epoch", "created_at", "save_id", "timeline", "superseded", "pinned", "emergency", "tags"]
    writer.writerow([*columns, "size_bytes", *(f"tier:{tier}" for tier in view.tiers), *map(_inert, names)])
    for info in view.infos:
        row = info.to_json()
        values = [row[name] for name in columns[:-1]]
        tags = _inert(" ".join(info.tags))
        tiers = [info.tiers.get(tier, "unknown") for tier in view.tiers]
        writer.writerow([*values, tags, info.size_bytes, *tiers, *(info.metrics.get(name) for name in names)])
    return out.getvalue()


def _inert(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
