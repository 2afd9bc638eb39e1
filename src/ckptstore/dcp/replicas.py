"""Finding "replicas" that aren't: values that every rank should hold alike, compared by digest.

Small ones and the plain values of the state are compared at every save, large ones in rotation (a slice of one per
save), all of everything with ``check_replicas="full"``. Module buffers are left out: they are rank 0's by definition
(BatchNorm statistics differ between DDP ranks).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass
class _Set:
    """Replicas that the same ranks hold, as places in a binding; empty on ranks outside the set."""

    is_mine: bool
    small: dict[torch.dtype, list[int]] = field(default_factory=dict)
    large: list[int] = field(default_factory=list)


class ReplicaCheck:
    """Compares what a plan says is replicated. One per plan.

    Args:
        binding: any binding of the plan's structure.
    """

    def __init__(self, binding: Binding, plan: Plan, rank: int, mode: Mode) -> None:
        self._mode = mode
        self._sets: list[_Set] = []
        for ranks, indexes in plan.replicas:
            each = _Set(rank in ranks)
            budget = _SMALL_TOTAL_BYTES
            for index in indexes:
                bound = binding.tensors[index]
                if bound.kind == "buffer":
                    continue
                if bound.size_bytes <= SMALL_BYTES and bound.size_bytes <= budget:
                    budget -= bound.size_bytes
                    each.small.setdefault(bound.torch_dtype, []).append(index)
                else:
                    each.large.append(index)
            self._sets.append(each)

    def __len__(self) -> int:
        return 1 + len(self._sets)

    def digests(self, binding: Binding, turn: int) -> list[int | None]:
        """One number for the plain values and one per set; equal on all ranks where what was looked at is.

        Args:
            turn: how many saves of this plan came before, the same on all ranks; it drives the rotation. The number of
                the save would not do: at every second save, every second tensor might never be looked at.

        Returns:
            Values for ``Agreement.agree(sets=...)``: None for sets this rank has no part in.
        """
        if self._mode == "off":
            return [None] * len(self)
        values: list[int | None] = [_int(xxhash.xxh3_64_intdigest(canonical(binding.outline())))]
        with torch.no_grad():
            for each in self._sets:
                if not each.is_mine:
                    values.append(None)
                    continue
                state = xxhash.xxh3_64()
                for indexes in each.small.values():
                    _update(state, _joined([binding.locals[i] for i in indexes]))
                for index, start, count in self._large(binding, each, turn):
                    _update(state, _slice(binding.locals[index], start, count))
                values.append(_int(state.intdigest()))
        return values

    def explain(self, binding: Binding, agreement: Agreement, unequal: Sequence[int], turn: int) -> None:
        """Some digests differ: find the key and raise the same error everywhere. Collective.

        Args:
            unequal: places of the differing values in what :meth:`digests` returned.

        Raises:
            StateError: names the key and the ranks.
        """
        mine: dict[str, int] = _plain_values(binding) if 0 in unequal else {}
        with torch.no_grad():
            for each in (self._sets[i - 1] for i in unequal if i):
                looked_at = [(i, 0, None) for indexes in each.small.values() for i in indexes]
                for index, start, count in [*looked_at, *self._large(binding, each, turn)]:
                    state = xxhash.xxh3_64()
                    _update(state, _slice(binding.locals[index], start, count))
                    mine[binding.tensors[index].name] = _int(state.intdigest())
        everyone = agreement.gather((frozenset(_plain_values(binding)), mine), what="comparing replicas")
        for key in sorted({key for _, values in everyone for key in values}):
            plain = any(key in names for names, _ in everyone)
            by_value: dict[int | None, list[int]] = {}
            for rank, (_, values) in enumerate(everyone):
                if plain or key in values:
                    by_value.setdefault(values.get(key), []).append(rank)
            if len(by_value) > 1:
                _raise(key, list(by_value.values()))
        raise StateError("the state differs between ranks", hint="keep each rank's own with per_rank(...)", key="")

    def _large(self, binding: Binding, each: _Set, turn: int) -> list[tuple[int, int, int | None]]:
        """(index, first element, number of elements or None for all) of the large ones this save looks at."""
        if self._mode == "full" or not each.large:
            return [(index, 0, None) for index in each.large]
        lap, which = divmod(turn, len(each.large))
        bound = binding.tensors[each.large[which]]
        elements = max(1, _SLICE_BYTES // bound.itemsize)
        slices = -(-bound.size_bytes // (elements * bound.itemsize))
        return [(each.large[which], (lap % slices) * elements, elements)]


def _raise(key: str, groups: list[list[int]]) -> None:
    groups.sort(key=lambda ranks: (-len(ranks), ranks))
    odd = sorted(rank for group in groups[1:] for rank in group)
    raise StateError(
        f"{key!r} should be the same on all ranks but differs between rank {groups[0][0]} and "
        f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))}",
        hint="synchronise it, or keep each rank's own with per_rank(...)",
        key=key,
        ranks=odd,
    )


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """All their elements in one CPU tensor; per tensor much cheaper than hashing each."""
    if tensors[0].is_complex():
        tensors = [tensor.resolve_conj() for tensor in tensors]
    if any(tensor.is_neg() for tensor in tensors):
        tensors = [tensor.resolve_neg() for tensor in tensors]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(copyable(tensor))
    flats: list[torch.Tensor] = [torch._C._nn.flatten_dense_tensors(group).cpu() for group in by_device.values()]
    return flats[0] if len(flats) == 1 else torch.cat(flats)


def _slice(tensor: torch.Tensor, start: int, count: int | None) -> torch.Tensor:
    flat = copyable(tensor.detach()).reshape(-1)
    return flat if count is None else flat[start : start + count]


def _update(state: xxhash.xxh3_64, flat: torch.Tensor) -> None:
    flat = flat.cpu().resolve_conj().resolve_neg().contiguous()
    if flat.nbytes:
        state.update(memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())))


def _int(digest: int) -> int:
    return digest >> 2  # room for a sign and the mark of absence


def _plain_values(binding: Binding) -> dict[str, int]:
    """Digest of each value that isn't a tensor, and of each container's type, by dotted key."""
    outline = {**binding.tree, "tree": binding.outline()["tree"]}
    found: dict[str, int] = {}

    def visit(path: str, value: object) -> None:
        if isinstance(value, (dict, list, tuple)) and value:
            found[path] = _int(xxhash.xxh3_64_intdigest(type(value).__qualname__.encode()))
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
