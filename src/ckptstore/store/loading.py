"""One load: all ranks agree on one save before any byte moves, then each takes its pieces from what is nearest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from mmap import mmap
from typing import Any, NamedTuple

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.sharing import Readers
from ckptstore.errors import (
    CheckpointNotFoundError,
    CkptError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    NoStoreError,
    TransientError,
)
from ckptstore.format.manifest import ShardManifest, Summary
from ckptstore.repo.catalog import Catalog, Record
from ckptstore.repo.commit import roll_forward as complete_part
from ckptstore.repo.directory import parts_of_node
from ckptstore.repo.local import LocalSave, LocalTier
from ckptstore.repo.peers import Told
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.remote import RemoteTier
from ckptstore.store.nodes import Nodes
from ckptstore.types import CheckpointInfo, LoadReport, StepLike

log = logging.getLogger("ckptstore")


@dataclass(frozen=True)
class Tiers:
    """The copies a store can read from."""

    run: str
    local: LocalTier | None
    remotes: tuple[RemoteTier, ...]

    def catalog(self, elsewhere: Sequence[Summary] = ()) -> Catalog:
        """The union of what they hold; a remote that can't be reached now is passed over if another tier has something.

        Args:
            elsewhere: Saves that are complete on other nodes of the job.
        """
        return Catalog.read(
            self.local,
            self.remotes,
            self.run,
            tolerate_unreachable=True,
            elsewhere=elsewhere,
        )

    def exists(self) -> bool:
        """Whether any tier is a store at all."""
        return (self.local is not None and self.local.exists()) or any(r.exists() for r in self.remotes)


def choose(tiers: Tiers, step: StepLike) -> tuple[Record, CheckpointReader, tuple[str, ...]]:
    """Local. The record ``step`` means, opened; with ``latest``, damaged ones are passed over and reported.

    Raises:
        CheckpointNotFoundError: there is none.
        IntegrityError, FormatError, IncompleteCheckpointError: the one asked for can't be read, or none of those there.
        TransientError: none of those there can be read, and a remote that may have another can't be asked now.
    """
    found = _candidates(tiers, step, (), missing_ok=False)
    passed = _PassedOver(tiers.run, found.unasked)
    passed.note_left_out(found.left_out)
    for record in found.records:
        try:
            return record, CheckpointReader(record, tiers.local, tiers.remotes), tuple(passed.reasons)
        except (IntegrityError, FormatError, IncompleteCheckpointError) as error:
            if step != "latest":
                raise
            passed.note(record, error)
    raise passed.verdict()


class Loaded(NamedTuple):
    """What was loaded.

    Attributes:
        report: what the load did; the info's.
        is_torn_here: this node's copy lacks files that a remote has.
    """

    info: CheckpointInfo
    report: LoadReport
    record: Record
    is_torn_here: bool


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
    once_per_job: bool = False,
) -> Loaded | None:
    """Collective. Fill ``state`` from the save that rank 0 chooses; None for an empty run with ``missing_ok``.

    The local tiers of the job's nodes count as one. A rank reads what its own node holds; the rest comes from ranks of
    the nodes that hold it, or from a remote, each byte once per node, or once in the job with ``once_per_job``, for
    which rank 0's word counts.
    """
    nodes = Nodes.meet(tiers.local, agreement)
    opened = _open_together(tiers, agreement, nodes, step, missing_ok=missing_ok, once_per_job=once_per_job)
    if opened is None:
        return None
    with opened.reader as reader:
        is_torn = _is_torn_here(opened.record, reader)
        if is_torn and nodes.is_leader:
            step_here = opened.record.summary.step
            log.warning("the local copy of step %s lacks files; the next save has them fetched", step_here)
        report = load_into(
            state,
            reader,
            only=only,
            rename=rename,
            strict=strict,
            agreement=agreement,
            readers=opened.readers,
        )
    if opened.passed:
        report = replace(report, passed_over=opened.passed)
    return Loaded(replace(opened.record.info(), report=report), report, opened.record, is_torn)


def _is_torn_here(record: Record, reader: CheckpointReader) -> bool:
    """Whether this node's copy has lost whole files."""
    if record.local is None or not record.remote:
        return False
    return not reader.ranks_on_disk.issuperset(ref.rank for ref in parts_of_node(record.local.path, reader.root))


@dataclass(frozen=True)
class _Opened:
    """The save that all ranks agreed on, open on this one; ``passed`` says which newer ones were not used, and why."""

    record: Record
    reader: CheckpointReader
    readers: Readers
    passed: tuple[str, ...]


class _Candidates(NamedTuple):
    """What a step may mean, best first.

    Attributes:
        left_out: what could not be among them, and why.
        unasked: a remote could not be reached, for this reason.
    """

    records: list[Record]
    left_out: tuple[str, ...] = ()
    unasked: TransientError | None = None


def _candidates(tiers: Tiers, step: StepLike, elsewhere: Sequence[Summary], *, missing_ok: bool) -> _Candidates:
    """What ``step`` may mean: with ``latest`` older ones follow, for when it can't be read."""
    try:
        catalog = tiers.catalog(elsewhere)
        wanted = catalog.resolve(step)
    except (CheckpointNotFoundError, NoStoreError):
        if missing_ok and step == "latest":
            return _Candidates([])
        raise
    if step != "latest":
        return _Candidates([wanted])
    older = (r for r in reversed(catalog.line()) if r.summary.step < wanted.summary.step)
    return _Candidates([wanted, *older], catalog.left_out(), next(iter(catalog.unreachable.values()), None))


def _open_together(
    tiers: Tiers, agreement: Agreement, nodes: Nodes, step: StepLike, *, missing_ok: bool, once_per_job: bool
) -> _Opened | None:
    """Collective. Rank 0 proposes, everybody opens; what some rank can't open is passed over, or an error."""
    elsewhere = nodes.elsewhere(tiers.local, tiers.run, agreement)
    found = _Candidates([])
    error: CkptError | None = None
    if agreement.rank == 0:
        try:
            found = _candidates(tiers, step, elsewhere, missing_ok=missing_ok)
        except CkptError as failure:
            error = failure
    agreement.together(error, what="choosing a checkpoint")
    candidates = found.records
    once_per_job, found = agreement.broadcast((once_per_job, found._replace(records=[])), what="choosing a checkpoint")
    passed = _PassedOver(tiers.run, found.unasked)
    passed.note_left_out(found.left_out, tell=agreement.rank == 0)
    while True:
        proposed = replace(candidates.pop(0), local=None) if candidates else None
        record = agreement.broadcast(proposed, what="choosing a checkpoint")
        if record is None and passed.reasons:
            raise passed.verdict()
        if record is None:
            return None
        reader: CheckpointReader | None = None
        error = None
        try:
            if tiers.local is not None:
                record = replace(record, local=tiers.local.find(tiers.run, record.save_id))
        except CkptError as failure:
            error = failure
        told = _tell(tiers, agreement, nodes, record)
        with ExitStack() as unless_agreed:
            try:
                if error is None:
                    images = _borrow(tiers, record.save_id)
                    reader = CheckpointReader(record, tiers.local, tiers.remotes, told=told, images=images)
                    unless_agreed.callback(reader.close)
            except CkptError as failure:
                error = failure
            errors = agreement.gather(error, what="opening the checkpoint")
            failed = next((each for each in errors if each is not None), None)
            if failed is None and reader is not None:
                held = nodes.gather(agreement, partial(_ranks_here, reader), what="opening the checkpoint")
                readers = Readers(nodes.of_rank, tuple(held), once_per_job)
                unless_agreed.pop_all()
                return _Opened(record, reader, readers, tuple(passed.reasons))
            if step != "latest" or not isinstance(failed, (IntegrityError, FormatError, IncompleteCheckpointError)):
                agreement.raise_together(error, what="opening the checkpoint")
        passed.note(record, failed, tell=agreement.rank == 0)


def _ranks_here(reader: CheckpointReader) -> frozenset[int]:
    return reader.ranks_here


def _borrow(tiers: Tiers, save_id: str) -> Mapping[int, mmap]:
    """Local. What this node's agent still has of the save in memory: after a crash of the trainers alone, all of it."""
    if tiers.local is None:
        return {}
    from ckptstore.agent.client import AgentClient

    try:
        observer = AgentClient.observe(tiers.local.root)
        if observer is None:
            return {}
        try:
            return observer.borrow(tiers.run, save_id)
        finally:
            observer.close()
    except CkptError as error:
        log.debug("the node agent lends nothing of save %s: %s", save_id, error)
        return {}


def _tell(tiers: Tiers, agreement: Agreement, nodes: Nodes, record: Record) -> Told | None:
    """Collective, between several nodes. The manifests of this save that their local tiers hold."""
    if nodes.count == 1:
        return None

    def look() -> Told:
        if tiers.local is None or record.local is None:
            return Told()
        return Told.by(tiers.local, tiers.run, record.local)

    return Told.together(nodes.gather(agreement, look, what="telling what each node holds"))


@dataclass
class _PassedOver:
    """Checkpoints that could not be used, newest first, and why."""

    run: str
    unasked: TransientError | None = None
    reasons: list[str] = field(default_factory=list)
    errors: list[CkptError | None] = field(default_factory=list)

    def note_left_out(self, left_out: Sequence[str], *, tell: bool = True) -> None:
        """What the catalogue could not offer."""
        self.reasons += left_out
        for each in left_out if tell else ():
            log.warning("passed over %s", each)

    def note(self, record: Record, error: CkptError | None, *, tell: bool = True) -> None:
        """One more."""
        why = error.message if error is not None else "unreadable"
        self.errors.append(error)
        self.reasons.append(f"step {record.summary.step} (save {record.summary.save_id}): {why}")
        if tell:
            log.warning("passed over %s", self.reasons[-1])

    def verdict(self) -> IntegrityError | IncompleteCheckpointError | TransientError:
        """What to raise when none is left. Nothing is called lost while somebody who may have it can't be asked."""
        if self.unasked is not None:
            return TransientError(
                f"no checkpoint of run {self.run!r} within reach is whole: " + "; ".join(self.reasons),
                hint="try again when the remote answers",
                **{**self.unasked.context, "run": self.run},
            )
        if all(isinstance(error, IncompleteCheckpointError) for error in self.errors):
            return IncompleteCheckpointError(
                f"no checkpoint of run {self.run!r} is whole on the nodes of this job: " + "; ".join(self.reasons),
                hint="start on the nodes that saved it, or name a remote",
                run=self.run,
            )
        return IntegrityError(
            f"every checkpoint of run {self.run!r} is damaged: " + "; ".join(self.reasons),
            hint="run `ckptctl verify` to see what is left",
            run=self.run,
        )


def roll_forward(tiers: Tiers, agreement: Agreement) -> None:
    """Collective. Complete saves whose parts are all durable, over the nodes of this job and the remotes."""
    if tiers.local is None:
        return
    parts: dict[str, list[bytes]] = {}  # here
    saves: dict[str, LocalSave] = {}
    try:
        if tiers.local.exists():
            saves = {save.save_id: save for save in tiers.local.saves(tiers.run)}
            parts = {save_id: _shards(tiers.local, save) for save_id, save in saves.items() if save.state == "prepared"}
    except CkptError as error:
        log.warning("looking for prepared saves failed: %s", error)
    wanted = set[str]().union(*agreement.gather(list(parts), what="looking for prepared parts"))
    if not wanted:
        return
    given = dict(parts)
    try:  # another node may have marked it already
        given.update((save_id, _shards(tiers.local, saves[save_id])) for save_id in wanted & (set(saves) - set(parts)))
    except CkptError as error:
        log.warning("looking for parts of saves that other nodes have prepared failed: %s", error)
    everywhere = agreement.gather(given, what="gathering prepared parts")
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


def _shards(local: LocalTier, save: LocalSave) -> list[bytes]:
    return [shard.encode() for shard in local.shard_manifests_present(save.path)]


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
