"""The checkpoint table: sorted and cut into pages on this side, so that ten thousand rows cost what fifty do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.dashboard.curves import best_of, metric_names
from ckptstore.dashboard.plan import TierPlan, reasons, rests_on
from ckptstore.dashboard.source import RunView
from ckptstore.types import CheckpointInfo

PAGE_ROWS = 50
MAX_METRICS = 6

_SORTS: dict[str, Callable[[CheckpointInfo], Any]] = {
    "step": lambda info: info.step,
    "epoch": lambda info: -1 if info.epoch is None else info.epoch,
    "age": lambda info: info.created_at,
    "size": lambda info: info.size_bytes,
}


@dataclass(frozen=True)
class Column:
    """A heading that sorts."""

    key: str
    label: str
    is_number: bool = True


@dataclass(frozen=True)
class Row:
    """One checkpoint, with what the run says about it.

    Attributes:
        reasons: why it stays, if the rules are known.
        rests_on: steps of the checkpoints whose packs it needs on the remote, as far as noted here.
    """

    info: CheckpointInfo
    best_for: tuple[str, ...]
    stored_bytes: int | None
    reasons: tuple[str, ...] = ()
    rests_on: tuple[int, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Uploaded over plain."""
        return (
            self.stored_bytes / self.info.size_bytes if self.stored_bytes is not None and self.info.size_bytes else None
        )


@dataclass(frozen=True)
class Table:
    """One page of the table.

    Attributes:
        sort, descending: the order in force.
        page, num_pages: from 1.
        num_rows: over all pages.
        has_reasons: whether the retention is known.
    """

    columns: tuple[Column, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    sort: str
    descending: bool
    page: int
    num_pages: int
    num_rows: int
    query: str
    show: str
    has_reasons: bool


def make(view: RunView, parameters: Mapping[str, str], plans: Sequence[TierPlan] = ()) -> Table:
    """The page these query parameters ask for; what they don't make sense of is ignored."""
    show = parameters.get("show", "line")
    infos = view.line if show != "all" else view.infos
    query = parameters.get("q", "")[:100].strip()
    if query:
        infos = [info for info in infos if _matches(info, query.lower())]
    metrics = metric_names(view.line)[:MAX_METRICS]
    sort = parameters.get("sort", "step")
    descending = parameters.get("order", "desc") != "asc"
    if sort.startswith("metric:") and sort[7:] in metrics:
        infos = _by_metric(infos, sort[7:], descending=descending)
    else:
        sort = sort if sort in _SORTS else "step"
        # Steps repeat over timelines; the order of the run settles ties.
        infos = sorted(infos, key=_SORTS[sort])
        if descending:
            infos.reverse()
    num_pages = max(1, -(-len(infos) // PAGE_ROWS))
    page = min(max(1, _integer(parameters.get("page", "1"))), num_pages)
    best = best_for(view, metrics)
    shown = infos[(page - 1) * PAGE_ROWS : page * PAGE_ROWS]
    return Table(
        columns=(Column("step", "Step"), Column("epoch", "Epoch"), Column("age", "Saved"), Column("size", "Size")),
        metrics=tuple(metrics),
        rows=tuple(row(view, info, best.get(info.save_id, ()), plans) for info in shown),
        sort=sort,
        descending=descending,
        page=page,
        num_pages=num_pages,
        num_rows=len(infos),
        query=query,
        show="all" if show == "all" else "line",
        has_reasons=bool(plans),
    )


def best_for(view: RunView, metrics: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """save_id -> the metrics by which it is the best of its line."""
    best: dict[str, tuple[str, ...]] = {}
    for name in metrics:
        found = best_of(view.line, name)
        if found is not None:
            best[found.save_id] = (*best.get(found.save_id, ()), name)
    return best


def row(view: RunView, info: CheckpointInfo, best_for: tuple[str, ...], plans: Sequence[TierPlan]) -> Row:
    """One checkpoint."""
    needed = [view.by_id[one].step for one in rests_on(view, info.save_id) if one in view.by_id]
    return Row(info, best_for, stored_bytes(view, info.save_id), reasons(plans, info), tuple(sorted(set(needed))))


def stored_bytes(view: RunView, save_id: str) -> int | None:
    """Bytes this save added to a remote, as far as the notes beside the local tier tell."""
    for name in view.remote_names:
        spans = view.notes.get(save_id, {}).get(f"remote {name}")
        if isinstance(spans, dict) and isinstance(spans.get("stored_bytes"), int):
            return int(spans["stored_bytes"])
    return None


def _by_metric(infos: list[CheckpointInfo], name: str, *, descending: bool) -> list[CheckpointInfo]:
    """By value; saves without the metric, or with NaN, last either way."""
    have = [info for info in infos if (value := info.metrics.get(name)) is not None and value == value]
    lack = [info for info in infos if (value := info.metrics.get(name)) is None or value != value]
    return sorted(have, key=lambda info: info.metrics[name], reverse=descending) + lack


def _matches(info: CheckpointInfo, query: str) -> bool:
    words = [str(info.step), info.save_id, *info.tags]
    words += [w for w, is_set in (("pinned", info.pinned), ("emergency", info.emergency)) if is_set]
    return any(query in word.lower() for word in words)


def _integer(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1
