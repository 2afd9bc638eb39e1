"""The pages: one method each, which reads the source and fills a template, and the JSON behind the charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ckptstore.dashboard import curves, detail, marks, plan, safety, storage, table
from ckptstore.dashboard.actions import Actions
from ckptstore.dashboard.answers import answer_encoded, answer_json, encoded
from ckptstore.dashboard.assets import environment
from ckptstore.dashboard.costs import Costs
from ckptstore.dashboard.source import RunView, Source
from ckptstore.errors import CkptError, NotFoundError

#: Histories of so many checkpoints are remembered.
MAX_HISTORIES = 16

_REFUSALS = {
    403: ("this form is not from this dashboard", "load the page again"),
    405: ("that can't be done here", "the first page lists every run"),
    413: ("this form is too long", "load the page again"),
    429: ("too many verifications are waiting", "try again when some have ended"),
}


class Pages:
    """Everything that is answered with what the source knows."""

    def __init__(self, source: Source, store: str, *, actions: Actions | None, costs: Costs) -> None:
        self._source = source
        self._store = store
        self._actions = actions
        self._costs = costs
        self._histories: dict[str, dict[str, Any]] = {}
        self._templates = environment()

    # ------------------------------------------------------------------ pages

    def overview(self, request: Request) -> Response:
        runs, broken = [], []
        for name in self._source.runs():
            try:
                runs.append(self._assess(self._source.view(name)))
            except CkptError as error:
                broken.append((name, error))
        order = {"not safe": 0, "at risk": 1, "looking": 2, "safe": 3, "empty": 4}
        runs.sort(key=lambda one: (order[one.verdict], not one.is_training, one.run))
        context = {
            "runs": runs,
            "broken": broken,
            "disk": self._source.disk(),
            "agent": self._source.agent.status,
            "agent_error": self._source.agent.error,
            "has_local": self._source.local is not None,
            "is_waiting": self._source.is_waiting_for_runs,
            "remote_error": self._source.remote_error,
        }
        return self._page(request, "overview.html", ("_overview.html",), context, title="Is my training safe?")

    def run(self, request: Request) -> Response:
        view = self._view(request)
        context = {
            "view": view,
            "safety": self._assess(view),
            "looks": self._source.looks(view.run),
            "verified": self._source.journals.looks(view.run, most=5),
        }
        return self._page(request, "run.html", ("_safety.html",), context, title=view.run)

    def training(self, request: Request) -> Response:
        view = self._view(request)
        others = [name for name in self._source.runs() if name != view.run]
        chosen = [name for name in request.query_params.getlist("with") if name in others]
        context = {
            "view": view,
            "others": others,
            "chosen": chosen,
            "metrics": curves.metric_names(view.infos),
            "newest": view.line[-5:][::-1],
        }
        return self._page(request, "training.html", ("_newest.html",), context, title=f"{view.run}: training")

    def checkpoints(self, request: Request) -> Response:
        view = self._view(request)
        context = {"view": view, "table": table.make(view, request.query_params, self._plans(view))}
        return self._page(request, "checkpoints.html", ("_table.html",), context, title=f"{view.run}: checkpoints")

    def checkpoint(self, request: Request) -> Response:
        view = self._view(request)
        record = detail.find(view, request.path_params["save_id"])
        info = record.info()
        self._source.notes_of(view.run, info.save_id)
        context = {
            "view": view,
            "info": info,
            "summary": record.summary,
            "stored_bytes": table.stored_bytes(view, info.save_id),
            "best_for": [
                name
                for name in curves.metric_names([info])
                if (found := curves.best_of(view.line, name)) is not None and found.save_id == info.save_id
            ],
            "store": self._store,
            "reasons": plan.reasons(self._plans(view), info),
            "rests_on": [view.by_id.get(one) or one for one in plan.rests_on(view, info.save_id)],
            "verified": self._source.journals.looks(view.run, info.save_id),
            "form_token": None if self._actions is None else self._actions.form_token,
            "verifying": None if self._actions is None else self._actions.verifying(view.run, info.save_id),
        }
        title = f"{view.run}: step {info.step}"
        return self._page(request, "checkpoint.html", ("_checkpoint.html",), context, title=title)

    def storage(self, request: Request) -> Response:
        view = self._view(request)
        disk = self._source.disk()
        plans = self._plans(view)
        context = {
            "view": view,
            "tiers": storage.tiers(view),
            "forecast": storage.forecast(view, disk, plans),
            "savings": storage.savings(view),
            "plans": plans,
            "bills": self._costs.of(view.run, self._source.tiers(view.run).remotes),
        }
        return self._page(request, "storage.html", ("_storage.html",), context, title=f"{view.run}: storage")

    # ------------------------------------------------------------------ data

    def status(self, request: Request) -> Response:
        runs: list[Mapping[str, Any]] = []
        for name in self._source.runs():
            try:
                runs.append(self._assess(self._source.view(name)).to_json())
            except CkptError as error:
                runs.append({"run": name, "error": error.message})
        disk = self._source.disk()
        agent = self._source.agent.status
        body = {
            "schema_version": 1,
            "runs": runs,
            "local_free_bytes": None if disk is None else disk[0],
            "is_agent_running": agent is not None,
        }
        return answer_json(request, body)

    def series(self, request: Request) -> Response:
        view = self._view(request)
        return answer_encoded(request, *view.remember("series", lambda: encoded(curves.series(view))))

    def live(self, request: Request) -> Response:
        view, journals = self._view(request), self._source.journals
        key = f"live {journals.stamp(view.run, 'live')} {journals.stamp(view.run, 'jobs')}"
        return answer_encoded(request, *view.remember(key, lambda: encoded(marks.live(view, journals))))

    def history(self, request: Request) -> Response:
        view = self._view(request)
        newest = view.line[-1].save_id if view.line else None
        return answer_json(request, self._history(view, newest))

    def csv(self, request: Request) -> Response:
        view = self._view(request)
        headers = {"content-disposition": f'attachment; filename="{view.run}.csv"', "cache-control": "no-store"}
        return Response(curves.to_csv(view), media_type="text/csv; charset=utf-8", headers=headers)

    def storage_series(self, request: Request) -> Response:
        view = self._view(request)
        key = f"storage {len(view.notes)} {view.num_notes}"
        return answer_encoded(request, *view.remember(key, lambda: encoded(storage.series(view))))

    def detail(self, request: Request) -> Response:
        view = self._view(request)
        record = detail.find(view, request.path_params["save_id"])
        bars = detail.waterfall(self._source.notes_of(view.run, record.save_id))
        body: dict[str, Any] = {
            "bars": [[bar.row, bar.stage, bar.start_s, bar.length_s] for bar in bars],
            "treemap": None,
            "trouble": None,
        }
        try:
            found, trouble = detail.tensors(self._source.tiers(view.run), record)
            kinds: dict[str, list[int]] = {}
            for tensor in found:
                row = kinds.setdefault(tensor.sent or "unknown", [0, 0, 0])
                row[0] += 1
                row[1] += tensor.size_bytes
                row[2] += tensor.stored_bytes or 0
            body |= {"treemap": detail.treemap(found), "trouble": trouble, "kinds": kinds, "num_tensors": len(found)}
            body["largest"] = [
                [t.name, t.dtype, "×".join(map(str, t.shape)) or "scalar", t.size_bytes, t.sent] for t in found[:20]
            ]
        except CkptError as error:
            body["trouble"] = error.message
        return answer_json(request, body)

    def _history(self, view: RunView, save_id: str | None) -> dict[str, Any]:
        """Of one save, which does not change; the last few are remembered."""
        if save_id is None:
            return {"save_id": None, "histories": [], "trouble": None}
        known = self._histories.get(save_id)
        if known is None:
            try:
                found = detail.state_tree(self._source.tiers(view.run), detail.find(view, save_id))
                known = {"save_id": save_id, "histories": curves.histories(found), "trouble": None}
            except CkptError as error:
                return {"save_id": save_id, "histories": [], "trouble": error.message}
            self._histories[save_id] = known
            while len(self._histories) > MAX_HISTORIES:
                self._histories.pop(next(iter(self._histories)), None)
        return known

    # ------------------------------------------------------------------ errors

    def failed(self, request: Request, error: CkptError) -> Response:
        status = 404 if isinstance(error, NotFoundError) else 503
        return self._error(request, status, error.message, error.hint or "")

    def refused(self, request: Request, error: HTTPException) -> Response:
        message, hint = _REFUSALS.get(error.status_code, ("there is no such page", "the first page lists every run"))
        return self._error(request, error.status_code, message, hint)

    def broken(self, request: Request, error: Exception) -> Response:
        return self._error(
            request, 500, f"unexpected {type(error).__name__}", "the terminal of the dashboard says more"
        )

    def _error(self, request: Request, status: int, message: str, hint: str) -> Response:
        if request.url.path.endswith(".json") or "live" in request.query_params:
            return JSONResponse({"error": message, "hint": hint}, status_code=status)
        context = {"message": message, "hint": hint, "status": status}
        return self._page(request, "error.html", (), context, title="Not here", status=status)

    # ------------------------------------------------------------------ inside

    def _view(self, request: Request) -> RunView:
        return self._source.view(request.path_params["run"])

    def _assess(self, view: RunView) -> safety.Safety:
        sizes = {info.save_id: info.size_bytes for info in view.line[-200:]}
        return safety.assess(
            view,
            now=self._source.clock.now(),
            agent=self._source.agent.status,
            agent_run=self._source.agent.run(view.run),
            uploads=self._source.uploading(view.run, sizes),
            looks=self._source.looks(view.run),
            disk=self._source.disk(),
            store=self._store,
            read_back_at=self._source.journals.read_back_at(view.run),
        )

    def _plans(self, view: RunView) -> list[plan.TierPlan]:
        """The retention of the run, worked out once while nothing changes."""
        rules, good = self._source.journals.rules(view.run), self._source.journals.well_read(view.run)
        key = f"plans {hash((str(rules), good))}"
        return view.remember(key, lambda: plan.plans(view, rules, good))

    def _page(
        self,
        request: Request,
        template: str,
        parts: tuple[str, ...],
        context: Mapping[str, Any],
        *,
        title: str,
        status: int = 200,
    ) -> Response:
        path = request.scope["path"]
        full = {
            **context,
            "title": title,
            "store": self._store,
            "root": "../" * (path.count("/") - 1) or "./",
            "page": template.removesuffix(".html"),
            "run_name": request.path_params.get("run") if status == 200 else None,
            "nonce": request.scope["ckptstore.nonce"],
            "can_act": self._actions is not None,
        }
        if "live" in request.query_params and parts:
            regions = {part.strip("_").removesuffix(".html"): self._render(part, full) for part in parts}
            return answer_json(request, {"title": title, "regions": regions})
        body = self._render(template, full)
        return Response(
            body, status_code=status, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"}
        )

    def _render(self, template: str, context: Mapping[str, Any]) -> str:
        return self._templates.get_template(template).render(context)
