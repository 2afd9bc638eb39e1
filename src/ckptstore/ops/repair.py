"""`verify --repair`: good bytes from another tier in the place of damaged ones. Deletes nothing.

Local first, from whichever remote has good bytes, chunk by chunk; then the remotes, from the local copy, or from a
scratch one where there is none. Whatever was touched is checked again, and only what that check finds whole counts.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, FormatError, IntegrityError, NotFoundError
from ckptstore.ops.open import RunTiers
from ckptstore.ops.verify import Depth, Finding, Verification, check_record
from ckptstore.repo.catalog import Record
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.packs import pack_owner
from ckptstore.repo.record import LOCAL
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push


def repair(tiers: RunTiers, found: Verification, depth: Depth) -> list[str]:
    """Repair what ``found`` says is damaged; marks in it what is whole now.

    Args:
        tiers: The tiers that were checked.
        found: What a check has found.
        depth: How deep that check went; the one that follows goes as deep, and reads every byte of what it reads.

    Returns:
        Why something could not be repaired, a sentence each.
    """
    reasons: list[str] = []
    damaged = dict.fromkeys(f.save_id for f in found.findings if f.kind == "damage")
    for save_id in damaged:
        mine = [f for f in found.findings if f.save_id == save_id and f.kind == "damage"]
        reasons += _repair_save(tiers, save_id, mine)
        again = Verification()
        records = {record.save_id: record for record in tiers.catalog().records}
        if save_id in records:
            check_record(again, tiers, records[save_id], replace(depth, share=1.0))
            looked = {LOCAL} if records[save_id].tiers.get(LOCAL) == "complete" else set()
            looked |= set(records[save_id].remote)
        else:
            looked = set()
        bad = {f.tier for f in again.findings} | ({f.tier for f in mine} - looked)
        found.findings = [
            replace(f, is_repaired=f.tier not in bad) if f.save_id == save_id and f.kind == "damage" else f
            for f in found.findings
        ]
    return reasons


def _repair_save(tiers: RunTiers, save_id: str, findings: list[Finding]) -> list[str]:
    reasons: list[str] = []
    hit = {finding.tier for finding in findings}
    record = next((r for r in tiers.catalog().records if r.save_id == save_id), None)
    try:
        if LOCAL in hit and tiers.local is not None:
            _repair_local(tiers.local, tiers, save_id, record)
    except CkptError as error:
        reasons.append(f"step {findings[0].step}, local: {error.message}")
    for remote in tiers.remotes:
        if remote.name not in hit:
            continue
        packs = {
            part
            for finding in findings
            if finding.tier == remote.name and finding.object
            for part in finding.object.split(", ")
            if pack_owner(part) is not None
        }
        try:
            _repair_remote(tiers, remote, save_id, packs)
        except CkptError as error:
            reasons.append(f"step {findings[0].step}, {remote.name}: {error.message}")
    return reasons


def _repair_local(tier: LocalTier, tiers: RunTiers, save_id: str, record: Record | None) -> None:
    remotes = [r for r in tiers.remotes if any(save.save_id == save_id for save in r.saves())]
    if not remotes:
        raise IntegrityError("no other tier here has this checkpoint", hint="name its remote with --remote")
    if record is not None and record.summary.num_nodes > 1:
        raise IntegrityError(
            "this node holds only its own part of it", hint="loading repairs it; or `ckptctl restore` to a new folder"
        )
    pull(remotes, save_id, tier, reverify=True)


def _repair_remote(tiers: RunTiers, remote: RemoteTier, save_id: str, packs: set[str]) -> None:
    """Send again what is wrong there. Documents are derived from the local ones, which are checked first."""
    local = tiers.local
    save = local.find(tiers.run, save_id) if local is not None else None
    if local is not None and save is not None and save.state == "complete":
        _send(local, save.path, tiers.run, remote, packs)
        return
    others = [other for other in tiers.remotes if other is not remote]
    others = [other for other in others if any(found.save_id == save_id for found in other.saves())]
    if not others:
        raise IntegrityError("no other tier here has this checkpoint", hint="run this where a local copy is")
    with tempfile.TemporaryDirectory(prefix="ckptstore-repair-") as folder:
        scratch = LocalTier(Path(folder) / "store")
        scratch.create()
        _send(scratch, pull(others, save_id, scratch), tiers.run, remote, packs)


def _send(tier: LocalTier, path: Path, run: str, remote: RemoteTier, packs: set[str]) -> None:
    here = next(save for save in tier.saves(run) if save.path == path)
    root = tier.root_manifest(run, here)
    place = next((save for save in remote.saves() if save.save_id == here.save_id), None)
    if place is not None:
        try:
            is_whole = remote.root_manifest(place) == root and remote.summary(place) == root.summary
        except (FormatError, IntegrityError, NotFoundError):
            is_whole = False
        if not is_whole or not remote.has(place.summary_key):
            remote.rewrite(place, root)
    push(tier, path, run, remote, config=StoreConfig(), distrust=packs)
