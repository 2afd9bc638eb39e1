"""States of several ranks joined into one: names beside names, nothing lost, nothing taken on trust."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
    union = joined([first.fragments, second.fragments], extra)
    whole = with_joined(first.tree, first.fragments, union)
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


def test_a_name_that_has_no_place_is_refused_with_its_rank() -> None:
    first = bind({"m": nn.Linear(1, 1)})
    with pytest.raises(StateError, match=r"'x\.y' is in the state of rank 3") as caught:
        joined([first.fragments, first.fragments], {"x.y": 3})
    assert caught.value.context["ranks"] == [3]


@pytest.mark.parametrize("damage", [None, {}, "m", [1]])
def test_damaged_words_about_joined_states_are_a_format_error(damage: Any) -> None:
    with pytest.raises(FormatError, match="joined"):
        tree.joined({"version": 1, "tree": {}, "joined": damage})
