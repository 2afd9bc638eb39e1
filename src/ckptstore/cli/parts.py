"""``--part i/n``: a share of bulk work, for any scheduler that can count."""

from __future__ import annotations

from ckptstore.errors import ConfigError


def parse_part(text: str | None) -> tuple[int, int] | None:
    """``i/n`` -> (i, n), 0-based; None stays None.

    Raises:
        ConfigError: it is anything else.
    """
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--part must be i/n with 0 <= i < n, not {text!r}", hint="for example --part 0/4")
    return int(index), int(count)
