"""Loading: a target is compared with the checkpoint, filled, and handed what is not memory.

All ranks agree after each of the three steps, so that none is changed when one does not fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ckptstore.dcp import union
from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.filler import Filler
from ckptstore.dcp.parts import Slot
from ckptstore.dcp.pause import no_collections
from ckptstore.dcp.sharing import Readers
from ckptstore.dcp.source import ChunkSource
from ckptstore.dcp.target import Matched, Matcher
from ckptstore.errors import CkptError, LoadMismatchError, SaveFailedError
from ckptstore.types import LoadReport

log = logging.getLogger("ckptstore")

_LISTED = 20
_HINTS = {
    True: "fix the target, or pass strict=False to load what fits",
    False: "shapes must fit even with strict=False",
}


@no_collections()
def load_into(
    state: Mapping[Any, Any],
    source: ChunkSource,
    *,
    only: Iterable[str] = (),
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    rank: int = 0,
    agreement: Agreement | None = None,
    readers: Readers | None = None,
    threads: int | None = None,
) -> LoadReport:
    """Fill ``state`` from a checkpoint. Collective with an agreement, which supplies the rank; local without.

    Modules, optimizers and tensors are filled in place, without a hook or a step; other leaves are replaced in their
    nearest mutable container; objects with ``load_state_dict`` are handed their state. Top-level keys that ``state``
    doesn't have are not read. Rank r gets the ``per_rank`` values of rank r modulo the world that saved.

    Args:
        only: globs of dotted names; nothing else is touched or read.
        rename: stored prefix -> target prefix of dotted names.
        strict: False: missing and unexpected names are reported, dtypes converted. Shapes must fit either way.
        readers: which rank can read what, so that ranks read for each other; None: each reads all it needs.
        threads: concurrent reads; None: as many as cores, 4 to 8.

    Raises:
        LoadMismatchError: the target doesn't fit; lists both sides; nothing was changed.
        IntegrityError: bytes are damaged and no good copy is left; ``context["changed"]`` names what was written to.
        SaveFailedError: a peer was lost.
    """
    ranks = agreement or Agreement.alone()
    rank = ranks.rank if agreement is not None else rank
    matcher: Matcher | None = None
    filler: Filler | None = None
    error: CkptError | None = None
    try:
        matcher = Matcher(state, source, rank=rank, only=only, rename=rename, strict=strict)
        matched = matcher.match()
        filler = Filler(source, matched.slots, agreement=ranks, readers=readers)
    except CkptError as refused:
        error = refused
    try:
        unexpected = union.unexpected(matched.unexpected if error is None else [], ranks, source.tree)
        if error is None:
            matched.unexpected = unexpected
            error = _mismatch(matched, strict=strict)
        if error is None and filler is not None:
            filler.plan()
    except SaveFailedError:
        raise
    except CkptError as refused:
        error = error or refused
    ranks.together(error, what="comparing the target with the checkpoint")
    for warning in matched.warnings if ranks.rank == 0 else ():
        log.warning("%s", warning)
    assert matcher is not None
    assert filler is not None

    changed = filler.touched
    try:
        filler.run(threads or _default_threads())
    except CkptError as failed:
        error = failed
    _together(ranks, error, changed, what="loading")
    try:
        for key, action in matched.actions:
            changed.add(key)
            _act(key, action)
    except CkptError as failed:
        error = failed
    _together(ranks, error, changed, what="handing back the state")
    return LoadReport(
        missing=tuple(matched.missing),
        unexpected=tuple(matched.unexpected),
        cast=matched.cast,
        renamed=matcher.renamed,
        bytes_by_source=dict(filler.bytes_by_source),
        repaired=tuple(getattr(source, "repaired", ())),
    )


@no_collections()
def fill(slots: list[Slot], source: ChunkSource, *, threads: int = 4) -> dict[str, int]:
    """Read slots without a target around them; returns plain bytes by source."""
    filler = Filler(source, slots)
    filler.plan()
    filler.run(threads)
    return dict(filler.bytes_by_source)


def _default_threads() -> int:
    return max(4, min(8, os.cpu_count() or 4))


def _together(ranks: Agreement, error: CkptError | None, changed: set[str], *, what: str) -> None:
    """Collective. As ``ranks.together``; the error names what was changed on the rank that failed, and on this one."""
    if error is not None:
        error.context["changed"] = sorted(changed)
    try:
        ranks.together(error, what=what)
    except CkptError as failed:
        failed.context["changed"] = sorted(changed.union(failed.context.get("changed", ())))
        raise


def _act(key: str, action: Any) -> None:
    try:
        with torch.no_grad():
            action()
    except CkptError:
        raise
    except Exception as error:
        raise LoadMismatchError(
            f"{key!r} did not take its state back: {type(error).__name__}: {error}",
            hint="all tensors are loaded",
            key=key,
        ) from error


def _mismatch(matched: Matched, *, strict: bool) -> LoadMismatchError | None:
    problems = []
    if matched.mismatched:
        problems.append("different: " + _listed(matched.mismatched))
    if strict and matched.missing:
        problems.append("missing in the checkpoint: " + _listed(matched.missing))
    if strict and matched.unexpected:
        problems.append("not in the target: " + _listed(matched.unexpected))
    if not problems:
        return None
    return LoadMismatchError(
        "the target does not fit the checkpoint; " + "; ".join(problems),
        hint="; ".join(dict.fromkeys([*matched.hints, *matched.warnings])) or _HINTS[strict],
        missing=list(matched.missing),
        unexpected=list(matched.unexpected),
        mismatched=list(matched.mismatched),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
