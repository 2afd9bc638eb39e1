"""Proxies of an environment that is not the process's own: those a trainer passes on to its agent."""

from __future__ import annotations

from collections.abc import Mapping
from urllib import request


def proxies_of(environ: Mapping[str, str], host: str) -> dict[str, str]:
    """scheme -> proxy for requests to this host; empty where it is to be reached directly."""
    without = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if without and request.proxy_bypass_environment(host, {"no": without}):  # type: ignore[attr-defined]
        return {}
    found = {
        scheme: environ.get(f"{scheme}_proxy") or environ.get(f"{scheme}_proxy".upper()) for scheme in ("http", "https")
    }
    return {scheme: proxy for scheme, proxy in found.items() if proxy}
