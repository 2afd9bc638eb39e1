"""Why each checkpoint is kept, and what may go: the rules a manager has noted, applied to what is here."""

from __future__ import annotations

from ckptstore.ops import history
from ckptstore.ops.open import Place
from ckptstore.policy.retention import Retention
from ckptstore.repo import journal

GOING = "no rule keeps it"


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
        rules = Retention.noted(noted[-1].get("local" if tier == "local" else "remote"))
        if rules is None:
            continue
        decision = rules.decide(infos, tier, verified=verified)
        for save_id, reasons in decision.keep.items():
            found.setdefault(save_id, {})[tier] = reasons
        for info in decision.drop:
            found.setdefault(info.save_id, {})[tier] = (GOING,)
    return found
