"""`diff`: what changed between two checkpoints, per parameter.

Where both were cut into the same boxes and chunks, digests decide and no tensor byte is read. Otherwise, and for the
size of a change, the tensors themselves are read, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptstore.errors import CheckpointNotFoundError
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Piece, TensorMeta
from ckptstore.ops.open import RunTiers
from ckptstore.repo.reader import CheckpointReader
from ckptstore.types import CheckpointInfo, json_number

_FLOATS = {"float64": "f8", "float32": "f4", "float16": "f2"}
_INTEGERS = {"int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1", "uint8": "u1", "bool": "u1"}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Change:
    """One tensor in two checkpoints.

    Attributes:
        state: "unchanged", "changed", "added", "removed", or "retyped" (other dtype or shape).
        size_bytes: in B, or in A where it was removed.
        changed_bytes: of the chunks that differ; all of it where boxes can't be matched.
        norm: L2 norm of B - A; None when not asked for or not a number type.
        relative: that norm over the norm of A.
    """

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    changed_bytes: int
    norm: float | None = None
    relative: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "size_bytes": self.size_bytes,
            "changed_bytes": self.changed_bytes,
            "norm": None if self.norm is None else json_number(self.norm),
            "relative": None if self.relative is None else json_number(self.relative),
        }


@dataclass(frozen=True)
class Difference:
    """Two checkpoints side by side; ``changes`` in the order of B's state, then what was removed."""

    a: CheckpointInfo
    b: CheckpointInfo
    changes: tuple[Change, ...]

    @property
    def first(self) -> Change | None:
        """The first tensor, in the order of the state, that differs."""
        return next((change for change in self.changes if change.state != "unchanged"), None)

    def count(self, state: str) -> int:
        return sum(change.state == state for change in self.changes)


@dataclass(frozen=True)
class Parting:
    """Where two runs part: the first step both have at which a tensor differs, and the first tensor that does.

    Attributes:
        last_equal_step: The common step before, at which all is equal; None: they differ from the first one on.
        num_compared: How many common steps were looked at.
        step, change: None when all common steps are equal.
    """

    last_equal_step: int | None
    num_compared: int
    step: int | None = None
    change: Change | None = None


def parting(a: RunTiers, b: RunTiers) -> Parting:
    """Where two runs part. Compares digests, oldest step first; reads the one tensor that differs first, for its norm.

    Raises:
        CheckpointNotFoundError: they have no step in common.
        IntegrityError: bytes had to be read and no good copy is left.
    """
    first, second = ({record.step: record for record in tiers.catalog().line()} for tiers in (a, b))
    steps = sorted(first.keys() & second.keys())
    if not steps:
        raise CheckpointNotFoundError(
            f"runs {a.run} and {b.run} have no step in common", hint="`ckptctl diff RUN/STEP RUN/STEP` compares any two"
        )
    equal: int | None = None
    for number, step in enumerate(steps, 1):
        old = CheckpointReader(first[step], a.local, a.remotes)
        new = CheckpointReader(second[step], b.local, b.remotes)
        with old, new:
            change = next((change for change in compare(old, new) if change.state != "unchanged"), None)
            if change is not None and change.state == "changed":
                change = _one(old, new, change.name, new.tensors[change.name], change.size_bytes, norms=True)
        if change is not None:
            return Parting(equal, number, step, change)
        equal = step
    return Parting(equal, len(steps))


def compare(a: CheckpointReader, b: CheckpointReader, *, norms: bool = False) -> Iterator[Change]:
    """Every tensor of either; reads bytes only where it must.

    Args:
        a: The older one.
        b: The newer one.
        norms: Also read what changed, to tell by how much.

    Raises:
        IntegrityError: bytes had to be read and no good copy is left.
    """
    for name, meta in b.tensors.items():
        size = _size(b, name)
        old = a.tensors.get(name)
        if old is None:
            yield Change(name, "added", meta.dtype, meta.shape, size, size)
        elif (old.dtype, old.shape) != (meta.dtype, meta.shape):
            yield Change(name, "retyped", meta.dtype, meta.shape, size, size)
        else:
            yield _one(a, b, name, meta, size, norms)
    for name, meta in a.tensors.items():
        if name not in b.tensors:
            yield Change(name, "removed", meta.dtype, meta.shape, _size(a, name), 0)


def _one(a: CheckpointReader, b: CheckpointReader, name: str, meta: TensorMeta, size: int, norms: bool) -> Change:
    changed = _changed_bytes(a, b, name, itemsize(meta.dtype))
    if changed == 0:
        return Change(name, "unchanged", meta.dtype, meta.shape, size, 0)
    if changed is None or norms:
        old, new = _read(a, name, meta), _read(b, name, meta)
        if changed is None and np.array_equal(old, new):
            return Change(name, "unchanged", meta.dtype, meta.shape, size, 0)
        if norms:
            norm, base = _norms(old, new, meta.dtype)
            relative = None if norm is None or base is None else (norm / base if base else math.inf)
            changed = size if changed is None else changed
            return Change(name, "changed", meta.dtype, meta.shape, size, changed, norm, relative)
    return Change(name, "changed", meta.dtype, meta.shape, size, size if changed is None else changed)


def _boxes(reader: CheckpointReader, name: str) -> dict[tuple[object, ...], tuple[int, Piece]]:
    return {
        (piece.offsets, piece.shape): (reader.shards[rank].chunk_elements, piece)
        for rank, _, piece in reader.pieces(name)
    }


def _changed_bytes(a: CheckpointReader, b: CheckpointReader, name: str, width: int) -> int | None:
    """Bytes of the chunks whose digests differ; None when the two were cut differently."""
    old, new = _boxes(a, name), _boxes(b, name)
    if old.keys() != new.keys():
        return None
    changed = 0
    for key, (elements, piece) in new.items():
        if old[key][0] != elements:
            return None
        step = elements * width
        for number, (before, after) in enumerate(zip(old[key][1].digests, piece.digests, strict=True)):
            if before != after:
                changed += min(step, piece.size_bytes - number * step)
    return changed


def _read(reader: CheckpointReader, name: str, meta: TensorMeta) -> npt.NDArray[np.uint8]:
    """The whole tensor as bytes: its shape, and one more axis for the bytes of an element."""
    width = itemsize(meta.dtype)
    whole = np.zeros((*meta.shape, width), np.uint8)
    for rank, number, piece in reader.pieces(name):
        data = np.empty(piece.size_bytes, np.uint8)
        at = 0
        for index, chunk in enumerate(reader.chunks(rank, number)):
            reader.read_chunk(rank, number, index, memoryview(data.data)[at : at + chunk.size_bytes])
            at += chunk.size_bytes
        box = tuple(slice(offset, offset + length) for offset, length in zip(piece.offsets, piece.shape, strict=True))
        whole[box] = data.reshape((*piece.shape, width))
    return whole.reshape(-1)


def _norms(old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8], dtype: str) -> tuple[float | None, float | None]:
    """L2 norms of the difference and of the old values, block by block."""
    width = itemsize(dtype)
    total = base = 0.0
    for at in range(0, len(old), _BLOCK * width):
        first = _numbers(old[at : at + _BLOCK * width], dtype)
        second = _numbers(new[at : at + _BLOCK * width], dtype)
        if first is None or second is None:
            return None, None
        with np.errstate(all="ignore"):
            total += float(np.square(second - first).sum())
            base += float(np.square(first).sum())
    return math.sqrt(total) if total >= 0 else math.nan, math.sqrt(base) if base >= 0 else math.nan


def _numbers(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64] | None:
    if dtype == "bfloat16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4").astype("f8")
    kind = _FLOATS.get(dtype) or _INTEGERS.get(dtype)
    return None if kind is None else data.view(f"<{kind}").astype("f8")


def _size(reader: CheckpointReader, name: str) -> int:
    return sum(piece.size_bytes for _, _, piece in reader.pieces(name))
