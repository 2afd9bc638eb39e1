"""Loading into tensors that are made of others: part by part in place where all fit, else by a new tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from ckptstore.dcp import assembly, composites
from ckptstore.dcp.boxes import dtype_name
from ckptstore.dcp.stored import MISSING
from ckptstore.errors import StateError
from ckptstore.format import tree

if TYPE_CHECKING:
    from ckptstore.dcp.target import Matcher


def match_composite(
    matcher: Matcher, key: str, target: torch.Tensor, stored: tree.Composite, replace: Callable[[Any], None]
) -> None:
    """Match a tensor with a stored one that is made of others.

    Args:
        replace: puts a new tensor in the place of ``target``, for when its memory can't take what is stored.
    """
    if not composites.is_composite(target):
        matcher.mismatch(key, f"stored is a {stored.kind} tensor, the target is a plain one")
        return
    try:
        own = composites.take_apart(key, target)
    except StateError as error:
        matcher.mismatch(key, error.message)
        return
    if not composites.can_replace(own, stored):
        matcher.mismatch(key, f"stored is {composites.described(stored)}, the target is {composites.described(own)}")
    elif composites.is_live(target) and _parts_fit(matcher, own, stored):
        _fill_parts(matcher, key, own, stored)
        matcher.check_at_last(lambda: assembly.check(key, target))
    elif isinstance(target, DTensor):  # nobody can make a new one of whole parts
        matcher.mismatch(
            key, f"stored is {composites.described(stored)}, whose parts or context are not those of the sharded target"
        )
    else:
        new = matcher.read_into_new(key, stored, type(target))
        if new is not MISSING:
            matcher.found.actions.append((key, lambda: replace(new)))


def described(target: torch.Tensor) -> str:
    """A composite target in words."""
    try:
        return composites.described(composites.take_apart("", target))
    except StateError as error:
        return error.message


def _parts_fit(matcher: Matcher, own: tree.Composite, stored: tree.Composite) -> bool:
    """Whether every part has the shape and dtype of the stored one, and all else is equal."""
    if own.parts.keys() != stored.parts.keys() or tree.encode(own.facts) != tree.encode(stored.facts):
        return False
    return all(_part_fits(matcher, name, part, stored.parts[name]) for name, part in own.parts.items())


def _part_fits(matcher: Matcher, name: str, part: torch.Tensor, stored: Any) -> bool:
    if composites.is_composite(part) != isinstance(stored, tree.Composite):
        return False
    if isinstance(stored, tree.Composite):
        return composites.is_live(part) and _parts_fit(matcher, composites.take_apart(name, part), stored)
    meta = matcher.source.tensors[stored.name]
    return (tuple(part.shape), dtype_name(part.dtype)) == (meta.shape, meta.dtype)


def _fill_parts(matcher: Matcher, key: str, own: tree.Composite, stored: tree.Composite) -> None:
    for name, part in own.parts.items():
        below, key_below = stored.parts[name], f"{key}.{name}"
        if isinstance(below, tree.Composite):
            _fill_parts(matcher, key_below, composites.take_apart(key_below, part), below)
        else:
            matcher.slot(key_below, part, below)
