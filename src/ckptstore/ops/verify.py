"""`verify`: find every breach between what the manifests pin and what is there, tier by tier.

Nothing counts as damaged that was looked at only once: a bad answer is asked for again first, past the page cache. If
the second is good, what is broken is the way there, and that is what the finding says.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ckptstore.codec.base import CODECS
from ckptstore.errors import (
    CkptError,
    FormatError,
    IncompleteCheckpointError,
    IntegrityError,
    NotFoundError,
)
from ckptstore.format import stock
from ckptstore.format.manifest import (
    FORMAT,
    FORMAT_VERSION,
    RootManifest,
    ShardManifest,
    digest,
    ref_of,
    root_from,
    strong_digest,
)
from ckptstore.ops.open import RunTiers
from ckptstore.repo.catalog import Record
from ckptstore.repo.frames import RemoteChunks
from ckptstore.repo.local import LocalTier
from ckptstore.repo.local_save import LocalSave
from ckptstore.repo.packs import PlacedFrame, Range, chunks_of, own_bytes, placed, ranges
from ckptstore.repo.record import LOCAL
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.types import StepLike

BytesDone = Callable[[int], None]
T = TypeVar("T")
_DAMAGE = (IntegrityError, FormatError, IncompleteCheckpointError, NotFoundError)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the manifests say.

    Attributes:
        kind: "damage" (bytes or documents are wrong or missing), "unsteady" (wrong once, right when asked again), or
            "unchecked" (could not be looked at now).
        key: the parameter, where one is hit.
        object: the file or the object it lies in.
        is_repaired: a repair has put it right, and a second check has seen so.
    """

    step: int
    save_id: str
    tier: str
    kind: str
    what: str
    key: str | None = None
    object: str | None = None
    is_repaired: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "save_id": self.save_id,
            "tier": self.tier,
            "kind": self.kind,
            "what": self.what,
            "key": self.key,
            "object": self.object,
            "is_repaired": self.is_repaired,
        }


@dataclass
class Verification:
    """What was checked and found."""

    checked: list[tuple[int, str, str]] = field(default_factory=list)
    """(step, save_id, tier)"""
    findings: list[Finding] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether damage is left."""
        return any(f.kind == "damage" and not f.is_repaired for f in self.findings)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left that somebody should look at."""
        return all(f.is_repaired for f in self.findings)


@dataclass(frozen=True)
class Depth:
    """How much to look at.

    Attributes:
        read_data: Read and decode bytes; otherwise manifests, sizes and presence.
        share: Of the chunks, chosen at random; 1.0 reads every byte.
        part: ``(i, n)``: only ranks with ``rank % n == i``.
    """

    read_data: bool = False
    share: float = 1.0
    part: tuple[int, int] = (0, 1)

    def has_rank(self, rank: int) -> bool:
        return rank % self.part[1] == self.part[0]

    def takes(self) -> bool:
        """Whether to read the next chunk."""
        return self.share >= 1.0 or random.random() < self.share  # noqa: S311


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
                result.findings += _uncommitted(tiers.local, save, LOCAL)
        for remote in tiers.remotes:
            result.findings += _lost_commits(remote)
    return result


def _uncommitted(tier: LocalTier, save: LocalSave, name: str) -> list[Finding]:
    """A save all of whose parts are here and whose manifest isn't: on one node they appear together."""
    try:
        shards = tier.shard_manifests_present(save.path)
    except _DAMAGE:
        return []  # it may be being written
    if not shards or len(shards) < shards[0].world_size:
        return []
    what = "manifest.json is missing although every rank's part is here"
    return [Finding(save.step, save.save_id, name, "damage", what, object="manifest.json")]


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
        result.findings += _uncommitted(tiers.local, record.local, LOCAL)
    elif tiers.local is not None and record.local is not None:
        _check(result, record, LOCAL, _local(tiers.local, tiers.run, record, depth), progress)
    for remote in tiers.remotes:
        if remote.name in record.remote:
            _check(result, record, remote.name, _remote(remote, record, depth), progress)


@dataclass(frozen=True)
class _Breach:
    what: str
    key: str | None = None
    object: str | None = None
    kind: str = "damage"


#: A check yields bytes read, or a breach.
_Yield = int | _Breach


def _check(
    result: Verification, record: Record, tier: str, steps: Iterator[_Yield], progress: BytesDone | None
) -> None:
    summary = record.summary

    def found(breach: _Breach) -> None:
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
    except _DAMAGE as error:
        found(_Breach(error.message, error.context.get("key")))
    except CkptError as error:
        found(_Breach(error.message, kind="unchecked"))


def _twice(read: Callable[[], T], what: str) -> tuple[T | None, _Breach | None]:
    """What ``read`` returns, asking again before an error counts as damage."""
    try:
        return read(), None
    except _DAMAGE as error:
        first = error
    try:
        return read(), _Breach(f"{first.message}; right when read again", object=what, kind="unsteady")
    except _DAMAGE as error:
        return None, _Breach(error.message, error.context.get("key"), what)


# --- the local tier


def _local(tier: LocalTier, run: str, record: Record, depth: Depth) -> Iterator[_Yield]:
    save = record.local
    if save is None:
        return
    if save.damaged:
        yield _Breach(save.damaged, object=save.path.name)
    root, breach = _twice(lambda: tier.root_manifest(run, save), "manifest.json")
    if breach is not None:
        yield breach
    if root is None:
        return
    summary = save.path / "summary.json"
    if _bytes_of(summary) != root.summary.encode():
        yield _Breach("summary.json is not what the manifest says", object="summary.json")
    shards: list[ShardManifest] = []
    for ref in root.shards:
        file = save.path / ref.file
        if not file.exists() and record.summary.num_nodes > 1:
            continue  # another node's part
        shard, breach = _twice(lambda ref=ref: tier.shard_manifest(save.path, ref), f"shard-{ref.rank:05d}.json")  # type: ignore[misc]
        if breach is not None:
            yield breach
        if shard is not None:
            shards.append(shard)
            if depth.has_rank(ref.rank):
                yield from _local_file(file, shard, depth)
    yield from _root_fits(root, shards, "manifest.json")
    if len(shards) == len(root.shards):
        yield from _stock_metadata(save.path, root, shards)


def _root_fits(root: RootManifest, shards: list[ShardManifest], name: str) -> Iterator[_Yield]:
    """The root manifest is a pure function of the shard manifests: no byte of it is free."""
    pinned = {ref.rank: ref for ref in root.shards}
    try:
        is_right = all(pinned[shard.rank] == ref_of(shard) for shard in shards)
        head = next((shard.summary for shard in shards if shard.rank == 0), None)
        if head is not None:
            is_right = is_right and root_from(head, root.shards) == root
    except IncompleteCheckpointError:
        is_right = False
    if not is_right:
        yield _Breach("the manifest is not what its shard manifests make it", object=name)


def _bytes_of(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _stock_metadata(path: Path, root: RootManifest, shards: list[ShardManifest]) -> Iterator[_Yield]:
    """The one derived file: equal to what the manifests derive, or rebuilt by a restore."""
    found = _bytes_of(path / ".metadata")
    if found is None:
        yield _Breach(".metadata is missing: stock DCP can't open this checkpoint", object=".metadata")
    elif found != stock.metadata(root, shards):
        yield _Breach(".metadata differs from what the manifests say", object=".metadata")


def _local_file(file: Path, shard: ShardManifest, depth: Depth) -> Iterator[_Yield]:
    name = file.name
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield _Breach(f"{name} is missing", object=name)
        return
    except OSError as error:
        yield _Breach(f"{name} can't be opened: {error.strerror}", object=name)
        return
    try:
        size = os.fstat(fd).st_size
        if size != shard.file_bytes:
            yield _Breach(f"{name} has {size} bytes, its manifest says {shard.file_bytes}", object=name)
            return
        if not depth.read_data:
            return
        for piece, chunks in zip(shard.pieces, chunks_of(shard), strict=True):
            for chunk in chunks:
                if not depth.takes():
                    continue
                where = f"chunk {chunk.index} of {piece.fqn}"
                breach = _read_twice(fd, chunk.offset, chunk.size_bytes, lambda data: digest(data) == chunk.digest)  # noqa: B023
                if breach is not None:
                    yield replace(breach, what=f"{name}: {where} {breach.what}", key=piece.fqn, object=name)
                yield chunk.size_bytes
        for offset, expected in stock.skeleton(shard):
            breach = _read_twice(fd, offset, len(expected), lambda data: data == expected)  # noqa: B023
            if breach is not None:
                yield replace(breach, what=f"{name}: the envelope bytes at {offset} {breach.what}", object=name)
    finally:
        os.close(fd)


def _read_twice(fd: int, offset: int, size: int, is_good: Callable[[bytes], bool]) -> _Breach | None:
    """Read, and if it is wrong read again, from the disk."""
    reason = "are damaged" if size != 1 else "is damaged"
    for attempt in range(2):
        try:
            data = os.pread(fd, size, offset)
        except OSError as error:
            reason = f"can't be read: {error.strerror}"
        else:
            if len(data) == size and is_good(data):
                return None if attempt == 0 else _Breach("was wrong once and right when read again", kind="unsteady")
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
    return _Breach(reason)


# --- remotes


def _remote(remote: RemoteTier, record: Record, depth: Depth) -> Iterator[_Yield]:
    save = record.remote[remote.name]
    root, breach = _twice(lambda: remote.root_manifest(save), save.key)
    if breach is not None:
        yield breach
    if root is None:
        return
    summary, breach = _twice(lambda: remote.summary(save), save.summary_key)
    if breach is not None:
        yield breach
    if summary is not None and summary != root.summary:
        yield _Breach("the summary is not what the manifest says", object=save.summary_key)
    if not remote.has(save.summary_key):
        yield _Breach("the summary is missing", object=save.summary_key)
    shards: list[ShardManifest] = []
    for ref in root.shards:
        if not depth.has_rank(ref.rank):
            continue
        name = f"shards/{save.save_id}/shard-{ref.rank:05d}.json"
        document, breach = _twice(lambda ref=ref: remote.remote_shard(save.save_id, ref), name)  # type: ignore[misc]
        if breach is not None:
            yield breach
        if document is None:
            continue
        shards.append(document.shard)
        frames = [placed(document, frame) for frame in document.frames]
        codecs = {part.codec for frame in frames for part in frame.chain()}
        is_ours = (document.format, document.version) == (FORMAT, FORMAT_VERSION)
        if not is_ours or document.stored_bytes != own_bytes(document) or not codecs <= set(CODECS):
            yield _Breach(f"{name} contradicts itself", object=name)
        ends: dict[str, int] = {}
        for frame in frames:
            for part in frame.chain():
                ends[part.pack] = max(ends.get(part.pack, 0), part.offset + part.length)
        gone = set()
        for pack, end in ends.items():
            info = remote.head_pack(pack)
            if info is None or info.size_bytes < end:
                gone.add(pack)
                yield _Breach(f"{pack} is {'missing' if info is None else 'too short'}", object=pack)
        if not depth.read_data:
            continue
        owners: dict[PlacedFrame, tuple[str, str | None]] = {}
        for piece, row, chunks in zip(document.shard.pieces, document.chunks, chunks_of(document.shard), strict=True):
            for index, chunk in zip(row, chunks, strict=True):
                if depth.takes():
                    owners[frames[index]] = (piece.fqn, chunk.digest)
                    for base in list(frames[index].chain())[1:]:
                        owners.setdefault(base, (piece.fqn, None))
        wanted = [frame for frame in owners if not any(part.pack in gone for part in frame.chain())]
        for request in ranges(wanted):
            yield from _frames(remote, save.save_id, request, owners)
    yield from _root_fits(root, shards, save.key)


def _frames(
    remote: RemoteTier, save_id: str, request: Range, owners: dict[PlacedFrame, tuple[str, str | None]]
) -> Iterator[_Yield]:
    bad = _bad_frames(remote, save_id, request, owners)
    still = _bad_frames(remote, save_id, request, owners) if bad else {}
    for frame in request.frames:
        fqn = owners[frame][0]
        if frame in still:
            yield _Breach(still[frame], fqn, ", ".join(dict.fromkeys(part.pack for part in frame.chain())))
        elif frame in bad:
            yield _Breach(f"{bad[frame]}; right when read again", fqn, frame.pack, kind="unsteady")
        elif owners[frame][1] is not None:
            yield frame.size_bytes


def _bad_frames(
    remote: RemoteTier, save_id: str, request: Range, owners: dict[PlacedFrame, tuple[str, str | None]]
) -> dict[PlacedFrame, str]:
    """What is wrong with which frame of one request; a new reader each time, which remembers nothing."""
    bad: dict[PlacedFrame, str] = {}
    try:
        # A request's answer is judged frame by frame, bases too: their names are in the manifests as well.
        for frame, plain in RemoteChunks([remote], save_id).read_range(remote, request):
            fqn, expected = owners[frame]
            if isinstance(plain, CkptError):
                bad[frame] = f"{frame.pack}: {plain.message}"
            elif strong_digest(plain) != frame.name or expected not in (None, digest(plain)):
                bad[frame] = f"{frame.pack} does not hold the bytes of {fqn} it should"
    except (IntegrityError, NotFoundError) as error:
        return dict.fromkeys(request.frames, error.message)
    return bad


__all__ = ["Depth", "Finding", "Verification", "check_record", "verify"]
