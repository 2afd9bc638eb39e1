"""One load: all ranks agree on one save before any byte moves, then each takes its pieces from what is nearest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.loader import load_into
from ckptstore.errors import (
    CheckpointNotFoundError,
    CkptError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    NoStoreError,
    TransientError,
)
from ckptstore.format.manifest import ShardManifest
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.commit import roll_forward as complete_part
from ckptstore.repo.local import LocalTier
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier
from ckptstore.types import CheckpointInfo, StepLike

log = logging.getLogger("ckptstore")


@dataclass(frozen=True)
class Tiers:
    """The copies a store can read from."""

    run: str
    local: LocalTier | None
    remotes: tuple[RemoteTier, ...]

    def catalog(self) -> Catalog:
        """The union of what they hold; a remote that can't be reached now is passed over if the local tier answers."""
        return Catalog.read(self.local, self.remotes, self.run, tolerate_unreachable=self.local is not None)

    def exists(self) -> bool:
        """Whether any tier is a store at all."""
        return (self.local is not None and self.local.exists()) or any(r.exists() for r in self.remotes)


def choose(tiers: Tiers, step: StepLike) -> tuple[Record, CheckpointReader, tuple[str, ...]]:
    """The record ``step`` means, opened; with ``latest``, damaged manifests are passed over and reported.

    Raises:
        CheckpointNotFoundError: there is none.
        IntegrityError, FormatError, IncompleteCheckpointError: the one asked for can't be read, or none of those there.
    """
    catalog = tiers.catalog()
    wanted = catalog.resolve(step)
    candidates = [wanted]
    if step == "latest":
        candidates += [r for r in reversed(catalog.line()) if r.summary.step < wanted.summary.step]
    passed: list[str] = []
    for record in candidates:
        try:
            return record, CheckpointReader(record, tiers.local, tiers.remotes), tuple(passed)
        except (IntegrityError, FormatError, IncompleteCheckpointError) as error:
            passed.append(f"step {record.summary.step} (save {record.summary.save_id}): {error.message}")
            if step != "latest":
                raise
            log.warning("passed over %s", passed[-1])
    raise IntegrityError(
        f"every checkpoint of run {tiers.run!r} is damaged: " + "; ".join(passed),
        hint="run `ckptctl verify` to see what is left",
        run=tiers.run,
    )


def load(
    tiers: Tiers,
    agreement: Agreement,
    state: MutableMapping[str, Any] | Mapping[str, Any],
    step: StepLike,
    *,
    only: Sequence[str],
    rename: Mapping[str, str] | None,
    strict: bool,
    missing_ok: bool,
) -> tuple[CheckpointInfo, Record] | None:
    """Collective. Fill ``state`` from the save that rank 0 chooses; None for an empty run with ``missing_ok``."""
    record: Record | None = None
    reader: CheckpointReader | None = None
    passed: tuple[str, ...] = ()
    error: CkptError | None = None
    if agreement.rank == 0:
        try:
            record, reader, passed = choose(tiers, step)
        except CheckpointNotFoundError as missing:
            error = missing
            if missing_ok and step == "latest":
                error = None
        except NoStoreError as missing:
            error = None if missing_ok and step == "latest" else missing
        except CkptError as failure:
            error = failure
    agreement.together(error, what="choosing a checkpoint")
    save_id: str | None = agreement.broadcast(record.summary.save_id if record else None)
    if save_id is None:
        return None
    try:
        if agreement.rank != 0:
            record, reader, passed = choose(tiers, save_id)
    except CkptError as failure:
        error = failure
    agreement.together(error, what="choosing a checkpoint")
    if record is None or reader is None:
        raise AssertionError("agreed on a save without a reader")
    report = load_into(
        state,
        reader,
        only=only,
        rename=rename,
        strict=strict,
        agreement=agreement,
    )
    if passed:
        report = replace(report, passed_over=passed)
    return replace(record.info(), report=report), record


def roll_forward(tiers: Tiers, agreement: Agreement) -> None:
    """Collective. Complete saves whose parts are all durable, over the nodes of this job and the remotes."""
    if tiers.local is None:
        return
    parts: dict[str, list[bytes]] = {}
    try:
        if tiers.local.exists():
            for save in tiers.local.saves(tiers.run):
                if save.state == "prepared":
                    found = tiers.local.shard_manifests_present(save.path)
                    parts[save.save_id] = [shard.encode() for shard in found]
    except CkptError as error:
        log.warning("looking for prepared saves failed: %s", error)
    if not any(agreement.gather(bool(parts), what="looking for prepared parts")):
        return
    everywhere = agreement.gather(parts, what="gathering prepared parts")
    for save_id in parts:
        elsewhere: dict[int, ShardManifest] = {}
        for node in everywhere:
            for data in node.get(save_id, []):
                shard = ShardManifest.decode(data, what="a peer's shard manifest")
                elsewhere[shard.rank] = shard
        world_size = next(iter(elsewhere.values())).world_size if elsewhere else 0
        for rank in set(range(world_size)) - set(elsewhere):
            if (found := _uploaded_part(tiers, save_id, rank)) is not None:
                elsewhere[rank] = found
        if complete_part(tiers.local, tiers.run, save_id, elsewhere.values()) is not None:
            log.info("rolled save %s forward", save_id)


def _uploaded_part(tiers: Tiers, save_id: str, rank: int) -> ShardManifest | None:
    """The shard manifest of a part that is durable in a remote, committed there or not."""
    for remote in tiers.remotes:
        try:
            document = remote.find_shard(save_id, rank)
        except (TransientError, NoStoreError) as error:
            log.debug("remote %s not asked for parts of %s: %s", remote.name, save_id, error)
            continue
        if document is not None:
            return document.shard
    return None
