"""Who writes what: every box of every tensor exactly once, spread evenly over the ranks that hold it.

A plan depends on the structure alone, so it is made once and kept until some rank's structure changes
(:mod:`ckptstore.dcp.agreement` notices). Every rank computes the same plan from the same gathered list of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ckptstore.dcp.binder import Binding
from ckptstore.errors import StateError
from ckptstore.format.stock import PieceSpec

if TYPE_CHECKING:
    from ckptstore.dcp.agreement import Agreement

Shape = tuple[int, ...]


Announced = tuple[list["Claim"], dict[str, str]]
BoxKey = tuple[str, Shape, Shape]


class Claim(NamedTuple):
    """A box as its rank announces it to the others."""

    name: str
    dtype: str
    global_shape: Shape
    offsets: Shape
    shape: Shape
    size_bytes: int
    kind: str
    is_empty: bool


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Attributes:
        pieces: in the order of the shard file.
        indexes: for each piece its place in ``Binding.tensors`` (and ``locals``).
        fingerprint: of the binding this plan was made for.
        key: stands for the boxes and ties of all ranks; the same on all ranks, and where it is, so is the plan.
        replicas: for each set of ranks that hold the same boxes, this rank's indexes of them, whether or not it writes
            them; in the same order on all ranks. Sets without this rank have no indexes.
        world_bytes: plain bytes of all pieces of all ranks.
        extra: name of each tensor that rank 0 lacks -> a rank that has it.
        aliases: tied name -> the name whose memory it shares, of all ranks.
    """

    pieces: tuple[PieceSpec, ...]
    indexes: tuple[int, ...]
    fingerprint: bytes
    key: int
    replicas: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    world_bytes: int = 0
    extra: Mapping[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def plan(binding: Binding, agreement: Agreement | None = None) -> Plan:
    """Decide what this rank writes. Collective with an agreement, which supplies the group; local without.

    Raises:
        StateError: ranks disagree about a tensor, or their boxes don't make up all of it; the same on every rank.
        SaveFailedError: a peer was lost.
    """
    mine = [
        Claim(t.name, t.dtype, t.global_shape, t.offsets, t.shape, t.size_bytes, t.kind, t.is_empty)
        for t in binding.tensors
    ]
    if agreement is None or agreement.world_size == 1:
        rank, everyone = 0, [(mine, binding.aliases)]
    else:
        rank, everyone = agreement.rank, agreement.gather((mine, binding.aliases), what="planning")
    return plan_of(everyone, rank, binding)


def plan_of(everyone: Sequence[Announced], rank: int, binding: Binding) -> Plan:
    """The plan of ``rank``, a pure function of what all ranks announced."""
    _check_ties(everyone)
    holders: dict[BoxKey, list[int]] = {}
    claims: dict[BoxKey, Claim] = {}
    first: dict[str, tuple[int, Claim]] = {}
    for r, (announced, _) in enumerate(everyone):
        for claim in announced:
            _check_same_tensor(claim, r, first)
            if claim.is_empty:
                continue
            box = (claim.name, claim.offsets, claim.shape)
            holders.setdefault(box, []).append(r)
            claims[box] = claim
    _check_complete(first, claims, {name for _, aliases in everyone for name in aliases})
    writers = _assign(holders, claims, len(everyone))

    place = {(t.name, t.offsets, t.shape): i for i, t in enumerate(binding.tensors) if not t.is_empty}
    indexes = tuple(i for box, i in place.items() if writers[box] == rank)
    sets: dict[tuple[int, ...], list[int]] = {}
    for box, ranks in holders.items():
        if len(ranks) > 1:
            members = sets.setdefault(tuple(ranks), [])
            if rank in ranks:
                members.append(place[box])
    return Plan(
        pieces=tuple(_spec(binding, i) for i in indexes),
        indexes=indexes,
        fingerprint=binding.fingerprint,
        key=_key(everyone),
        replicas=tuple((ranks, tuple(members)) for ranks, members in sorted(sets.items())),
        world_bytes=sum(claim.size_bytes for claim in claims.values()),
        extra=_extra(everyone),
        aliases={name: target for _, aliases in everyone for name, target in aliases.items()},
    )


def _extra(everyone: Sequence[Announced]) -> dict[str, int]:
    first = {claim.name for claim in everyone[0][0]} | everyone[0][1].keys()
    extra: dict[str, int] = {}
    for rank, (announced, aliases) in enumerate(everyone):
        own = {claim.name for claim in announced if claim.kind == "per_rank"}
        names = [claim.name for claim in announced] + [name for name, target in aliases.items() if target not in own]
        for name in names:
            if name not in first and name not in own:
                extra.setdefault(name, rank)
    return extra


def _key(everyone: Sequence[Announced]) -> int:
    return xxhash.xxh3_64_intdigest(repr(everyone).encode()) >> 2  # room for a sign


def _spec(binding: Binding, index: int) -> PieceSpec:
    t = binding.tensors[index]
    return PieceSpec(t.name, t.dtype, t.global_shape, t.offsets, t.shape, t.requires_grad)


def _assign(holders: dict[BoxKey, list[int]], claims: dict[BoxKey, Claim], world_size: int) -> dict[BoxKey, int]:
    """Box -> its writer: the only holder; the lowest for buffers; else the least loaded, big boxes first."""
    load = [0] * world_size
    writers: dict[BoxKey, int] = {}
    shared = []
    for box, ranks in holders.items():
        if len(ranks) == 1 or claims[box].kind == "buffer":
            writers[box] = ranks[0]
            load[ranks[0]] += claims[box].size_bytes
        else:
            shared.append(box)
    shared.sort(key=lambda box: (-claims[box].size_bytes, box))
    for box in shared:
        writer = min(holders[box], key=lambda r: (load[r], r))
        writers[box] = writer
        load[writer] += claims[box].size_bytes
    return writers


def _check_same_tensor(claim: Claim, rank: int, first: dict[str, tuple[int, Claim]]) -> None:
    other_rank, other = first.setdefault(claim.name, (rank, claim))
    if (claim.dtype, claim.global_shape) != (other.dtype, other.global_shape):
        raise StateError(
            f"{claim.name!r} is {other.dtype} {list(other.global_shape)} on rank {other_rank} "
            f"but {claim.dtype} {list(claim.global_shape)} on rank {rank}",
            hint="wrap a value that differs by rank in per_rank(...)",
            key=claim.name,
            ranks=[other_rank, rank],
        )


def _check_complete(first: dict[str, tuple[int, Claim]], claims: dict[BoxKey, Claim], tied: set[str]) -> None:
    stored: dict[str, int] = {}
    for name, _, shape in claims:
        stored[name] = stored.get(name, 0) + prod(shape)
    for name, (_, claim) in first.items():
        if name not in tied and stored.get(name, 0) != prod(claim.global_shape):
            raise StateError(
                f"the ranks together hold {stored.get(name, 0)} elements of {name!r}, "
                f"which has {prod(claim.global_shape)}",
                hint="every part of a sharded tensor must be in some rank's state, and no two may overlap",
                key=name,
            )


def _check_ties(everyone: Sequence[Announced]) -> None:
    tied = {name: (r, target) for r, (_, aliases) in enumerate(everyone) for name, target in aliases.items()}
    if not tied:
        return
    for r, (announced, aliases) in enumerate(everyone):
        alone = {claim.name for claim in announced if not claim.is_empty}
        for name, (other, target) in tied.items():
            if aliases.get(name, target) != target or (name in alone and name not in aliases):
                raise StateError(
                    f"{name!r} shares memory with {target!r} on rank {other} but not on rank {r}",
                    hint="tie them on every rank or on none",
                    key=name,
                    ranks=[other, r],
                )
