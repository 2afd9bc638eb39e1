"""Templates and static files: ours, and Plotly's from its package. Nothing comes from another host."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any
from urllib.parse import urlencode

from ckptstore._version import __version__
from ckptstore.clock import rfc3339
from ckptstore.dashboard import words
from ckptstore.errors import ConfigError

try:
    import jinja2
    import plotly
except ImportError as error:
    raise ConfigError(f"the dashboard needs {error.name}", hint="pip install 'ckptstore[dashboard]'") from None

TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
NAMES = ("app.css", "app.js", "charts.js", "icon.svg", "plotly.min.js", "theme.js", "training.js")


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


@lru_cache(maxsize=16)
def content(name: str) -> bytes:
    """A static file."""
    if name == "plotly.min.js":
        return resources.files(plotly).joinpath("package_data").joinpath(name).read_bytes()
    return resources.files("ckptstore.dashboard").joinpath("static").joinpath(name).read_bytes()


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


def _query(parameters: Mapping[str, Any], **changes: Any) -> str:
    """A query string of what differs from the defaults."""
    return "?" + urlencode({k: v for k, v in {**parameters, **changes}.items() if v not in ("", None)})
