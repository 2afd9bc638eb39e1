"""The order of saves in a run, and which of them are superseded: pure functions over summaries.

A job claims a timeline number at its first save and names the save it continues from. So the saves of one job in one
timeline form a *line*, lines form a tree, and the *current line* is the path from the newest line to its root: all of
the newest line, then its parent save and what precedes that in the parent's line, and so on. Everything else is
superseded::

    timeline 1    100 -- 500 ---- 900            900 is superseded,
    timeline 2             \\-- 510 -- 520        the current line is 100 500 510 520

Order is (timeline, step, number of the save within its job). Wall time decides in one case only: two jobs that could
not see each other claimed the same number. The line whose newest save was taken later is then the newer one (equal
times: the larger save_id), and the two are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from pydantic import Field

from ckptstore.clock import parse_rfc3339
from ckptstore.errors import FormatError
from ckptstore.format.manifest import FORMAT, FORMAT_VERSION, Document, Parent, Summary
from ckptstore.repo.names import split_save_id


class Claim(Document):
    """What a job writes under the timeline number it claims: enough to follow the line when its saves are gone."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    timeline: int | None = None
    job: str = Field(pattern="^[0-9a-f]{12}$")
    """The job's nonce, as in the save_ids of its saves."""
    step: int = Field(ge=0)
    """Step of the save for which the timeline was claimed."""
    parent: Parent | None = None


#: A line: timeline number, and the nonce of the job that claimed it.
Line = tuple[int, str]

#: The claim of a line if it is still known. Asked only for lines that have no save left.
ClaimOf = Callable[[Line], "Claim | None"]


def unknown(line: Line) -> Claim | None:
    """No claim is known."""
    del line
    return None


def line_of(summary: Summary) -> Line:
    """The line a save belongs to."""
    return summary.timeline, split_save_id(summary.save_id)[0]


def created_at(summary: Summary) -> datetime:
    """Aware UTC time of the save.

    Raises:
        FormatError: it is not one.
    """
    try:
        when = parse_rfc3339(summary.created_at)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise FormatError(f"save {summary.save_id} has no valid time: {summary.created_at!r}", save_id=summary.save_id)
    return when


def in_order(summaries: Iterable[Summary]) -> list[Summary]:
    """Oldest first, by (timeline, line, step, number within the job): one total order, whatever the input's."""
    lines = _lines(summaries)
    return [summary for line in sorted(lines, key=lambda key: _age(key, lines[key])) for summary in lines[line]]


def current_line(summaries: Iterable[Summary], claim_of: ClaimOf = unknown) -> list[Summary]:
    """The saves that are not superseded, oldest first.

    A parent that was deleted still says where its line was left. A line with no save left is followed through its
    claim; without one, the next older line is taken to be its parent, so that pruning the saves of a short-lived job
    never turns its whole history into superseded saves.

    Args:
        summaries: Complete saves of one run, each once, in any order.
        claim_of: Looks up the claim of a line without saves.
    """
    lines = _lines(summaries)
    if not lines:
        return []
    line: Line | None = max(lines, key=lambda key: _age(key, lines[key]))
    limit: tuple[int, int] | None = None
    path: list[Summary] = []
    while line is not None:
        saves = lines.get(line, [])
        path[:0] = [s for s in saves if limit is None or _place(s) <= limit]
        claim = claim_of(line) if not saves else None
        if saves or claim is not None:
            parent = _parent(line, saves, claim)
            if parent is None:
                break
            place = parent.step, split_save_id(parent.save_id)[1]
            line = parent.timeline, split_save_id(parent.save_id)[0]
        else:
            # Below the step at which this line was left; its own branch point is not known any more.
            place = (limit[0] if limit else 0), -1
            older = [key for key in lines if key[0] < line[0]]
            line = max(older, key=lambda key: _age(key, lines[key])) if older else None
        limit = min(limit, place) if limit else place
    return path


def parent_below(line: Sequence[Summary], step: int) -> Parent | None:
    """What a new timeline whose first save is ``step`` continues from: the newest save of the line below that step.

    Args:
        line: The current line, oldest first.
        step: First step the new timeline will save.
    """
    below = [summary for summary in line if summary.step < step]
    return parent_of(below[-1]) if below else None


def parent_of(summary: Summary) -> Parent:
    """This save as the parent of a timeline."""
    return Parent(save_id=summary.save_id, timeline=summary.timeline, step=summary.step)


def _lines(summaries: Iterable[Summary]) -> dict[Line, list[Summary]]:
    lines: dict[Line, list[Summary]] = {}
    for summary in summaries:
        lines.setdefault(line_of(summary), []).append(summary)
    for saves in lines.values():
        saves.sort(key=_place)
    return lines


def _place(summary: Summary) -> tuple[int, int]:
    """Place of a save within its line."""
    return summary.step, split_save_id(summary.save_id)[1]


def _age(line: Line, saves: Sequence[Summary]) -> tuple[int, datetime, str]:
    """Sorts lines, older ones first."""
    return line[0], created_at(saves[-1]), saves[-1].save_id


def _parent(line: Line, saves: Sequence[Summary], claim: Claim | None) -> Parent | None:
    """The save a line continues from. Parents are always of smaller timelines, which also ends every walk."""
    parents = [s.parent for s in saves] if saves else [claim.parent if claim else None]
    return next((p for p in parents if p is not None and p.timeline < line[0]), None)
