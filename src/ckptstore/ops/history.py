"""What is known of looks at a run's checkpoints: which copy was read, how deeply, when, and what was found.

Kept in the journal of the local tier, so only where there is one. A restore that checked every byte counts too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ckptstore.clock import SYSTEM_CLOCK, Clock, rfc3339
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.ops.verify import Finding, Verification

#: manifests and sizes | some chunks | every byte, read where it lies | every byte, as a load or restore used it
Depth = Literal["structure", "sample", "bytes", "restore"]
#: Depths that leave no byte out.
FULL: tuple[Depth, ...] = ("bytes", "restore")


def note_verified(
    tier: LocalTier | None, run: str, found: Verification, depth: Depth, *, clock: Clock = SYSTEM_CLOCK
) -> None:
    """Remember what a verification has seen, one record per copy. Never fails."""
    if tier is None:
        return
    by_copy: dict[tuple[str, str], list[Finding]] = {}
    for finding in found.findings:
        by_copy.setdefault((finding.save_id, finding.tier), []).append(finding)
    now = rfc3339(clock.now())
    journal.append(
        tier,
        run,
        "verified",
        [
            _record(now, step, save_id, name, depth, by_copy.get((save_id, name), ()))
            for step, save_id, name in dict.fromkeys(found.checked)
        ],
    )


def note_restored(
    tier: LocalTier | None, run: str, step: int, save_id: str, sources: str, *, clock: Clock = SYSTEM_CLOCK
) -> None:
    """Remember a load, restore or drill that checked every byte it used. Never fails."""
    if tier is not None:
        journal.append(tier, run, "verified", [_record(rfc3339(clock.now()), step, save_id, sources, "restore", ())])


def verified(tier: LocalTier, run: str, save_id: str | None = None) -> list[dict[str, Any]]:
    """The records, oldest first; of one checkpoint, or of all.

    Each has ``time``, ``step``, ``save_id``, ``tier``, ``depth``, ``result`` ("good", "damaged", "unsteady" or
    "unchecked"), ``num_findings`` and, if there are any, ``what``.
    """
    found = journal.read(tier, run, "verified")
    return found if save_id is None else [record for record in found if record.get("save_id") == save_id]


def sound(tier: LocalTier, run: str) -> set[str]:
    """Every save that has a copy whose last look of those that tell found all of it good.

    A look that read every byte tells; so does any that found damage.
    """
    return sound_of(verified(tier, run))


def sound_of(looks: Iterable[Mapping[str, Any]]) -> set[str]:
    """As :func:`sound`, from records, oldest first."""
    latest: dict[tuple[str, str], bool] = {}
    for look in looks:
        if look.get("depth") in FULL or look.get("result") == "damaged":
            for place in places_of(look):
                latest[str(look.get("save_id")), place] = is_good(look)
    return {save_id for (save_id, _), was_good in latest.items() if was_good}


def is_good(look: Mapping[str, Any]) -> bool:
    """Whether it read every byte from where checkpoints stay, and all were right."""
    return look.get("result") == "good" and look.get("depth") in FULL and is_of_tiers(places_of(look))


def places_of(look: Mapping[str, Any]) -> set[str]:
    """Where it read: one tier, or several whose bytes made up one restore."""
    return set(str(look.get("tier", "")).split(", ")) - {""}


def is_of_tiers(places: Collection[str]) -> bool:
    """Whether these are tiers, all of them: what a node agent has in memory is gone with it."""
    return bool(places) and "arena" not in places


def _record(
    now: str, step: int, save_id: str, tier: str, depth: Depth, findings: Iterable[Finding]
) -> Mapping[str, Any]:
    left = [finding for finding in findings if not finding.is_repaired]
    kinds = {finding.kind for finding in left}
    result = next((kind for kind in ("damage", "unsteady", "unchecked") if kind in kinds), "good")
    return {
        "time": now,
        "step": step,
        "save_id": save_id,
        "tier": tier,
        "depth": depth,
        "result": "damaged" if result == "damage" else result,
        "num_findings": len(left),
        **({"what": left[0].what[:500]} if left else {}),
    }
