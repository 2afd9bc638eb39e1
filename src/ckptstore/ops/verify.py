"""`verify`: find every breach between what the manifests pin and what is there, tier by tier.

Nothing counts as damaged that was looked at only once: a bad answer is asked for again first, past the page cache. If
the second is good, what is broken is the way there, and that is what the finding says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ckptstore.errors import CkptError
from ckptstore.ops.findings import DAMAGE, Breach, Depth, Finding, Step, Verification
from ckptstore.ops.open import RunTiers
from ckptstore.ops.verify_local import check_local
from ckptstore.ops.verify_remote import check_remote
from ckptstore.repo.catalog import Record
from ckptstore.repo.local import LocalTier
from ckptstore.repo.local_save import LocalSave
from ckptstore.repo.record import LOCAL
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.types import StepLike

BytesDone = Callable[[int], None]


def verify(
    tiers: RunTiers,
    step: StepLike | None,
    *,
    everything: bool,
    read_data: bool,
    sample: float | None = None,
    part: tuple[int, int] = (0, 1),
    progress: BytesDone | None = None,
) -> Verification:
    """Check one checkpoint (the newest by default) or all of them, in every tier that has it.

    Args:
        tiers: Where to look.
        step: Which checkpoint.
        everything: All of them, superseded ones and those too damaged to be described.
        read_data: Read and decode every byte; otherwise manifests, sizes and presence.
        sample: Read this share of the chunks, chosen at random, 0 < share <= 1.
        part: ``(i, n)``: only every n-th rank's shard.
        progress: Told the bytes read so far.
    """
    depth = Depth(read_data or sample is not None, 1.0 if sample is None or read_data else sample, part)
    catalog = tiers.catalog()
    records = list(catalog.records) if everything else [catalog.resolve("latest" if step is None else step)]
    result = Verification()
    for record in records:
        check_record(result, tiers, record, depth, progress)
    if everything:
        for damaged in catalog.damaged:
            for tier in damaged.tiers:
                result.checked.append((damaged.step, damaged.save_id, tier))
                result.findings.append(Finding(damaged.step, damaged.save_id, tier, "damage", damaged.reason))
        for save in catalog.prepared:
            if tiers.local is not None:
                result.findings += _uncommitted(tiers.local, save)
        for remote in tiers.remotes:
            result.findings += _lost_commits(remote)
    return result


def _uncommitted(tier: LocalTier, save: LocalSave) -> list[Finding]:
    """A save all of whose parts are here and whose manifest isn't: on one node they appear together."""
    try:
        shards = tier.shard_manifests_present(save.path)
    except DAMAGE:
        return []  # it may be being written
    if not shards or len(shards) < shards[0].world_size:
        return []
    what = "manifest.json is missing although every rank's part is here"
    return [Finding(save.step, save.save_id, LOCAL, "damage", what, object="manifest.json")]


def _lost_commits(remote: RemoteTier) -> list[Finding]:
    """Summaries without their commit: somebody else has removed it, or a delete was cut off."""
    there = set(remote.saves())
    names = (RemoteSave.parse(key.removeprefix("summaries/")) for key in remote.list_keys("summaries"))
    lost = [save for save in names if save is not None and save not in there and not remote.has(save.key)]
    what = "its manifest is gone although its summary is there: removed by somebody else, or a delete was cut off"
    return [Finding(save.step, save.save_id, remote.name, "damage", what, object=save.key) for save in lost]


def check_record(
    result: Verification, tiers: RunTiers, record: Record, depth: Depth, progress: BytesDone | None = None
) -> None:
    """Check one checkpoint in every tier that has it; adds to ``result``."""
    if tiers.local is not None and record.local is not None and record.local.state == "prepared":
        result.findings += _uncommitted(tiers.local, record.local)
    elif tiers.local is not None and record.local is not None:
        _check(result, record, LOCAL, check_local(tiers.local, tiers.run, record, depth), progress)
    for remote in tiers.remotes:
        if remote.name in record.remote:
            _check(result, record, remote.name, check_remote(remote, record, depth), progress)


def _check(result: Verification, record: Record, tier: str, steps: Iterator[Step], progress: BytesDone | None) -> None:
    summary = record.summary

    def found(breach: Breach) -> None:
        finding = Finding(
            summary.step, summary.save_id, tier, breach.kind, breach.what, breach.key, breach.object
        )  # fmt: skip
        result.findings.append(finding)

    result.checked.append((summary.step, summary.save_id, tier))
    try:
        for step in steps:
            if isinstance(step, int):
                result.bytes_read += step
                if progress is not None:
                    progress(result.bytes_read)
            else:
                found(step)
    except DAMAGE as error:
        found(Breach(error.message, error.context.get("key")))
    except CkptError as error:
        found(Breach(error.message, kind="unchecked"))


__all__ = ["Depth", "Finding", "Verification", "check_record", "verify"]
