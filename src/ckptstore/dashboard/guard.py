"""Who may look, and what a page may do: one layer around every answer.

A browser that visits a hostile page can be made to call 127.0.0.1. So the Host must be one of ours (no DNS rebinding),
an Origin must be this Host, and with a token nothing but the token's holder gets an answer. Only GET and HEAD exist;
where actions are allowed also POST, which must bring the token, and from a browser an Origin that is this Host.
The content policy allows our own scripts and styles and no inline ones; one nonce covers the single style element that
Plotly puts its rules into.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "ckptstore_dashboard"
MIN_TOKEN_LENGTH = 16
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


def is_loopback(host: str) -> bool:
    """Whether binding to ``host`` reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token nobody guesses."""
    return secrets.token_urlsafe(24)


def is_bearer(authorization: str, token: str) -> bool:
    """Whether an Authorization header brings this token."""
    kind, _, bearer = authorization.partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(bearer.strip().encode(), token.encode())


class Guard:
    """Wraps the application.

    Args:
        app: what answers.
        hosts: names under which the dashboard may be addressed; None: any, which only a token makes safe.
        token: what visitors must bring: once as ``?token=``, then in a cookie; or as a Bearer token.
        prefix: path below which a proxy serves the dashboard without taking it off, such as ``/ckpt``.
        allow_actions: let POST through.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: frozenset[str] | None,
        token: str | None,
        prefix: str = "",
        allow_actions: bool = False,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._token = token
        self._prefix = prefix.rstrip("/")
        self._methods = ("GET", "HEAD", "POST") if allow_actions and token is not None else ("GET", "HEAD")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return
            await self._app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        scope["ckptstore.nonce"] = nonce

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_policy(nonce)]
            await send(message)

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refuse(scope, headers)
        if refusal is not None:
            await _answer(sending, *refusal)
            return
        if self._prefix:
            path = scope["path"]
            if path == self._prefix:
                await _answer(sending, 307, "the dashboard is one slash further", location=f"{_last(path)}/")
                return
            if not path.startswith(f"{self._prefix}/"):
                await _answer(sending, 404, f"the dashboard is below {self._prefix}/")
                return
            scope["path"] = path[len(self._prefix) :]
            scope["raw_path"] = quote(scope["path"]).encode()
        if self._token is not None:
            given = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"))).get("token")
            if given is not None and self._is_token(given):
                await self._welcome(scope, headers, sending)
                return
            if not self._may_look(headers):
                await _answer(sending, 401, "this dashboard needs its token: open the address that `ckptctl dashboard` printed")  # fmt: skip  # noqa: E501
                return
        await self._app(scope, receive, sending)

    # ------------------------------------------------------------------ inside

    def _refuse(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str] | None:
        if scope["method"] not in self._methods:
            return 405, "the dashboard only reads"
        host = headers.get(b"host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            return 421, "this dashboard is not known under this name; `ckptctl dashboard --allow-host NAME` adds one"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "another site may not read this dashboard"
        if scope["method"] == "POST" and origin is None and not self._is_bearer(headers):
            return 403, "an action must come from a page of this dashboard, or bring the token as a Bearer token"
        site = headers.get(b"sec-fetch-site")
        is_visit = headers.get(b"sec-fetch-mode") == "navigate" and scope["method"] != "POST"
        if site in ("cross-site", "same-site") and not is_visit:
            return 403, "another site may not read this dashboard"
        return None

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _is_bearer(self, headers: dict[bytes, str]) -> bool:
        assert self._token is not None
        return is_bearer(headers.get(b"authorization", ""), self._token)

    def _cookie_value(self) -> str:
        """Not the token itself: cookies are shared by all ports of a host."""
        assert self._token is not None
        return hmac.new(self._token.encode(), b"ckptstore dashboard cookie", hashlib.sha256).hexdigest()

    def _may_look(self, headers: dict[bytes, str]) -> bool:
        if self._is_bearer(headers):
            return True
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self._cookie_value().encode())

    async def _welcome(self, scope: Scope, headers: dict[bytes, str], send: Send) -> None:
        """Put the token into a cookie and out of the address."""
        left = [(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if k != "token"]
        location = f"{_last(scope['path']) or './'}" + (f"?{urlencode(left)}" if left else "")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self._cookie_value()}; Path=/; HttpOnly; SameSite=Strict{secure}"
        await _answer(send, 303, "welcome", location=location, cookie=cookie)


def _last(path: str) -> str:
    """The last part of a path, for redirects that hold behind any prefix."""
    return quote(path.rpartition("/")[2])


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _policy(nonce: str) -> list[tuple[bytes, bytes]]:
    content = "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            f"style-src 'self' 'nonce-{nonce}'",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )
    return [
        (b"content-security-policy", content.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        # Not no-referrer: with that a browser calls the Origin of our own forms "null".
        (b"referrer-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    ]


async def _answer(
    send: Send, status: int, text: str, *, location: str | None = None, cookie: str | None = None
) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    if location is not None:
        headers.append((b"location", location.encode()))
    if cookie is not None:
        headers.append((b"set-cookie", cookie.encode()))
    if status == 405:
        headers.append((b"allow", b"GET, HEAD"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
