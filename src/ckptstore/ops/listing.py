"""`list` and `show`: what is there, in brief and in detail."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckptstore.ops.open import Place, RunTiers
from ckptstore.types import CheckpointInfo, StepLike

if TYPE_CHECKING:
    from ckptstore.ops.provenance import Provenance
    from ckptstore.repo.reader import CheckpointReader


def list_checkpoints(place: Place, run: str | None, *, include_superseded: bool = False) -> list[CheckpointInfo]:
    """Checkpoints of one run, or of all of them, oldest first within each."""
    infos = []
    for name in [run] if run is not None else place.runs():
        catalog = place.tiers(name).catalog()
        infos += [record.info() for record in (catalog.records if include_superseded else catalog.line())]
    return infos


def why_superseded(place: Place, infos: Sequence[CheckpointInfo]) -> dict[str, str]:
    """save_id -> why this checkpoint is not of the current line, for those that are not."""
    reasons: dict[str, str] = {}
    for run in {info.run for info in infos if info.superseded}:
        records = place.tiers(run).catalog().records
        line = [record.summary for record in records if not record.superseded]
        for old in (record.summary for record in records if record.superseded):
            newer = [summary for summary in line if summary.timeline > old.timeline]
            if not newer:
                reasons[old.save_id] = f"timeline {old.timeline} is not the current one"
                continue
            first = min(newer, key=lambda summary: (summary.timeline, summary.step))
            parent = first.parent
            went_on = "started over" if parent is None else f"went on from step {parent.step}"
            reasons[old.save_id] = f"timeline {first.timeline} {went_on}"
    return reasons


@dataclass(frozen=True)
class TensorRow:
    """One stored tensor; ``stored``, ``stored_bytes`` and ``base_step`` say how the remote keeps it, if one has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    ranks: tuple[int, ...]
    alias_of: str | None = None
    stored: str | None = None
    stored_bytes: int | None = None
    base_step: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "size_bytes": self.size_bytes,
            "ranks": list(self.ranks),
            "alias_of": self.alias_of,
            "stored": self.stored,
            "stored_bytes": self.stored_bytes,
            "base_step": self.base_step,
        }


@dataclass(frozen=True)
class Details:
    """One checkpoint and its tensors."""

    info: CheckpointInfo
    tensors: tuple[TensorRow, ...]
    versions: dict[str, str]
    num_nodes: int
    timing: dict[str, Any]


def show_checkpoint(tiers: RunTiers, step: StepLike, *, only: str | None = None) -> Details:
    """Everything the manifests say of one checkpoint; ``only`` is a pattern of tensor names."""
    # `list` shares this module and reads no shard manifest: it doesn't pay for what does.
    from ckptstore.ops.provenance import provenance
    from ckptstore.repo import timings
    from ckptstore.repo.reader import CheckpointReader

    record = tiers.catalog().resolve(step)
    with CheckpointReader(record, tiers.local, tiers.remotes) as reader:
        origins = provenance(tiers.remotes, record)
        rows = _tensors(reader, origins)
    if only:
        rows = [row for row in rows if fnmatch.fnmatchcase(row.name, only)]
    summary = record.summary
    timing = timings.read(tiers.local, tiers.run, record.save_id) if tiers.local is not None else {}
    info = replace(record.info(), stored_bytes=origins.stored_bytes, base_step=origins.base_step)
    return Details(info, tuple(sorted(rows, key=lambda r: r.name)), dict(summary.versions), summary.num_nodes, timing)


def _tensors(reader: CheckpointReader, origins: Provenance) -> list[TensorRow]:
    rows = []
    for name, meta in reader.tensors.items():
        pieces = reader.pieces(name)
        size_bytes = sum(piece.size_bytes for _, _, piece in pieces)
        ranks = tuple(sorted({rank for rank, _, _ in pieces}))
        row = TensorRow(name, meta.dtype, meta.shape, size_bytes, ranks)
        if (origin := origins.tensors.get(name)) is not None:
            row = replace(row, stored=origin.stored, stored_bytes=origin.stored_bytes, base_step=origin.base_step)
        rows.append(row)
    by_name = {row.name: row for row in rows}
    for name, target in reader.aliases.items():
        row = by_name[target]
        rows.append(TensorRow(name, row.dtype, row.shape, 0, row.ranks, target))
    return rows
