"""What a save cost its remote and why: per tensor, whether it was referenced, derived, a delta, or sent in full."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptstore.format.manifest import RemoteShard
from ckptstore.repo.packs import PlacedFrame, pack_owner, placed
from ckptstore.repo.record import Record
from ckptstore.repo.remote import RemoteTier


@dataclass(frozen=True)
class Origin:
    """How one tensor is kept.

    Attributes:
        stored: "unchanged" (referenced), "derived", "delta" or "full": what most of its bytes are.
        stored_bytes: what this save added for it.
        base_step: the step its deltas refer to, if that save is still there.
    """

    stored: str
    stored_bytes: int
    base_step: int | None = None


@dataclass(frozen=True)
class Provenance:
    """One save on the first remote that has it.

    Attributes:
        stored_bytes: what it added there; None when no remote has it.
        base_step: the step most of its deltas refer to, if that save is still there.
        tensors: by name.
    """

    stored_bytes: int | None = None
    base_step: int | None = None
    tensors: Mapping[str, Origin] = field(default_factory=dict)


def provenance(remotes: Sequence[RemoteTier], record: Record) -> Provenance:
    """Look it up in the remote shard manifests; nothing is computed, no tensor byte is read."""
    remote = next((remote for remote in remotes if remote.name in record.remote), None)
    if remote is None:
        return Provenance()
    steps = {save.save_id: save.step for save in remote.saves()}
    root = remote.root_manifest(record.remote[remote.name])
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    bases: defaultdict[str, Counter[str]] = defaultdict(Counter)
    added: Counter[str] = Counter()
    total = 0
    for ref in root.shards:
        document = remote.remote_shard(record.save_id, ref)
        total += document.stored_bytes
        seen: set[int] = set()
        for name, index, frame in _frames(document):
            is_ours = pack_owner(frame.pack) == record.save_id
            kinds[name][kind_of(frame.codec) if is_ours else "unchanged"] += frame.size_bytes
            if frame.codec == "delta" and frame.base is not None:
                bases[name][pack_owner(frame.base.pack) or ""] += frame.size_bytes
            if is_ours and index not in seen:
                seen.add(index)
                added[name] += frame.length
    tensors = {name: Origin(_most(kinds[name]), added[name], steps.get(_most(bases[name]))) for name in kinds}
    return Provenance(total, steps.get(_most(sum(bases.values(), Counter()))), tensors)


def _frames(document: RemoteShard) -> list[tuple[str, int, PlacedFrame]]:
    """(fqn, index of the frame, frame) for every chunk."""
    frames = [placed(document, frame) for frame in document.frames]
    rows = zip(document.shard.pieces, document.chunks, strict=True)
    return [(piece.fqn, index, frames[index]) for piece, row in rows for index in row]


def kind_of(codec: str) -> str:
    """How a frame of this codec is kept: "derived", "delta" or "full"."""
    return codec if codec in ("delta", "derived") else "full"


def _most(counts: Counter[str]) -> str:
    return max(counts, key=lambda name: counts[name], default="")
