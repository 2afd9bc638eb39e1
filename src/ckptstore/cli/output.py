"""How results look: JSON documents for scripts, tables for people. Data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

SCHEMA_VERSION = 1

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plain(text: object) -> str:
    """Text without control characters, so that a stored name can't drive the terminal."""
    return _CONTROL.sub("?", str(text))


def print_json(**fields: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line on stderr."""
    print(plain(text), file=sys.stderr)


def print_table(headers: list[str], rows: list[list[str]], *, right: frozenset[str] = frozenset()) -> None:
    """Columns padded to fit, two spaces between; bold headers on a terminal."""
    bold = sys.stdout.isatty() and not _no_color()
    head, *lines = table(headers, rows, right=right)
    print(f"\x1b[1m{head}\x1b[0m" if bold else head)
    for text in lines:
        print(text)


def table(headers: list[str], rows: list[list[str]], *, right: frozenset[str] = frozenset()) -> list[str]:
    """The lines of a table: headers first, columns padded to fit, two spaces between."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max([len(h), *(len(row[i]) for row in cells)]) for i, h in enumerate(headers)]

    def line(row: list[str]) -> str:
        padded = [c.rjust(w) if h in right else c.ljust(w) for c, w, h in zip(row, widths, headers, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(headers), *(line(row) for row in cells)]


def _no_color() -> bool:
    import os

    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
