"""States of several ranks joined into one: names beside names, nothing lost, nothing taken on trust."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ckptstore.dcp import union
from ckptstore.dcp.binder import bind
from ckptstore.dcp.union import joined, with_joined
from ckptstore.errors import FormatError, StateError
from ckptstore.format import tree


def layers(*numbers: int) -> dict[str, Any]:
    model = nn.ModuleDict({str(i): nn.Linear(2, 2) for i in numbers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"m": model, "o": optimizer}


def test_the_whole_names_every_ranks_tensors_in_order() -> None:
    first, second = bind(layers(0)), bind(layers(1, 2))
    extra = {bound.name: 1 for bound in second.tensors}
    whole = with_joined(first.tree, first.fragments, joined([first.fragments, second.fragments], extra))
    assert tree.tensor_names(whole) == [
        f"{prefix}{i}.{kind}{suffix}"
        for prefix, suffix in (("m.", ""), ("o.state.", ".momentum_buffer"))
        for i in range(3)
        for kind in ("weight", "bias")
    ]
    decoded = tree.decode(whole, lambda ref: ref)
    assert decoded["o"]["param_groups"][0]["params"] == [f"{i}.{k}" for i in range(3) for k in ("weight", "bias")]
    assert tree.joined(whole) == ["m", "o.param_groups.0.params", "o.state"]
    assert tree.joined(first.tree) == []
    assert tree.tensor_names(first.tree) == [bound.name for bound in first.tensors], "what it was made of is as it was"


def test_replicas_are_joined_once_and_lists_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared.append(self)
            return str.__eq__(self, other)

    decoded = []
    genuine = union._decoded

    def counted(node: Any) -> Any:
        decoded.append(node)
        return [Name(name) for name in genuine(node)]

    monkeypatch.setattr(union, "_decoded", counted)
    monkeypatch.setattr(tree, "encode", lambda value, leaf: {"version": tree.VERSION, "tree": list(map(str, value))})
    ranks = [{"p": tree.encode([f"{stage}.{i}" for i in range(300)], None)["tree"]} for stage in (0, 1, 0, 1, 1)]
    assert joined(ranks, {})["p"] == [f"{stage}.{i}" for stage in (0, 1) for i in range(300)]
    assert len(decoded) == 2, "each list of names once"
    assert len(compared) < 3000, "not each with each"


def test_what_gained_nothing_stays_the_same_object() -> None:
    first, second = bind(layers(0)), bind(layers(1))
    both = joined([first.fragments, second.fragments], {})
    kept = both.popitem()[0]
    whole = with_joined(first.tree, first.fragments, both)

    def ids(node: Any) -> set[int]:
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return {id(node)}.union(*map(ids, parts))

    assert id(first.fragments[kept]) in ids(whole)


def test_a_name_that_has_no_place_is_refused_with_its_rank() -> None:
    first = bind({"m": nn.Linear(1, 1)})
    with pytest.raises(StateError, match=r"'x\.y' is in the state of rank 3") as caught:
        joined([first.fragments, first.fragments], {"x.y": 3})
    assert caught.value.context["ranks"] == [3]


@pytest.mark.parametrize("damage", [None, {}, "m", [1]])
def test_damaged_words_about_joined_states_are_a_format_error(damage: Any) -> None:
    with pytest.raises(FormatError, match="joined"):
        tree.joined({"version": 1, "tree": {}, "joined": damage})
