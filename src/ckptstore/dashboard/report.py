"""One HTML file that says how a run went: it opens anywhere, without the store, a server or a network."""

from __future__ import annotations

import json
import secrets
from datetime import datetime
from typing import Any

from ckptstore.dashboard import curves, detail, safety, storage, table
from ckptstore.dashboard.app import content, environment, style_ids
from ckptstore.dashboard.source import RunView, Source
from ckptstore.errors import CkptError

#: Rows of the table; curves have all checkpoints.
TABLE_ROWS = 300


def render(source: Source, run: str, *, store: str, now: datetime) -> str:
    """The report of a run, about 5 MB, most of it Plotly.

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
    )
    shown = table.make(view, {})
    best = {row.info.save_id: row.best_for for row in shown.rows}
    data = {
        "series.json": curves.series(view),
        "storage.json": storage.series(view),
        "history.json": _history(source, view),
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            view=view,
            safety=found,
            now=now,
            store=store,
            tiers=storage.tiers(view),
            forecast=storage.forecast(view, source.disk()),
            metrics=curves.metric_names(view.infos),
            rows=[
                table.Row(i, best.get(i.save_id, ()), table.stored_bytes(view, i.save_id))
                for i in view.line[-TABLE_ROWS:][::-1]
            ],
            num_rows=len(view.line),
            nonce=secrets.token_urlsafe(16),
            styles=style_ids(),
            css=_inline(content("app.css").decode(), "style"),
            plotly=_inline(content("plotly.min.js").decode(), "script"),
            charts=_inline(content("charts.js").decode(), "script"),
            data=_packed(data),
        )
    )


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
