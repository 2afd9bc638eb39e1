"""The web application: which address leads where. Nothing here changes a store, unless actions were allowed.

Every page is rendered on this side, once as a whole and, with ``?live=1``, as JSON of its parts, which the browser puts
in place where they differ. All addresses are relative, so that any prefix of a proxy will do.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptstore.dashboard import assets
from ckptstore.dashboard.guard import LOOPBACK_HOSTS, Guard
from ckptstore.dashboard.source import Source
from ckptstore.errors import CkptError, ConfigError
from ckptstore.ops.settings import PRICES

try:
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise ConfigError(f"the dashboard needs {error.name}", hint="pip install 'ckptstore[dashboard]'") from None

__all__ = ["create_app"]


def create_app(
    source: Source,
    *,
    store: str,
    hosts: frozenset[str] | None = LOOPBACK_HOSTS,
    token: str | None = None,
    prefix: str = "",
    allow_actions: bool = False,
    prices: Mapping[str, float] = PRICES,
) -> Guard:
    """The dashboard as an ASGI application.

    Args:
        source: what it shows; stays the caller's to close.
        store: the store as a person types it, for the commands that pages offer to copy.
        hosts: names it may be addressed by; None: any.
        token: what visitors must bring.
        prefix: path that a proxy leaves in front.
        allow_actions: visitors may pin, unpin and verify; needs a token.
        prices: dollars, for what a bucket costs.

    Raises:
        ConfigError: actions without a token.
    """
    from ckptstore.dashboard.actions import Actions
    from ckptstore.dashboard.costs import Costs
    from ckptstore.dashboard.pages import Pages

    if allow_actions and token is None:
        raise ConfigError("actions need a token: whoever has it may pin and verify", hint="leave --allow-actions out")
    actions = Actions(source, token) if allow_actions and token is not None else None
    pages = Pages(source, store, actions=actions, costs=Costs(prices))
    routes = [
        Route("/", pages.overview),
        Route("/run/{run}/", pages.run),
        Route("/run/{run}/training", pages.training),
        Route("/run/{run}/checkpoints", pages.checkpoints),
        Route("/run/{run}/checkpoint/{save_id}/", pages.checkpoint),
        Route("/run/{run}/storage", pages.storage),
        Route("/run/{run}/series.json", pages.series),
        Route("/run/{run}/live.json", pages.live),
        Route("/run/{run}/history.json", pages.history),
        Route("/run/{run}/series.csv", pages.csv),
        Route("/run/{run}/storage.json", pages.storage_series),
        Route("/run/{run}/checkpoint/{save_id}/detail.json", pages.detail),
        Route("/api/status.json", pages.status),
        Route("/healthz", lambda request: Response("ok\n", media_type="text/plain")),
        Route("/static/{name}", _static),
    ]
    if actions is not None:
        routes.append(Route("/run/{run}/checkpoint/{save_id}/{action}", actions.act, methods=["POST"]))
    handlers = {CkptError: pages.failed, HTTPException: pages.refused, Exception: pages.broken}
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,  # type: ignore[arg-type]
        middleware=[Middleware(GZipMiddleware, minimum_size=4096, compresslevel=4)],
    )
    return Guard(app, hosts=hosts, token=token, prefix=prefix, allow_actions=allow_actions)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in assets.NAMES:
        raise HTTPException(404)
    forever = "public, max-age=31536000, immutable"
    headers = {"cache-control": forever if "v" in request.query_params else "no-cache"}
    kind = assets.TYPES[name[name.rindex(".") :]]
    return Response(assets.content(name), media_type=kind, headers=headers)
