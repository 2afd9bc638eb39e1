"""Finding "replicas" that aren't: values that every rank should hold alike, compared by digest.

Small ones and the plain values of the state are compared at every save, large ones in rotation (a slice of one per
save), all of everything with ``check_replicas="full"``. Module buffers are left out: they are rank 0's by definition
(BatchNorm statistics differ between DDP ranks).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import xxhash

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.binder import Binding
from ckptstore.dcp.boxes import copyable
from ckptstore.dcp.planner import Plan
from ckptstore.errors import StateError
from ckptstore.format import tree
from ckptstore.format.manifest import canonical

Mode = Literal["off", "sample", "full"]

#: Replicas up to this size are compared at every save, as long as together they stay below the second number.
SMALL_BYTES = 64 * 1024
_SMALL_TOTAL_BYTES = 32 << 20
#: How much of one large replica a save looks at.
_SLICE_BYTES = 16 << 20


def digests(binding: Binding, plan: Plan, rank: int, *, mode: Mode, counter: int) -> list[int | None]:
    """One number for the plain values and one per set of replica holders; equal where the values looked at are.

    Args:
        counter: number of the save, the same on all ranks; it drives the rotation.

    Returns:
        Values for ``Agreement.agree(sets=...)``: None for sets this rank has no part in.
    """
    if mode == "off":
        return [None] * (1 + len(plan.replicas))
    values: list[int | None] = [_int(xxhash.xxh3_64_intdigest(canonical(binding.outline())))]
    for ranks, indexes in plan.replicas:
        values.append(_digest_of(binding, _looked_at(binding, indexes, mode, counter)) if rank in ranks else None)
    return values


def explain(
    binding: Binding, plan: Plan, agreement: Agreement, unequal: Sequence[int], *, mode: Mode, counter: int
) -> None:
    """Some digests differ: find the key and raise the same error everywhere. Collective.

    Raises:
        StateError: names the key and the ranks.
    """
    mine: dict[str, int] = {}
    if 0 in unequal:
        mine.update(_plain_values(binding))
    for i, (ranks, indexes) in enumerate(plan.replicas, start=1):
        if i in unequal and agreement.rank in ranks:
            for index, start, count in _looked_at(binding, indexes, mode, counter):
                mine[binding.tensors[index].name] = _digest_of(binding, [(index, start, count)])
    everyone = agreement.gather(mine, what="comparing replicas")
    for key in sorted({key for each in everyone for key in each}):
        by_value: dict[int | None, list[int]] = {}
        for rank, each in enumerate(everyone):
            by_value.setdefault(each.get(key), []).append(rank)
        tensor_holders = {value: ranks for value, ranks in by_value.items() if value is not None}
        if len(tensor_holders) > 1 or (key in everyone[0] and None in by_value and 0 in unequal):
            groups = sorted(by_value.values(), key=lambda ranks: (-len(ranks), ranks))
            odd = sorted(rank for group in groups[1:] for rank in group)
            raise StateError(
                f"{key!r} should be the same on all ranks but differs between rank {groups[0][0]} and "
                f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}",
                hint="synchronise it, or keep each rank's own with per_rank(...)",
                key=key,
                ranks=odd,
            )
    raise StateError("the state differs between ranks", hint="keep each rank's own values with per_rank(...)", key="")


def _looked_at(binding: Binding, indexes: Sequence[int], mode: Mode, counter: int) -> list[tuple[int, int, int | None]]:
    """(index, first element, number of elements or None for all) of what this save compares."""
    small: list[tuple[int, int, int | None]] = []
    large: list[int] = []
    budget = _SMALL_TOTAL_BYTES
    for index in indexes:
        bound = binding.tensors[index]
        if bound.kind == "buffer":
            continue
        size = bound.size_bytes
        if mode == "full" or (size <= SMALL_BYTES and size <= budget):
            small.append((index, 0, None))
            budget -= size
        else:
            large.append(index)
    if large:
        turn, which = divmod(counter, len(large))
        bound = binding.tensors[large[which]]
        elements = max(1, _SLICE_BYTES // bound.itemsize)
        slices = -(-bound.size_bytes // (elements * bound.itemsize))
        small.append((large[which], (turn % slices) * elements, elements))
    return small


def _digest_of(binding: Binding, looked_at: Iterable[tuple[int, int, int | None]]) -> int:
    state = xxhash.xxh3_64()
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    with torch.no_grad():
        for index, start, count in looked_at:
            flat = copyable(binding.locals[index].detach()).reshape(-1)
            if count is not None:
                flat = flat[start : start + count]
            if flat.nbytes > SMALL_BYTES:
                _update(state, flat)
            else:
                by_dtype.setdefault(flat.dtype, []).append(flat)
        for parts in by_dtype.values():
            _update(state, torch.cat([part.cpu() for part in parts]))
    return _int(state.intdigest())


def _update(state: xxhash.xxh3_64, flat: torch.Tensor) -> None:
    flat = flat.cpu().resolve_conj().resolve_neg().contiguous()
    if flat.nbytes:
        state.update(memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())))


def _int(digest: int) -> int:
    return digest >> 2  # room for a sign and the mark of absence


def _plain_values(binding: Binding) -> dict[str, int]:
    """Digest of each value that isn't a tensor, by dotted key."""
    outline = {**binding.tree, "tree": binding.outline()["tree"]}
    found: dict[str, int] = {}

    def visit(path: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                visit(f"{path}.{key}" if path else str(key), below)
        elif isinstance(value, (list, tuple)) and value:
            for index, below in enumerate(value):
                visit(f"{path}.{index}", below)
        else:
            node = tree.encode(value, lambda _, leaf: leaf)
            found[path] = _int(xxhash.xxh3_64_intdigest(canonical(node)))

    visit("", tree.decode(outline, lambda ref: repr(ref), trusted="loaded", unknown="opaque"))
    return found
