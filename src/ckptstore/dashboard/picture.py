"""The report as one picture: PNG, SVG or PDF, drawn by matplotlib, which needs no browser and no network.

Plotly draws in browsers and would need one at hand, so a picture has the same facts and lines of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptstore.dashboard.report import Facts
from ckptstore.dashboard.words import count, human_seconds, utc
from ckptstore.errors import ConfigError

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError(
        f"pictures need {error.name}", hint="pip install 'ckptstore[plot]'; -o report.html needs no more"
    ) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ALARMS = 4

_INK, _MUTED, _GOOD, _WARN, _BAD, _LINES = (
    "#1b1f27",
    "#5a6372",
    "#0d7a50",
    "#8a5300",
    "#b3201d",
    ("#2f6fed", "#d1601f", "#0d8f63"),
)
_VERDICTS = {"safe": _GOOD, "at risk": _WARN, "not safe": _BAD}
#: Flag in the series -> word, marker, colour.
_MARKS = {"p": ("pinned", "D", _WARN), "e": ("emergency", "X", _BAD), "r": ("resumed from", ">", _LINES[1])}


def draw(facts: Facts, path: Path, kind: str) -> None:
    """Write the picture.

    Args:
        kind: "png", "svg" or "pdf".

    Raises:
        OSError: as the disk said.
    """
    # Names come from training scripts: a dollar in one is no formula. A font may lack a letter, which is no news.
    settings: dict[str, Any] = {"text.parse_math": False, "font.size": 9, "svg.hashsalt": "ckptstore"}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(12, 10), layout="constrained")
        top, curves, below = figure.subfigures(3, 1, height_ratios=[0.85, 2.2, 1.5])
        _head(top.subplots(), facts)
        _curve(curves.subplots(), facts, _main_metric(facts))
        left, right = below.subplots(1, 2)
        _pace(left, facts)
        _held(right, facts)
        figure.savefig(path, format=kind, dpi=120)


def _main_metric(facts: Facts) -> str | None:
    names = [*facts.series["metrics"], *(n for n in facts.live["metrics"] if n not in facts.series["metrics"])]
    return next(iter(names), None)


def _head(axes: Axes, facts: Facts) -> None:
    axes.set_axis_off()
    found = facts.safety
    say: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "color": _INK}
    axes.text(0, 1.0, facts.view.run, fontsize=16, fontweight="bold", **say)
    axes.text(
        0,
        0.80,
        found.verdict.upper(),
        fontsize=12,
        fontweight="bold",
        **{**say, "color": _VERDICTS.get(found.verdict, _MUTED)},
    )
    newest = "" if found.newest is None else f", newest step {found.newest.step} of {utc(found.newest.created_at)}"
    axes.text(1, 1.0, f"as of {utc(facts.now)}\n{facts.store}", ha="right", **{**say, "color": _MUTED})
    axes.text(0, 0.64, f"{count(found.num_checkpoints, 'checkpoint')}{newest}", **say)
    lines = []
    for level in found.levels:
        lost = (
            "everything"
            if level.state == "none"
            else "not known"
            if level.state == "unknown"
            else human_seconds(level.lost_s)
        )
        steps = f", {count(level.lost_steps, 'step')}" if level.lost_steps else ""
        step = "–" if level.step is None else f"step {level.step}"
        lines.append(f"if {level.lost_if}: {step} is held on {level.name}; lost: {lost}{steps}")
    lines += [f"{alarm.severity}: {alarm.title}" for alarm in found.alarms[:MAX_ALARMS]]
    axes.text(0, 0.50, "\n".join(line[:150] for line in lines), linespacing=1.5, **say)


def _curve(axes: Axes, facts: Facts, metric: str | None) -> None:
    _tidy(axes, metric or "no metric was given to save()", "step")
    if metric is None:
        axes.set_axis_off()
        return
    live, series = facts.live, facts.series
    for number, (steps, values) in enumerate(_pieces(live["step"], live["metrics"].get(metric, []))):
        axes.plot(steps, values, color=_LINES[0], linewidth=0.8, alpha=0.7, label="live" if number == 0 else None)
    at_saves = [_number(value) for value in series["metrics"].get(metric, [])]
    kept = [i for i, v in enumerate(at_saves) if v is not None and "s" not in series["flags"][i]]
    style = "o" if live["metrics"].get(metric) else "o-"
    axes.plot(
        [series["step"][i] for i in kept],
        [at_saves[i] for i in kept],
        style,
        color=_LINES[0],
        markersize=3.5,
        label="checkpoints",
    )
    best = series["best"].get(metric)
    starred = [i for i in kept if series["save_id"][i] == best]
    axes.plot(
        [series["step"][i] for i in starred],
        [at_saves[i] for i in starred],
        "*",
        color=_GOOD,
        markersize=13,
        label=f"best ({series['direction'].get(metric, 'lowest')})",
    )
    for flag, (word, marker, color) in _MARKS.items():
        rows = [i for i, v in enumerate(at_saves) if v is not None and flag in series["flags"][i]]
        if rows:
            axes.plot(
                [series["step"][i] for i in rows],
                [at_saves[i] for i in rows],
                marker,
                color=color,
                markersize=8,
                label=word,
            )
    for word, events, color, dash in (
        ("resume", series["resumes"], _MUTED, ":"),
        ("crash", live["crashes"], _BAD, "--"),
    ):
        for number, event in enumerate(events[-60:]):
            axes.axvline(event["step"], color=color, linestyle=dash, linewidth=1, label=word if number == 0 else None)
    axes.legend(loc="upper right", fontsize=8, frameon=False, ncols=2)


def _pace(axes: Axes, facts: Facts) -> None:
    _tidy(axes, "steps per second", "step")
    live, series = facts.live, facts.series
    source = live if live["step"] else series
    for steps, values in _pieces(source["step"], source["steps_per_second"]):
        axes.plot(steps, values, color=_LINES[2], linewidth=1)
    axes.set_ylim(bottom=0)


def _held(axes: Axes, facts: Facts) -> None:
    data = facts.storage
    largest = max([held[-1] for held in (*data["held"].values(), data["stored"]) if held], default=0)
    unit, power = next(
        ((u, p) for u, p in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)) if largest >> p), ("B", 0)
    )
    _tidy(axes, f"{unit} held", "")
    times = [datetime.fromtimestamp(time, timezone.utc) for time in data["time"]]
    for (name, held), color in zip(data["held"].items(), _LINES, strict=False):
        axes.step(
            times, [value / (1 << power) for value in held], where="post", color=color, label=f"{name}, as loaded"
        )
    if data["stored"]:
        sent = [value / (1 << power) for value in data["stored"]]
        axes.step(times, sent, where="post", color=_MUTED, linestyle="--", label="uploaded")
    axes.tick_params(axis="x", rotation=20)
    axes.set_ylim(bottom=0)
    if times:
        axes.legend(loc="upper left", fontsize=8, frameon=False)


def _tidy(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontweight="bold")
    axes.set_xlabel(below, color=_MUTED)
    axes.grid(color="#e3e7ee", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _pieces(steps: Sequence[int], values: Sequence[Any]) -> list[tuple[list[int], list[float]]]:
    """The curve cut where a job went on from an earlier step, and where there is no value."""
    found: list[tuple[list[int], list[float]]] = [([], [])]
    last: int | None = None
    for step, given in zip(steps, values, strict=False):
        value = _number(given)
        if value is None or (last is not None and step <= last):
            found.append(([], []))
        last = step
        if value is not None:
            found[-1][0].append(step)
            found[-1][1].append(value)
    return [piece for piece in found if piece[0]]


def _number(value: float | str | None) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
