"""What a check finds, and how one asks twice: the words that `verify` and its checks of each kind of tier share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ckptstore.errors import FormatError, IncompleteCheckpointError, IntegrityError, NotFoundError
from ckptstore.format.manifest import RootManifest, ShardManifest, ref_of, root_from

T = TypeVar("T")
#: Errors that say that something is wrong with what is stored, not with the way there.
DAMAGE = (IntegrityError, FormatError, IncompleteCheckpointError, NotFoundError)


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


@dataclass(frozen=True)
class Breach:
    what: str
    key: str | None = None
    object: str | None = None
    kind: str = "damage"


#: A check yields bytes read, or a breach.
Step = int | Breach


def twice(read: Callable[[], T], what: str) -> tuple[T | None, Breach | None]:
    """What ``read`` returns, asking again before an error counts as damage."""
    try:
        return read(), None
    except DAMAGE as error:
        first = error
    try:
        return read(), Breach(f"{first.message}; right when read again", object=what, kind="unsteady")
    except DAMAGE as error:
        return None, Breach(error.message, error.context.get("key"), what)


def root_fits(root: RootManifest, shards: list[ShardManifest], name: str) -> Iterator[Step]:
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
        yield Breach("the manifest is not what its shard manifests make it", object=name)


def bytes_of(file: Path) -> bytes | None:
    """What the file holds; None if it can't be read."""
    try:
        return file.read_bytes()
    except OSError:
        return None
