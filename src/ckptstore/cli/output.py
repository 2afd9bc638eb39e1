"""How results look: JSON documents for scripts, tables for people. Data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from ckptstore.logs import wants_json

SCHEMA_VERSION = 1

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plain(text: object) -> str:
    """Text without control characters, so that a stored name can't drive the terminal."""
    return _CONTROL.sub("?", str(text))


def print_json(**fields: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **fields}, indent=2, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line on stderr: text, or JSON where that is asked for."""
    if wants_json():
        logging.getLogger("ckptctl").info(plain(text))
    else:
        print(plain(text), file=sys.stderr)


#: What colours mean: red is lost or damaged, yellow wants a look, green is as it should be.
_COLOURS = {"bad": "31", "doubtful": "33", "good": "32", "head": "1"}


def paint(text: str, meaning: str | None) -> str:
    """The text in the colour of ``bad``, ``doubtful``, ``good`` or ``head``, where stdout shows colours."""
    if meaning is None or not _shows_colours():
        return text
    return f"\x1b[{_COLOURS[meaning]}m{text}\x1b[0m"


def _shows_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _columns() -> int:
    import shutil  # with all its archive formats it costs a piped `list` a fiftieth of its time

    return shutil.get_terminal_size().columns


def print_wrapped(mark: str, text: str, meaning: str | None = None) -> None:
    """A line that begins with a mark; on a terminal too narrow for it, the rest is indented below the text."""
    lines = [plain(text)]
    if sys.stdout.isatty():
        import textwrap

        width = _columns() - len(mark)
        lines = textwrap.wrap(lines[0], max(width, 20), break_long_words=False, break_on_hyphens=False) or [""]
    print(paint(mark, meaning) + f"\n{' ' * len(mark)}".join(lines))


def print_table(
    headers: list[str],
    rows: list[list[str]],
    *,
    right: frozenset[str] = frozenset(),
    flexible: tuple[str, ...] = (),
    meanings: Mapping[str, str] | None = None,
) -> None:
    """Columns padded to fit, two spaces between. On a terminal also bold headers, and no line wider than that.

    Args:
        headers: One per column.
        rows: The cells.
        right: Headers of columns that are aligned to the right.
        flexible: Headers of columns that may be cut short on a terminal too narrow for all, the first one first;
            of names with dots the beginning goes, of other text the end.
        meanings: Words that have a colour, and what it means.
    """
    if sys.stdout.isatty():
        rows = _fitted(headers, rows, flexible, _columns())
    head, *lines = table(headers, rows, right=right)
    print(paint(head, "head"))
    for text in lines:
        print(colour_words(text, meanings))


def colour_words(text: str, meanings: Mapping[str, str] | None) -> str:
    """The text with each of these words in the colour of its meaning."""
    if not meanings or not _shows_colours():
        return text
    for word, meaning in meanings.items():
        text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", lambda found, m=meaning: paint(found[0], m), text)  # type: ignore[misc]
    return text


def table(headers: list[str], rows: list[list[str]], *, right: frozenset[str] = frozenset()) -> list[str]:
    """The lines of a table: headers first, columns padded to fit, two spaces between."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max([len(h), *(len(row[i]) for row in cells)]) for i, h in enumerate(headers)]

    def line(row: list[str]) -> str:
        padded = [c.rjust(w) if h in right else c.ljust(w) for c, w, h in zip(row, widths, headers, strict=True)]
        return "  ".join(padded).rstrip()

    return [line(headers), *(line(row) for row in cells)]


def _fitted(headers: list[str], rows: list[list[str]], flexible: tuple[str, ...], columns: int) -> list[list[str]]:
    rows = [[plain(cell) for cell in row] for row in rows]
    for name in flexible:
        at = headers.index(name)
        widths = [max([len(h), *(len(row[i]) for row in rows)]) for i, h in enumerate(headers)]
        surplus = sum(widths) + 2 * (len(widths) - 1) - columns
        if surplus > 0:
            width = max(widths[at] - surplus, len(name), 12)
            rows = [[*row[:at], _shortened(row[at], width), *row[at + 1 :]] for row in rows]
    return rows


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    is_name = "." in text and " " not in text and "=" not in text
    return f"…{text[len(text) - width + 1 :]}" if is_name else f"{text[: width - 1]}…"
