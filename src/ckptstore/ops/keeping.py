"""Why each checkpoint is kept, and what may go: the rules a manager has noted, applied to what is here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.ops import history
from ckptstore.ops.open import Place
from ckptstore.policy.retention import Retention
from ckptstore.repo import journal
from ckptstore.repo.catalog import LOCAL
from ckptstore.types import CheckpointInfo

GOING = "no rule keeps it"
#: The same where a remote that was not asked may lack it still.
GOING_WHEN_SENT = f"{GOING} once the remote has it"


def why_kept(place: Place, run: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """save_id -> tier -> the reasons; :data:`GOING` for what the next retention of that tier will drop.

    Empty when no manager has saved in this run on this machine: then the rules are another machine's to know.
    """
    noted = journal.read(place.local, run, "rules") if place.local is not None else []
    if not noted or place.local is None:
        return {}
    infos = [record.info() for record in place.tiers(run).catalog().records]
    verified = history.sound(place.local, run)
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for tier in dict.fromkeys(tier for info in infos for tier in info.tiers):
        rules = Retention.noted(noted[-1].get("local" if tier == LOCAL else "remote"))
        if rules is None:
            continue
        awaited, unsure = _awaited(place, infos, noted[-1]) if tier == LOCAL else (set(), set())
        decision = rules.decide(infos, tier, verified=verified, busy=awaited)
        for save_id, reasons in decision.keep.items():
            found.setdefault(save_id, {})[tier] = reasons
        for info in decision.drop:
            found.setdefault(info.save_id, {})[tier] = (GOING_WHEN_SENT if info.save_id in unsure else GOING,)
    return found


def _awaited(place: Place, infos: list[CheckpointInfo], noted: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Saves that a remote lacks and would keep: for sure, and as far as can be told without asking it."""
    awaited: set[str] = set()
    unsure: set[str] = set()
    rules = Retention.noted(noted.get("remote"))
    if rules is not None:
        for name in {*place.blobs, *noted.get("remotes", ())}:
            known = {info.save_id for info in infos if info.tiers.get(name) == "complete"}
            (awaited if name in place.blobs else unsure).update(rules.awaited(infos, name, known))
    return awaited, unsure
