"""The web application: pages, the JSON behind their charts, and nothing that changes a store.

Every page is rendered here, once as a whole and, with ``?live=1``, as JSON of its parts, which the browser puts in
place where they differ. All addresses are relative, so that any prefix of a proxy will do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from ckptstore._version import __version__
from ckptstore.clock import rfc3339
from ckptstore.dashboard import curves, detail, safety, storage, table, words
from ckptstore.dashboard.guard import LOOPBACK_HOSTS, Guard
from ckptstore.dashboard.source import RunView, Source
from ckptstore.errors import CkptError, ConfigError, NotFoundError

try:
    import jinja2
    import plotly
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ConfigError(f"the dashboard needs {error.name}", hint="pip install 'ckptstore[dashboard]'") from None

__all__ = ["create_app"]

Handler = Callable[[Request], Response]

#: Histories of so many checkpoints are remembered.
MAX_HISTORIES = 16

_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_STATIC = ("app.css", "app.js", "charts.js", "icon.svg", "plotly.min.js", "theme.js")


def create_app(
    source: Source,
    *,
    store: str,
    hosts: frozenset[str] | None = LOOPBACK_HOSTS,
    token: str | None = None,
    prefix: str = "",
) -> Guard:
    """The dashboard as an ASGI application.

    Args:
        source: what it shows; stays the caller's to close.
        store: the store as a person types it, for the commands that pages offer to copy.
        hosts: names it may be addressed by; None: any.
        token: what visitors must bring.
        prefix: path that a proxy leaves in front.
    """
    pages = _Pages(source, store)
    routes = [
        Route("/", pages.overview),
        Route("/run/{run}/", pages.run),
        Route("/run/{run}/training", pages.training),
        Route("/run/{run}/checkpoints", pages.checkpoints),
        Route("/run/{run}/checkpoint/{save_id}/", pages.checkpoint),
        Route("/run/{run}/storage", pages.storage),
        Route("/run/{run}/series.json", pages.series),
        Route("/run/{run}/history.json", pages.history),
        Route("/run/{run}/series.csv", pages.csv),
        Route("/run/{run}/storage.json", pages.storage_series),
        Route("/run/{run}/checkpoint/{save_id}/detail.json", pages.detail),
        Route("/api/status.json", pages.status),
        Route("/healthz", lambda request: Response("ok\n", media_type="text/plain")),
        Route("/static/{name}", _static),
    ]
    handlers = {CkptError: pages.failed, HTTPException: pages.refused, Exception: pages.broken}
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,  # type: ignore[arg-type]
        middleware=[Middleware(GZipMiddleware, minimum_size=4096, compresslevel=4)],
    )
    return Guard(app, hosts=hosts, token=token, prefix=prefix)


def environment() -> jinja2.Environment:
    """Templates, everything escaped, with the words they use."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("ckptstore.dashboard", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(bytes=words.human_bytes, seconds=words.human_seconds, number=words.human_number, utc=words.utc)
    made.globals.update(
        count=words.count, rfc3339=rfc3339, asset=_asset, style_ids=style_ids, version=__version__, query=_query
    )
    return made


class _Pages:
    """One method per page; each reads the source and fills a template."""

    def __init__(self, source: Source, store: str) -> None:
        self._source = source
        self._store = store
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
        context = {"view": view, "safety": self._assess(view), "looks": self._source.looks(view.run)}
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
        context = {"view": view, "table": table.make(view, request.query_params)}
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
        }
        title = f"{view.run}: step {info.step}"
        return self._page(request, "checkpoint.html", ("_checkpoint.html",), context, title=title)

    def storage(self, request: Request) -> Response:
        view = self._view(request)
        disk = self._source.disk()
        context = {"view": view, "tiers": storage.tiers(view), "forecast": storage.forecast(view, disk)}
        return self._page(request, "storage.html", ("_storage.html",), context, title=f"{view.run}: storage")

    # ------------------------------------------------------------------ data

    def status(self, request: Request) -> Response:
        runs = [self._assess(self._source.view(name)).to_json() for name in self._source.runs()]
        disk = self._source.disk()
        agent = self._source.agent.status
        body = {
            "schema_version": 1,
            "runs": runs,
            "local_free_bytes": None if disk is None else disk[0],
            "is_agent_running": agent is not None,
        }
        return _json(request, body)

    def series(self, request: Request) -> Response:
        view = self._view(request)
        return _send_json(request, *view.remember("series", lambda: _encoded(curves.series(view))))

    def history(self, request: Request) -> Response:
        view = self._view(request)
        newest = view.line[-1].save_id if view.line else None
        return _json(request, self._history(view, newest))

    def csv(self, request: Request) -> Response:
        view = self._view(request)
        headers = {"content-disposition": f'attachment; filename="{view.run}.csv"', "cache-control": "no-store"}
        return Response(curves.to_csv(view), media_type="text/csv; charset=utf-8", headers=headers)

    def storage_series(self, request: Request) -> Response:
        view = self._view(request)
        key = f"storage {len(view.notes)} {view.num_notes}"
        return _send_json(request, *view.remember(key, lambda: _encoded(storage.series(view))))

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
        return _json(request, body)

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
        return self._error(request, error.status_code, "there is no such page", "the first page lists every run")

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
        )

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
        }
        if "live" in request.query_params and parts:
            regions = {part.strip("_").removesuffix(".html"): self._render(part, full) for part in parts}
            return _json(request, {"title": title, "regions": regions})
        body = self._render(template, full)
        return Response(
            body, status_code=status, media_type="text/html; charset=utf-8", headers={"cache-control": "no-store"}
        )

    def _render(self, template: str, context: Mapping[str, Any]) -> str:
        return self._templates.get_template(template).render(context)


def _json(request: Request, body: object) -> Response:
    return _send_json(request, *_encoded(body))


def _encoded(body: object) -> tuple[bytes, str]:
    """JSON, and a tag of it, so that a poll that finds nothing new costs a few bytes."""
    data = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return data, f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'


def _send_json(request: Request, data: bytes, tag: str) -> Response:
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type="application/json", headers=headers)


def _query(parameters: Mapping[str, Any], **changes: Any) -> str:
    """A query string of what differs from the defaults."""
    from urllib.parse import urlencode

    return "?" + urlencode({k: v for k, v in {**parameters, **changes}.items() if v not in ("", None)})


@lru_cache(maxsize=16)
def content(name: str) -> bytes:
    """A static file, ours or Plotly's."""
    if name == "plotly.min.js":
        return resources.files(plotly).joinpath("package_data", name).read_bytes()
    return resources.files("ckptstore.dashboard").joinpath("static", name).read_bytes()


@lru_cache(maxsize=1)
def style_ids() -> tuple[str, ...]:
    """Style elements that Plotly's bundle makes for itself unless they are there.

    Made by it they would be inline styles without our nonce, which the content policy refuses.
    """
    own = re.findall(rb'document\.getElementById\("([0-9a-f]{32,64})"\)', content("plotly.min.js"))
    return ("plotly.js-style-global", *(name.decode() for name in own))


@lru_cache(maxsize=16)
def _asset(name: str) -> str:
    """Relative address of a static file, with a tag of its content."""
    return f"static/{name}?v={hashlib.blake2b(content(name), digest_size=6).hexdigest()}"


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404)
    forever = "public, max-age=31536000, immutable"
    headers = {"cache-control": forever if "v" in request.query_params else "no-cache"}
    return Response(content(name), media_type=_TYPES[name[name.rindex(".") :]], headers=headers)
