"""Run the dashboard until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from ckptstore.dashboard.app import create_app
from ckptstore.dashboard.guard import LOOPBACK_HOSTS, MIN_TOKEN_LENGTH, is_loopback
from ckptstore.dashboard.source import Source
from ckptstore.errors import CkptError, ConfigError
from ckptstore.ops.open import Place
from ckptstore.ops.settings import PRICES


def serve(
    place: Place,
    *,
    store: str,
    host: str,
    port: int,
    token: str | None,
    allowed_hosts: tuple[str, ...] = (),
    prefix: str = "",
    allow_actions: bool = False,
    prices: Mapping[str, float] = PRICES,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        place: what to show; stays the caller's to close.
        store: as a person types it.
        host, port: where to listen; port 0 takes a free one.
        token: what visitors must bring; needed unless ``host`` is this machine only.
        allowed_hosts: further names the dashboard may be addressed by.
        prefix: path that a proxy leaves in front.
        allow_actions: whoever has the token may pin, unpin and verify.
        prices: dollars, for what a bucket costs.
        announce: called with the address once it answers.

    Raises:
        ConfigError: no token for an address others can reach, a short one, or a port that can't be had.
    """
    import uvicorn

    if token is None and not is_loopback(host):
        raise ConfigError(f"others can reach {host}: a token is needed", hint="leave out --host, or keep the token")
    if token is not None and len(token) < MIN_TOKEN_LENGTH:
        raise ConfigError(f"the token is shorter than {MIN_TOKEN_LENGTH} characters")
    if prefix and not prefix.startswith("/"):
        raise ConfigError(f"the prefix {prefix!r} must begin with /")
    listener = _listen(host, port)
    hosts = frozenset({*LOOPBACK_HOSTS, host, *allowed_hosts})
    # Bound to every address there is no list of names; the token is what keeps others out.
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104
    source = Source(place)
    try:
        app = create_app(
            source,
            store=store,
            hosts=None if everywhere and not allowed_hosts else hosts,
            token=token,
            prefix=prefix,
            allow_actions=allow_actions,
            prices=prices,
        )
        _warm(source)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}{prefix.rstrip('/')}/"
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        announce(address if token is None else f"{address}?token={token}")
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        source.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror or error}", hint="--port 0 takes a free one"
        ) from None
    return listener


def _warm(source: Source) -> None:
    """Read every run once, so that the first visitor doesn't wait."""
    for run in source.runs():
        try:
            len(source.view(run).line)
        except CkptError:
            continue  # its page says so
