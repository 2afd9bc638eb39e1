"""What stock readers see of the state tree: every name, its path, and the values that aren't tensors.

DCP stores a state flat: it walks into mappings, and into lists with a tensor or a mapping in them; all else is a leaf,
saved whole under its dotted path. :func:`ckptstore.format.tree.iter_leaves` walks the encoded tree in the same way, so
names and paths are those of a checkpoint that stock ``dcp.save`` would have written of the same state.

Where DCP has no answer, or pickles:

* tensors are named as the tree names them, and a value whose dotted path is taken gets an escaped name
  (:mod:`ckptstore.format.names`); a name that isn't the dotted path stands at the top level, undivided;
* so do tensors inside tuples, dataclasses and the like, which DCP would pickle whole;
* left out are values that each rank keeps for itself, and those of types that stock PyTorch can't rebuild with no more
  than the standard library, NumPy, ``torch.dtype``, ``torch.device`` and ``torch.Size``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ckptstore.format.dtypes import DTYPES
from ckptstore.format.manifest import Json
from ckptstore.format.names import Names
from ckptstore.format.pickling import Call, Global, NoPickleFormError
from ckptstore.format.stock_envelope import value_archive
from ckptstore.format.tree import ArrayRef, Opaque, TensorRef, iter_leaves, tensor_names

Path = tuple[str | int, ...]

_DEVICE = re.compile(r"([a-z]{1,32})(?::([0-9]{1,5}))?")


class Leaf(NamedTuple):
    """One flat entry of the state."""

    name: str
    path: Path
    """Where DCP puts it back: mapping keys as str, list positions as int. Joined by dots it is the name."""
    value: Any
    """A reference to a tensor, or the value itself."""

    @property
    def tensor(self) -> str | None:
        """Name of the tensor whose elements are stored as pieces, if it is one."""
        return self.value.name if isinstance(self.value, (TensorRef, ArrayRef)) else None


def named_leaves(tree: Json) -> list[Leaf]:
    """The leaves in the order of the state, each name once.

    Raises:
        FormatError: the tree is damaged.
    """
    tensors = tensor_names(tree)
    taken = Names(tensors)
    leaves: dict[str, Leaf] = {}
    for path, value in iter_leaves(tree):
        dotted = ".".join(map(str, path))
        if isinstance(value, (TensorRef, ArrayRef)):
            name = value.name if value.name not in leaves else taken.name(path)
        else:
            name = taken.name(path)
        leaves[name] = Leaf(name, path if name == dotted else (name,), value)
    for name in tensors:
        leaves.setdefault(name, Leaf(name, (name,), TensorRef(name)))
    return list(leaves.values())


def stock_items(tree: Json) -> dict[str, bytes]:
    """The values that aren't tensors as ``torch.save`` archives, by their names; those without a stock form left out.

    Raises:
        FormatError: the tree is damaged.
    """
    items = {}
    for leaf in named_leaves(tree):
        if leaf.tensor is not None:
            continue
        try:
            items[leaf.name] = value_archive(_torch_value(leaf.value) if isinstance(leaf.value, Opaque) else leaf.value)
        except NoPickleFormError:
            continue
    return items


def _torch_value(value: Opaque) -> object:
    """What stands for a value of torch's own plain types, which only a process with torch can hold; else itself."""
    node: Any = value.data
    content = node.get("v") if isinstance(node, dict) else None
    if value.name == "torch.dtype" and isinstance(content, str) and content.removeprefix("torch.") in DTYPES:
        return Global("torch", content.removeprefix("torch."))
    if value.name == "torch.device" and isinstance(content, str) and (device := _DEVICE.fullmatch(content)):
        kind, index = device.groups()
        return Call(Global("torch", "device"), (kind,) if index is None else (kind, int(index)))
    if value.name == "torch.Size" and isinstance(content, list) and all(type(size) is int for size in content):
        return Call(Global("torch", "Size"), (tuple(content),))
    return value
