"""`verify --repair`: good bytes from another tier in the place of damaged ones; what is beyond repair is set aside.

Derived documents are made anew first, then the local copy is repaired from whichever remote has good bytes, chunk by
chunk, then the remotes from the local copy, or from a scratch one where there is none. Whatever was touched is checked
again, and only what that check finds whole counts. A copy counts as beyond repair when every source is at hand and none
has the bytes; a source that is away may have them, so then nothing is set aside.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, FormatError, IntegrityError, NotFoundError
from ckptstore.ops.findings import DAMAGE, Depth, Finding, Verification
from ckptstore.ops.open import RunTiers
from ckptstore.ops.rederive import rederive, rederive_remotely
from ckptstore.ops.verify import check_record
from ckptstore.repo.aside import set_aside, set_aside_remotely
from ckptstore.repo.commit import roll_forward
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.record import LOCAL
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.upload import push


@dataclass(frozen=True)
class Aside:
    """One copy that counts no longer: ``where`` it lies now, None when it was deleted instead."""

    step: int
    save_id: str
    tier: str
    where: str | None

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "save_id": self.save_id, "tier": self.tier, "where": self.where}


@dataclass
class Repaired:
    """What a repair came to, beside what it marked in the findings.

    Attributes:
        reasons: Why something could not be repaired, a sentence each.
        aside: The copies that were set aside, or deleted.
    """

    reasons: list[str] = field(default_factory=list)
    aside: list[Aside] = field(default_factory=list)


def repair(tiers: RunTiers, found: Verification, depth: Depth, *, delete: bool = False) -> Repaired:
    """Repair what ``found`` says is damaged; marks in it what is whole now. Sets aside what can't be.

    Args:
        tiers: The tiers that were checked.
        found: What a check has found.
        depth: How deep that check went; the one that follows goes as deep, and reads every byte of what it reads.
        delete: Delete what is beyond repair instead of setting it aside.
    """
    done = Repaired()
    for save_id in dict.fromkeys(f.save_id for f in found.findings if f.kind == "damage"):
        mine = [f for f in found.findings if f.save_id == save_id and f.kind == "damage"]
        errors = _repair_save(tiers, save_id, mine, depth)
        step = mine[0].step
        for tier, error in errors.items():
            done.reasons.append(f"step {step}, {tier}: {error.message}")
            if isinstance(error, DAMAGE):
                try:
                    done.aside += _put_aside(tiers, tier, step, save_id, delete)
                except CkptError as refused:
                    done.reasons.append(f"step {step}, {tier}: can't be set aside: {refused.message}")
        found.findings = [
            replace(f, is_repaired=f.tier not in errors) if f.save_id == save_id and f.kind == "damage" else f
            for f in found.findings
        ]
    return done


def _repair_save(tiers: RunTiers, save_id: str, findings: list[Finding], depth: Depth) -> dict[str, CkptError]:
    """Why which tier is still damaged, after everything was tried."""
    left = {finding.tier: list(findings) for finding in findings}
    errors: dict[str, CkptError] = {}
    for _ in range(2):  # what the first round has repaired may be the source that another tier lacked
        errors = {}
        for tier in list(left):
            try:
                _repair_tier(tiers, tier, save_id, left[tier])
            except CkptError as error:
                errors[tier] = error
        before, left = left, _look_again(tiers, save_id, set(left), depth)
        if not left or len(left) == len(before):
            break
    hopeless = IntegrityError("no other tier here has good bytes of it")
    return {tier: errors.get(tier, hopeless) for tier in left}


def _look_again(tiers: RunTiers, save_id: str, hit: set[str], depth: Depth) -> dict[str, list[Finding]]:
    """What is damaged now, by tier; a tier that doesn't list the save as whole any more is."""
    again = Verification()
    record = next((record for record in tiers.catalog().records if record.save_id == save_id), None)
    looked: set[str] = set()
    if record is not None:
        check_record(again, tiers, record, replace(depth, share=1.0))
        looked = set(record.remote) | ({LOCAL} if record.tiers.get(LOCAL) == "complete" else set())
    left = {tier: [f for f in again.findings if f.tier == tier] for tier in hit}
    return {tier: found for tier, found in left.items() if found or tier not in looked}


def _repair_tier(tiers: RunTiers, tier: str, save_id: str, findings: list[Finding]) -> None:
    if tier == LOCAL and tiers.local is not None:
        _repair_local(tiers.local, tiers, save_id)
        return
    remote = next(remote for remote in tiers.remotes if remote.name == tier)
    objects = [part for finding in findings if finding.object for part in finding.object.split(", ")]
    _repair_remote(tiers, remote, save_id, {part for part in objects if pack_owner(part) is not None})


def _repair_local(tier: LocalTier, tiers: RunTiers, save_id: str) -> None:
    save = tier.find(tiers.run, save_id)
    if save is not None and save.state == "complete":
        rederive(tier, tiers.run, save)
    elif save is not None:
        roll_forward(tier, tiers.run, save_id)
    if remotes := [remote for remote in tiers.remotes if _place(remote, save_id) is not None]:
        pull(remotes, save_id, tier, reverify=True, parts_of_node=True)


def _repair_remote(tiers: RunTiers, remote: RemoteTier, save_id: str, packs: set[str]) -> None:
    """Send again what is wrong there, from the local copy or from another remote."""
    place, local = _place(remote, save_id), tiers.local
    if place is not None:
        rederive_remotely(remote, place)
    save = local.find(tiers.run, save_id) if local is not None else None
    if local is not None and save is not None and save.state == "complete":
        _send(local, save.path, tiers.run, remote, packs)
        return
    others = [other for other in tiers.remotes if other is not remote and _place(other, save_id) is not None]
    if others:
        with tempfile.TemporaryDirectory(prefix="ckptstore-repair-") as folder:
            scratch = LocalTier(Path(folder) / "store")
            scratch.create()
            _send(scratch, pull(others, save_id, scratch), tiers.run, remote, packs)


def _place(remote: RemoteTier, save_id: str) -> RemoteSave | None:
    return next((save for save in remote.saves() if save.save_id == save_id), None)


def _send(tier: LocalTier, path: Path, run: str, remote: RemoteTier, packs: set[str]) -> None:
    here = next(save for save in tier.saves(run) if save.path == path)
    root = tier.root_manifest(run, here)
    place = _place(remote, here.save_id)
    if place is not None:
        try:
            is_whole = remote.root_manifest(place) == root and remote.summary(place) == root.summary
        except (FormatError, IntegrityError, NotFoundError):
            is_whole = False
        if not is_whole or not remote.has(place.summary_key):
            remote.rewrite(place, root)
    push(tier, path, run, remote, config=StoreConfig(), distrust=packs)


def _put_aside(tiers: RunTiers, tier: str, step: int, save_id: str, delete: bool) -> list[Aside]:
    """Nothing where the copy is not committed: that counts as no checkpoint already, and may be being written.

    Nor where it is a node's part of one: the others would be of no use without it, which may be repaired yet.
    """
    where: str | None = None
    if tier == LOCAL:
        save = tiers.local.find(tiers.run, save_id) if tiers.local is not None else None
        if tiers.local is None or save is None or save.state != "complete":
            return []
        if save.summary is not None and save.summary.num_nodes > 1:
            return []
        if delete:
            tiers.local.delete(tiers.run, save_id)
        else:
            where = str(set_aside(tiers.local, tiers.run, save_id))
        return [Aside(step, save_id, tier, where)]
    remote = next(remote for remote in tiers.remotes if remote.name == tier)
    place = _place(remote, save_id)
    if place is None:
        return []
    if delete:
        remote.delete(place)
    else:
        where = f"runs/{remote.run}/{set_aside_remotely(remote, place)}"
    return [Aside(step, save_id, tier, where)]
