"""What a run looks like at one moment, to keep or to send: one HTML file that opens anywhere, or its facts."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ckptstore.dashboard import curves, detail, marks, plan, safety, storage, table
from ckptstore.dashboard.assets import content, environment, style_ids
from ckptstore.dashboard.costs import Bill, Costs
from ckptstore.dashboard.source import RunView, Source
from ckptstore.errors import CkptError
from ckptstore.ops.settings import Settings

#: Rows of the table; curves have all checkpoints.
TABLE_ROWS = 300


@dataclass(frozen=True)
class Facts:
    """Everything a report speaks of."""

    view: RunView
    safety: safety.Safety
    plans: list[plan.TierPlan]
    series: dict[str, Any]
    live: dict[str, Any]
    storage: dict[str, Any]
    now: datetime
    store: str


def gather(source: Source, run: str, *, store: str, now: datetime) -> Facts:
    """The facts of a run.

    Args:
        source: where to look; waits for its remotes.
        run: the run.
        store: as a person types it.
        now: the time the report speaks of.

    Raises:
        CheckpointNotFoundError: no such run.
        CkptError: the local tier can't be read.
    """
    view = source.look_now(run)
    sizes = {info.save_id: info.size_bytes for info in view.line}
    found = safety.assess(
        view,
        now=now,
        agent=source.agent.status,
        agent_run=source.agent.run(run),
        uploads=source.uploading(run, sizes),
        looks=source.looks(run),
        disk=source.disk(),
        store=store,
        read_back_at=source.journals.read_back_at(run),
    )
    plans = plan.plans(view, source.journals.rules(run), source.journals.well_read(run))
    live = marks.live(view, source.journals)
    return Facts(view, found, plans, curves.series(view), live, storage.series(view), now, store)


def render(source: Source, run: str, *, store: str, now: datetime) -> str:
    """The report as HTML, about 5 MB, most of it Plotly. Arguments and errors as of :func:`gather`."""
    facts = gather(source, run, store=store, now=now)
    view, metrics = facts.view, curves.metric_names(facts.view.infos)
    best = table.best_for(view, metrics)
    data = {
        "series.json": facts.series,
        "storage.json": facts.storage,
        "live.json": facts.live,
        "history.json": _history(source, view),
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            view=view,
            safety=facts.safety,
            now=now,
            store=store,
            tiers=storage.tiers(view),
            forecast=storage.forecast(view, source.disk(), facts.plans),
            savings=storage.savings(view),
            plans=facts.plans,
            bills=_bills(source, run),
            metrics=metrics,
            rows=[
                table.row(view, info, best.get(info.save_id, ()), facts.plans) for info in view.line[-TABLE_ROWS:][::-1]
            ],
            num_rows=len(view.line),
            nonce=secrets.token_urlsafe(16),
            styles=style_ids(),
            css=_inline(content("app.css").decode(), "style"),
            plotly=_inline(content("plotly.min.js").decode(), "script"),
            charts=_inline(content("charts.js").decode(), "script"),
            training=_inline(content("training.js").decode(), "script"),
            data=_packed(data),
        )
    )


def _bills(source: Source, run: str) -> list[Bill]:
    return Costs(Settings.read().prices()).count(run, source.tiers(run).remotes)


def _history(source: Source, view: RunView) -> dict[str, Any]:
    if not view.line:
        return {"save_id": None, "histories": [], "trouble": None}
    save_id = view.line[-1].save_id
    try:
        found = detail.state_tree(source.tiers(view.run), detail.find(view, save_id))
    except CkptError as error:
        return {"save_id": save_id, "histories": [], "trouble": error.message}
    return {"save_id": save_id, "histories": curves.histories(found), "trouble": None}


def _packed(data: object) -> str:
    """JSON that no name in it can break out of."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _inline(text: str, element: str) -> str:
    """A file of ours or Plotly's, to be put into its element as it is."""
    if f"</{element}" in text.lower():
        text = text.replace(f"</{element}", f"<\\/{element}")
    return text
