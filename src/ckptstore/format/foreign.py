"""A state that comes from somewhere else: names, shapes, and how to get the bytes, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from ckptstore.errors import FormatError
from ckptstore.format import tree
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Json


@dataclass(frozen=True)
class ForeignTensor:
    """One tensor of another format.

    Attributes:
        dtype: torch's name without ``torch.``.
        read_into: fills exactly ``size_bytes`` of memory with the row-major elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read_into: Callable[[memoryview], None]

    @property
    def size_bytes(self) -> int:
        """Plain bytes."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class ForeignState:
    """A whole state of another format.

    Attributes:
        tree: the encoded state tree, which refers to the tensors by name.
        aliases: tied names -> the name whose bytes they share.
        left_out: names of values that could not be taken over.
    """

    tensors: Sequence[ForeignTensor]
    tree: Json
    aliases: dict[str, str]
    left_out: tuple[str, ...] = ()


def tree_of_names(names: Sequence[str]) -> Json:
    """The tree of a flat set of tensors: the first segment of each name is a top-level key, the rest a flat key below.

    Raises:
        FormatError: one name is both a tensor and the beginning of another.
    """
    nested: dict[str, object] = {}
    for name in names:
        head, dot, rest = name.partition(".")
        if not dot:
            if head in nested:
                raise FormatError(f"{name!r} is a tensor and the beginning of other names", key=name)
            nested[head] = tree.TensorRef(name)
            continue
        below = nested.setdefault(head, {})
        if not isinstance(below, dict):
            raise FormatError(f"{head!r} is a tensor and the beginning of other names", key=head)
        below[rest] = tree.TensorRef(name)
    return tree.encode(nested)
