"""Binding: from the objects a trainer passes to the named boxes of memory behind them.

A :class:`Binder` walks the state anew at every save and re-reads every tensor, so swapped storages, replaced
parameters and re-created moments are seen. What it keeps between saves holds no tensor: descriptions of tensors that
look as they did last time, and encoded subtrees whose names didn't change. That makes a steady save cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

from ckptstore.dcp import composites
from ckptstore.dcp.boxes import Box, Shape, box_of, check_memory, dtype_name
from ckptstore.dcp.views import overlapping, still_holds
from ckptstore.dcp.walk import Fragments, Kind, Walk
from ckptstore.errors import StateError
from ckptstore.format.manifest import Json
from ckptstore.format.tree import View, with_views

#: Of how many structures descriptions are kept.
STRUCTURES_KEPT = 4


class BoundTensor:
    """One rank's box of one named tensor; holds no memory (that is ``Binding.locals`` at the same index).

    Attributes:
        name: stored name.
        global_shape, offsets, shape: the box, in elements.
        dtype: torch's name without ``torch.``.
        itemsize: bytes per element.
        is_empty: this rank holds no element of it though others do.
        replicated: this box is the whole tensor, so every rank that has it should hold the same values.
        kind: where it comes from; buffers are rank 0's, "per_rank" is nobody else's.
    """

    __slots__ = (
        "dtype", "global_shape", "is_empty", "itemsize", "kind", "local_shape", "name", "offsets", "replicated",
        "requires_grad", "shape", "spec", "torch_dtype",
    )  # fmt: skip

    def __init__(self, name: str, tensor: torch.Tensor, kind: Kind, box: Box) -> None:
        self.name = name
        self.kind = kind
        self.global_shape: Shape = box.global_shape
        self.offsets: Shape = box.offsets
        self.shape: Shape = box.shape
        self.local_shape = box.local.shape
        self.torch_dtype = box.local.dtype
        self.dtype = dtype_name(box.local.dtype)
        self.itemsize = box.local.element_size()
        self.spec: Any = tensor._spec if isinstance(tensor, DTensor) else None
        self.requires_grad = (box.local if self.spec is None else tensor).requires_grad
        if 0 in self.global_shape:  # nothing to store but its shape, which any rank can
            self.offsets, self.shape = (0,) * len(self.global_shape), self.global_shape
        self.is_empty = box.local.numel() == 0 and 0 not in self.global_shape
        self.replicated = kind != "per_rank" and self.shape == self.global_shape

    @property
    def size_bytes(self) -> int:
        """Plain bytes of this box."""
        count = self.itemsize
        for extent in self.shape:
            count *= extent
        return count

    @property
    def structure(self) -> tuple[object, ...]:
        """Everything that must stay the same for a plan to stay valid."""
        return (
            self.name, self.dtype, self.global_shape, self.offsets, self.shape, self.requires_grad, self.kind,
            self.is_empty,
        )  # fmt: skip

    def __repr__(self) -> str:
        box = f"{self.shape} at {self.offsets} of {self.global_shape}"
        return f"BoundTensor({self.name!r}, {self.dtype}, {box}, {self.kind})"


@dataclass(frozen=True, eq=False)
class Binding:
    """A state at one moment: names, boxes, and the live memory behind them.

    Attributes:
        tensors: one entry for each distinct piece of memory, in a stable order.
        locals: the live local tensors, same indices; valid until training changes them.
        tree: encoded state, tensors by name, to be stored by rank 0.
        fragments: the nodes of ``tree`` that are nothing but names of tensors, by their place.
        per_rank: the values marked ``per_rank`` as one encoded tree by key; None if there are none.
        aliases: tied name -> the name whose memory it shares.
        fingerprint: changes when and only when the structure does; other ranks' differ where their boxes do.
        slow_path: why some module had to be asked for its state dict; None when all was read directly.
    """

    tensors: tuple[BoundTensor, ...]
    locals: list[torch.Tensor]
    tree: Json
    fragments: Mapping[str, Json]
    per_rank: Json | None
    aliases: dict[str, str]
    fingerprint: bytes
    slow_path: str | None

    def outline(self) -> Any:
        """``tree`` without its fragments: the values that should agree between ranks."""
        fragments = frozenset(map(id, self.fragments.values()))
        return {name: _without(self.tree[name], fragments) for name in ("version", "tree")}


def _without(node: Any, fragments: frozenset[int]) -> Any:
    if id(node) in fragments:
        return None
    if type(node) is dict:
        return {key: _without(value, fragments) for key, value in node.items()}
    if type(node) is list:
        return [_without(value, fragments) for value in node]
    return node


def bind(state: Mapping[str, Any], *, rank: int = 0) -> Binding:
    """Bind once, without anything kept for the next time."""
    return Binder(rank=rank).bind(state)


class Binder:
    """Binds the same state, or a few in turn, again and again. One per store; not thread-safe."""

    def __init__(self, *, rank: int = 0) -> None:
        self.rank = rank
        self._known: list[_Known] = []  # the last used last
        self._fragments: Fragments = {}
        self._all_plain = False

    def bind(self, state: Mapping[str, Any]) -> Binding:
        """What ``state`` holds now. Local; runs no hook and no step and changes nothing.

        Raises:
            StateError: something in it can't be stored; names the key.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"the state must be a mapping of names to objects, not {type(state).__name__}", key="")
        try:
            walk, encoded, own, known, locals_ = self._walk(state, all_plain=self._all_plain)
        except _NotPlainError:
            walk, encoded, own, known, locals_ = self._walk(state, all_plain=False)
        self._all_plain = not walk.has_composites
        return Binding(
            tensors=known.kept,
            locals=locals_,
            tree=with_views(encoded, {known.kept[i].name: view for i, view in known.views.items()}),
            fragments=walk.fragments,
            per_rank=own,
            aliases=known.aliases,
            fingerprint=known.fingerprint,
            slow_path=walk.slow_path,
        )

    def _walk(
        self, state: Mapping[str, Any], *, all_plain: bool
    ) -> tuple[Walk, Json, Json | None, _Known, list[torch.Tensor]]:
        """One pass. Where nothing was composite last time, only tensors that changed are looked at again."""
        walk = Walk(self.rank, state, self._fragments, all_plain=all_plain)
        encoded, own = walk.encode(), walk.encode_own()
        known = self._known_by(walk.names)
        locals_ = known.describe(walk, all_plain=all_plain)
        others = [each for each in self._known if each is not known]
        self._known = [*others[1 - STRUCTURES_KEPT :], known]
        if known.fragments != walk.fragments.keys():
            known.fragments = frozenset(walk.fragments)
            used = frozenset[str]().union(*(each.fragments for each in self._known))
            self._fragments = {key: kept for key, kept in self._fragments.items() if key in used}
        return walk, encoded, own, known, locals_

    def _known_by(self, names: list[str]) -> _Known:
        """What is kept of a state with these names, or what a new one begins with: much of it may be the last one's."""
        for known in reversed(self._known):
            if known.names == names:
                return known
        return _Known(self._known[-1].described if self._known else ())


class _Known:
    """What is kept of one structure between saves; no tensor.

    Attributes:
        names, kinds: of all its tensors, in the order of the walk.
        described: all its tensors.
        fragments: keys of those it has.
        kept: those that aren't tied to an earlier one.
        aliases, fingerprint: see :class:`Binding`.
        views: by index in ``kept``.
    """

    def __init__(self, described: tuple[BoundTensor, ...]) -> None:
        self.names: list[str] = []
        self.kinds: list[Kind] = []
        self.described = described
        self.fragments: frozenset[str] = frozenset()
        self.kept: tuple[BoundTensor, ...] = ()
        self.aliases: dict[str, str] = {}
        self.fingerprint = b""
        self.views: dict[int, View] = {}
        self._memory = _Memory()
        self._ties = _Ties()
        self._indexes: list[int] | None = None

    def describe(self, walk: Walk, *, all_plain: bool) -> list[torch.Tensor]:
        """Bring everything up to date; returns the local tensors of those in ``kept``."""
        locals_, same = self._describe(walk, all_plain=all_plain)
        apart = self._memory.note(self.names, locals_) and same
        same = self._find_ties(locals_, same)
        if not same:
            self.fingerprint = _fingerprint(self.kept, self.aliases)
        if self._indexes is not None:
            locals_ = [locals_[i] for i in self._indexes]
        if not (same and apart and still_holds(self.views, locals_)):
            self.views = overlapping(self.kept, locals_)
        return locals_

    def _describe(self, walk: Walk, *, all_plain: bool) -> tuple[list[torch.Tensor], bool]:
        """The local tensors, and whether every one looks as it did at the last save."""
        if walk.names == self.names and walk.kinds == self.kinds:
            found = list(map(_unchanged, walk.tensors, self.described))
            unchanged = [local for local in found if local is not None]
            if len(unchanged) == len(found):
                return unchanged, True
        described, names, kinds = self.described, walk.names, walk.kinds
        fresh: list[BoundTensor] = []
        locals_: list[torch.Tensor] = []
        for i, tensor in enumerate(walk.tensors):
            old = described[i] if i < len(described) else None
            if old is not None and old.name == names[i] and old.kind == kinds[i]:
                local = _unchanged(tensor, old)
                if local is not None:
                    fresh.append(old)
                    locals_.append(local)
                    continue
            if all_plain and composites.is_composite(tensor):
                raise _NotPlainError
            box = box_of(names[i], tensor)
            fresh.append(BoundTensor(names[i], tensor, kinds[i], box))
            locals_.append(box.local)
        self.names, self.kinds, self.described = names, kinds, tuple(fresh)
        return locals_, False

    def _find_ties(self, locals_: list[torch.Tensor], same: bool) -> bool:
        """Which names share memory; updates what is kept. Returns whether that, too, is as last time."""
        first: dict[int, int] = {}
        pattern = [first.setdefault(address, i) for i, address in enumerate(self._memory.addresses)]
        if same and self._ties.still_hold(pattern, locals_):
            return True
        described = self.described
        self._ties = _Ties.of(pattern, locals_, described)
        tied = self._ties.tied
        self.aliases = {described[i].name: described[j].name for i, j in tied.items()}
        self._indexes = [i for i in range(len(described)) if i not in tied] if tied else None
        self.kept = tuple(described[i] for i in self._indexes) if self._indexes is not None else described
        return False


class _NotPlainError(Exception):
    """A tensor that has to be taken apart, where all were plain last time."""


_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_STRIDED = torch.strided


def _unchanged(tensor: torch.Tensor, old: BoundTensor) -> torch.Tensor | None:
    """The local memory if all that a :class:`BoundTensor` says of the tensor would come out the same, else None."""
    local, spec = tensor, old.spec
    if spec is not None:
        if type(tensor) is not DTensor or tensor._spec is not spec:
            return None
        local = tensor._local_tensor
    if (
        type(local) in _PLAIN
        and local.dtype is old.torch_dtype
        and local.layout is _STRIDED
        and not local.is_nested
        and local.shape == old.local_shape
        and tensor.requires_grad == old.requires_grad
        and not local.is_meta
    ):
        return local
    return None


class _Memory:
    """Where tensors lay when they were last seen.

    Attributes:
        addresses: of their first elements; something of their own for those that have none.
    """

    def __init__(self) -> None:
        self.addresses: list[int] = []
        self._storages: list[int] = []

    def note(self, names: list[str], locals_: list[torch.Tensor]) -> bool:
        """See where they lie now. Returns whether none has come into a storage that holds another of them.

        Raises:
            StateError: the memory of one was given back.
        """
        addresses = [local.data_ptr() or -id(local) for local in locals_]
        if addresses == self.addresses:
            return True
        is_known = len(addresses) == len(self.addresses)
        moved = [i for i in range(len(addresses)) if not is_known or addresses[i] != self.addresses[i]]
        for i in moved:
            check_memory(names[i], locals_[i])
        storages = self._storages if is_known else [0] * len(addresses)
        for i in moved:
            storages[i] = 0
        taken, new = set(storages), [locals_[i].untyped_storage().data_ptr() or -i for i in moved]
        for i, storage in zip(moved, new, strict=True):
            storages[i] = storage
        self.addresses, self._storages = addresses, storages
        return taken.isdisjoint(new) and len(set(new)) == len(new)


class _Ties:
    """Which tensors start at the same address, and which of those are the same memory seen the same way."""

    def __init__(self) -> None:
        self.tied: dict[int, int] = {}
        self._pattern: list[int] = []
        self._views: list[tuple[int, tuple[object, ...]]] = []

    @classmethod
    def of(cls, pattern: list[int], locals_: list[torch.Tensor], described: tuple[BoundTensor, ...]) -> _Ties:
        ties = cls()
        ties._pattern = pattern
        groups: dict[int, list[int]] = {}
        for i, j in enumerate(pattern):
            if i != j:
                groups.setdefault(j, [j]).append(i)
        for members in groups.values():
            seen: dict[tuple[object, ...], int] = {}
            for i in members:
                view = _view(locals_[i])
                ties._views.append((i, view))
                d = described[i]
                whole = (*view, d.global_shape, d.offsets, d.shape, d.dtype, d.kind == "per_rank")
                canonical = seen.setdefault(whole, i)
                if canonical != i:
                    ties.tied[i] = canonical
        return ties

    def still_hold(self, pattern: list[int], locals_: list[torch.Tensor]) -> bool:
        return pattern == self._pattern and all(_view(locals_[i]) == view for i, view in self._views)


def _view(local: torch.Tensor) -> tuple[object, ...]:
    return local.device, tuple(local.shape), local.stride(), local.is_conj(), local.is_neg()


def _fingerprint(tensors: tuple[BoundTensor, ...], aliases: dict[str, str]) -> bytes:
    structure = [t.structure for t in tensors]
    return xxhash.xxh3_128_digest(repr((structure, sorted(aliases.items()))).encode())
