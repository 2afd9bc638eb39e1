"""States that differ between ranks in which tensors they hold, such as the stages of a pipeline: one state of all.

Rank 0's tree is what is stored. Where another rank has tensors that rank 0 lacks, in the same module or optimizer,
their names are put beside rank 0's, and the tree says so: a rank that loads it need not have what other ranks of its
job have. What can't be joined that way is refused, since nobody would find it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import StateError
from ckptstore.format import tree
from ckptstore.format.manifest import Json
from ckptstore.format.tree import TensorRef


def joined(everyone: Sequence[Mapping[str, Json]], extra: Mapping[str, int]) -> dict[str, Json]:
    """Rank 0's fragments with the other ranks' names in them, by key; only those that gain any.

    Args:
        everyone: for each rank its fragments: nodes that hold nothing but names of tensors, by their place.
        extra: name of each tensor that rank 0 lacks -> a rank that has it.

    Raises:
        StateError: one of these is in no fragment of rank 0's; the same on all ranks.
    """
    result: dict[str, Json] = {}
    found: set[str] = set()
    for key, node in everyone[0].items():
        own = _decoded(node)
        before = len(own)
        done = [node]
        for other in everyone[1:]:
            if key in other and other[key] not in done:  # replicas of a stage say the same
                done.append(other[key])
                _join(own, _decoded(other[key]))
        if len(own) > before:
            encoded = tree.encode(own, lambda _, value: value)
            result[key] = encoded["tree"]
            found.update(tree.tensor_names(encoded))
    for name, rank in extra.items():
        if name not in found:
            raise StateError(
                f"{name!r} is in the state of rank {rank} but not in that of rank 0",
                hint="give every rank the same keys, or keep each rank's own with per_rank(...)",
                key=name,
                ranks=[rank],
            )
    return result


def with_joined(whole: Json, own: Mapping[str, Json], union: Mapping[str, Json]) -> Json:
    """The tree with rank 0's ``own`` fragments replaced by those of ``union``; the others are the same objects."""
    new = {id(node): union.get(key, node) for key, node in own.items()}

    def visit(node: Any) -> Any:
        if id(node) in new:
            return new[id(node)]
        if type(node) is dict:
            return {key: visit(value) for key, value in node.items()}
        return [visit(value) for value in node] if type(node) is list else node

    return tree.with_joined({**whole, "tree": visit(whole["tree"])}, sorted(union))


def _decoded(node: Json) -> Any:
    return tree.decode({"version": tree.VERSION, "tree": node}, lambda ref: ref)


def _join(own: Any, other: Any) -> None:
    """Add what ``own`` lacks: entries of a mapping, members of a list of names."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key, value in other.items():
            own.setdefault(key, value)
    elif isinstance(own, list) and isinstance(other, list):
        own[:] = dict.fromkeys([*own, *(value for value in other if not isinstance(value, TensorRef))])


def unexpected(names: list[str], agreement: Agreement, encoded: Json | None) -> list[str]:
    """Collective. Stored names that this rank's target lacks, without those of joined states that another's has."""
    keys = tree.joined(encoded) if encoded is not None else []
    if not keys or agreement.world_size == 1:
        return names
    everyone = agreement.gather(frozenset(names), what="comparing the target with the checkpoint")
    nobodys = frozenset.intersection(*everyone)
    return [name for name in names if name in nobodys or not name.startswith(tuple(f"{key}." for key in keys))]
