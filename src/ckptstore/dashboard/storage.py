"""Where the bytes are: per tier, over time, saved by deduplication, and when the disk will be full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptstore.dashboard.plan import TierPlan
from ckptstore.dashboard.safety import usual_interval
from ckptstore.dashboard.source import RunView
from ckptstore.dashboard.table import stored_bytes

#: Encodings in words.
SAVERS = {
    "unchanged": "unchanged",
    "delta": "deltas",
    "derived": "from masters",
    "planes": "byte planes",
    "zstd": "zstd",
    "raw": "as it is",
}


@dataclass(frozen=True)
class TierBytes:
    """What one tier holds of a run.

    Attributes:
        plain_bytes: of the checkpoints as they are loaded.
        stored_bytes: what a remote was sent for them, as far as known; None for the local tier.
        known: checkpoints for which that is known.
    """

    name: str
    num_checkpoints: int
    plain_bytes: int
    stored_bytes: int | None
    known: int
    known_plain_bytes: int

    @property
    def ratio(self) -> float | None:
        """Stored over plain, of the checkpoints for which both are known."""
        if self.stored_bytes is None or not self.known_plain_bytes:
            return None
        return self.stored_bytes / self.known_plain_bytes


@dataclass(frozen=True)
class Forecast:
    """When the disk is full if checkpoints go on at the usual pace and nothing is deleted.

    Attributes:
        growth_bytes: what this run's checkpoints can still grow by under its retention; None if that has no end.
    """

    free_bytes: int
    total_bytes: int
    checkpoint_bytes: int
    num_more: int | None
    seconds: float | None
    growth_bytes: int | None = None

    @property
    def is_enough(self) -> bool:
        """Whether the retention keeps the run within the disk for good; one more is there while an old one goes."""
        return self.growth_bytes is not None and self.growth_bytes + self.checkpoint_bytes <= self.free_bytes


@dataclass(frozen=True)
class Saving:
    """How the uploaded checkpoints came to fewer bytes than they have.

    Attributes:
        kind: what did it.
        plain_bytes: tensor bytes it dealt with.
        stored_bytes: what they took in the bucket.
    """

    kind: str
    plain_bytes: int
    stored_bytes: int


def tiers(view: RunView) -> list[TierBytes]:
    """One entry per tier that has been looked at."""
    result = []
    for name in view.tiers:
        if name in view.unknown_remotes:
            continue
        held = [info for info in view.infos if info.tiers.get(name) == "complete"]
        plain = sum(info.size_bytes for info in held)
        if name == "local":
            result.append(TierBytes(name, len(held), plain, None, 0, 0))
            continue
        known = [(info.size_bytes, spans) for info in held if (spans := _spans(view, info.save_id, name)) is not None]
        result.append(
            TierBytes(name, len(held), plain, sum(s for _, s in known), len(known), sum(size for size, _ in known))
        )
    return result


def _spans(view: RunView, save_id: str, remote: str) -> int | None:
    spans = view.notes.get(save_id, {}).get(f"remote {remote}")
    value = spans.get("stored_bytes") if isinstance(spans, dict) else None
    return value if isinstance(value, int) else None


def forecast(view: RunView, disk: tuple[int, int] | None, plans: Sequence[TierPlan] = ()) -> Forecast | None:
    """None without a local tier."""
    if disk is None:
        return None
    free, total = disk
    size = view.line[-1].size_bytes if view.line else 0
    more = free // size if size else None
    interval = usual_interval(view.line)
    most = next((plan.most_bytes for plan in plans if plan.tier == "local"), None)
    held = sum(info.size_bytes for info in view.line if info.tiers.get("local") == "complete")
    growth = None if most is None else max(0, most - held)
    return Forecast(free, total, size, more, None if more is None or interval is None else more * interval, growth)


def savings(view: RunView) -> list[Saving]:
    """What was referenced instead of sent, and each encoding's share, over all uploads noted here; largest first."""
    plain: dict[str, int] = {}
    stored: dict[str, int] = {}
    for notes in view.notes.copy().values():
        for name in view.remote_names:
            spans = notes.get(f"remote {name}")
            if not isinstance(spans, dict):
                continue
            reused = spans.get("reused_bytes")
            if isinstance(reused, int) and reused > 0:
                plain["unchanged"] = plain.get("unchanged", 0) + reused
                stored.setdefault("unchanged", 0)
            codecs = spans.get("by_codec")
            for codec, sizes in (codecs if isinstance(codecs, dict) else {}).items():
                if isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
                    plain[codec] = plain.get(codec, 0) + sizes[0]
                    stored[codec] = stored.get(codec, 0) + sizes[1]
    found = [Saving(SAVERS.get(kind, kind), size, stored[kind]) for kind, size in plain.items()]
    return sorted(found, key=lambda one: one.stored_bytes - one.plain_bytes)


def series(view: RunView) -> dict[str, Any]:
    """Cumulative bytes of the checkpoints that are held now, by the time they were saved."""
    ordered = sorted(view.infos, key=lambda info: info.created_at)
    times = [info.created_at.timestamp() for info in ordered]
    held: dict[str, list[int]] = {}
    for name in view.tiers:
        if name not in view.unknown_remotes:
            held[name] = _cumulative([info.size_bytes if info.tiers.get(name) == "complete" else 0 for info in ordered])
    stored = [stored_bytes(view, info.save_id) for info in ordered]
    return {
        "time": times,
        "step": [info.step for info in ordered],
        "superseded": [info.superseded for info in ordered],
        "held": held,
        "stored": _cumulative([value or 0 for value in stored]) if any(v is not None for v in stored) else [],
        "each_plain": [info.size_bytes for info in ordered],
        "each_stored": stored,
    }


def _cumulative(values: list[int]) -> list[int]:
    total, result = 0, []
    for value in values:
        total += value
        result.append(total)
    return result
