"""The grammar of keys: what a name may be, so that it can never leave its folder or need escaping."""

from __future__ import annotations

import re

from ckptstore.errors import ConfigError

_SEGMENT = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*\Z")
_PREFIX_CHARS = re.compile(r"[A-Za-z0-9._/-]*\Z")

#: S3 and OSS allow 1024 bytes for prefix and key together.
MAX_KEY_BYTES = 900


def is_key(name: str) -> bool:
    """Whether ``name`` is a key: ``/``-joined segments of ``[A-Za-z0-9._-]``, none of them ``.`` or ``..``."""
    return len(name) <= MAX_KEY_BYTES and _KEY.match(name) is not None


def check_key(name: str) -> str:
    """Return ``name``.

    Raises:
        ConfigError: not a key.
    """
    if not is_key(name):
        raise ConfigError(
            f"{name!r} can't be the name of an object",
            hint="segments of letters, digits, '.', '_' and '-', joined by '/'",
            key=name,
        )
    return name


def check_prefix(prefix: str) -> str:
    """Return ``prefix``, the beginning of a key, cut anywhere; empty for all keys.

    Raises:
        ConfigError: no key could begin so.
    """
    segments = prefix.split("/")
    if (
        _PREFIX_CHARS.match(prefix) is None
        or any(segment in (".", "..", "") for segment in segments[:-1])
        or len(prefix) > MAX_KEY_BYTES
    ):
        raise ConfigError(f"no object's name begins with {prefix!r}", hint="see ckptstore.blob.keys", key=prefix)
    return prefix
