"""Names and fragments: whatever the keys, each tensor comes back where it was; what is reused is told apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from memory_checkpoint import save
from torch import nn

from ckptstore.dcp.binder import STRUCTURES_KEPT, Binder, Binding, bind
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.markers import per_rank
from ckptstore.dcp.reading import read_state
from ckptstore.format import tree

MANY = range(10)


def t(value: float) -> torch.Tensor:
    return torch.full((2,), float(value))


def as_said(value: Any) -> Any:
    """With the types of containers and keys, and the order of entries, which ``==`` would not look at."""
    if isinstance(value, dict):
        return type(value), [(type(key), key, as_said(below)) for key, below in value.items()]
    if isinstance(value, list):
        return [as_said(below) for below in value]
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


def live(binding: Binding) -> Any:
    """What the tree of a binding says, with the live tensors."""
    by_name = {bound.name: local for bound, local in zip(binding.tensors, binding.locals, strict=True)}
    return tree.decode(binding.tree, lambda ref: by_name[binding.aliases.get(ref.name, ref.name)])


SHARED = t(5)
STATES: dict[str, Any] = {
    "dicts in a dict": {str(i): {"a": t(i), "b": t(-i)} for i in MANY},
    "ints": {i: t(i) for i in MANY},
    "ints outside": {i: {"a": t(i)} for i in MANY},
    "ints inside": {str(i): {0: t(i), "0": t(-i)} for i in MANY},
    "an int and its digits": {key: {"a": t(i)} for i in MANY for key in (i, str(i))},
    "bools and ints": {"yes": {k: t(k) for k in MANY}, "no": {bool(k) if k < 2 else k: t(k) for k in MANY}},
    "floats": {float(i): t(i) for i in MANY},
    "bytes": {b"%d" % i: t(i) for i in MANY},
    "tuples": {(i, "x"): {"a": t(i)} for i in MANY},
    "None among strings": {**{str(i): {"a": t(i)} for i in MANY}, None: {"a": t(1)}},
    "an empty entry, first": {"e": {}, **{str(i): {"a": t(i)} for i in MANY}},
    "an empty entry, last": {**{str(i): {"a": t(i)} for i in MANY}, "e": {}},
    "empty entries only": {str(i): {} for i in MANY},
    "dots": {"a": {"b.c": t(1), "d": t(2)}, "a.b": {"c": t(3)}, **{str(i): {"a": t(i)} for i in MANY}},
    "dots above": {"a.b": {str(i): t(i) for i in MANY}, "a": {"b": {str(i): t(-i) for i in MANY}}},
    "one tensor under two names": {str(i): {"a": SHARED, "b": t(i), "c": SHARED} for i in MANY},
    "ordered in ordered": OrderedDict((str(i), OrderedDict(b=t(i), a=t(-i))) for i in MANY),
    "ordered in a dict": {str(i): OrderedDict(a=t(i)) for i in MANY},
    "a dict in ordered": OrderedDict((str(i), {"a": t(i)}) for i in MANY),
    "one ordered among dicts": {**{str(i): {"a": t(i)} for i in MANY}, "o": OrderedDict(a=t(1))},
    "one tensor among dicts": {**{str(i): {"a": t(i)} for i in MANY}, "x": t(1)},
    "one number among tensors": {str(i): {"a": t(i), "n": i} for i in MANY},
    "tildes": {f"~{i}": {"~": t(i), "~~": t(-i)} for i in MANY},
    "empty keys": {"": {"": t(3)}, **{str(i): {"": t(i)} for i in MANY}},
    "other scripts": {f"层{i}": {"\ud800": t(i)} for i in MANY},
    "unsorted": {str(9 - i): {"z": t(i), "a": t(-i)} for i in MANY},
    "like an escaped name": {'["s","0","a"]': {"a": t(1)}, **{str(i): {"a": t(i)} for i in MANY}},
    "of two dtypes": {str(i): {"a": t(i), "b": torch.ones(2, dtype=torch.int8)} for i in MANY},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
@pytest.mark.parametrize("place", [lambda s: s, per_rank, lambda s: [s]], ids=["plain", "per_rank", "in a list"])
def test_a_dict_of_tensors_comes_back_as_it_was(state: Any, place: Any) -> None:
    assert as_said(read_state(save({"s": place(state)}))["s"]) == as_said([state] if place(0) == [0] else state)


def test_a_tensor_whose_key_looks_like_a_name_of_a_rank_is_told_from_the_ranks_own() -> None:
    state = {"x@rank0": t(1), "x": per_rank(t(2)), "y": per_rank({"a.b": t(3), "a": {"b": t(4)}})}
    back = read_state(save(state))
    assert as_said(back) == as_said({"x@rank0": t(1), "x": t(2), "y": {"a.b": t(3), "a": {"b": t(4)}}})


def test_moments_of_all_modules_come_back_when_dotted_keys_of_two_are_equal() -> None:
    def make() -> tuple[dict[Any, Any], torch.optim.Optimizer, list[nn.Parameter]]:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        parameters = [*first.parameters(), *second.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        return {"a.b": first, "a": {"b": second}, "o": optimizer}, optimizer, parameters

    state, optimizer, parameters = make()
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(i))
    optimizer.step()
    target, fresh, same = make()
    load_into(target, save(state))
    assert [fresh.state[p]["momentum_buffer"].flatten()[0].item() for p in same] == [0.0, 1.0, 2.0, 3.0]


def test_states_that_look_alike_are_told_apart_when_they_are_bound_in_turn() -> None:
    rest = {str(i): {"x": t(i)} for i in MANY}
    states = [
        {"s": {"a": {"b.c": t(1)}, "a.b": {"d": t(2)}, **rest}},
        {"s": {"a": {"z": t(0)}, "a.b": {"c": t(1), "d": t(2)}, **rest}},
        {"s": {"a": {"b": {"c": t(1)}}, "a.b": {"d": t(2)}, **rest}},
        {"s": {"a": {}, "a.b": {"c": t(1), "d": t(2)}, **rest}},
        {"s": {i: t(i) for i in MANY}},
        {"s": {str(i): t(i) for i in MANY}},
        {"s": OrderedDict((str(i), t(i)) for i in MANY)},
        {"s": {str(i): {"x": t(i)} for i in MANY}},
        {"s": {i: {"x": t(i)} for i in MANY}},
        {"s": {f"{i}.x": t(i) for i in MANY}},
    ]
    binder = Binder()
    for state in states * 2:
        assert as_said(live(binder.bind(state))) == as_said(state)


class Tagged(torch.Tensor):
    """Registered below: its codec stores more than its memory."""


@pytest.fixture
def tagged() -> Any:
    tree.register_type(
        Tagged, name="tests.tagged", encode=lambda x: x.tolist(), decode=lambda x: torch.tensor(x).as_subclass(Tagged)
    )
    return lambda value: t(value).as_subclass(Tagged)


def test_a_registered_tensor_class_keeps_its_codec_among_plain_tensors(tagged: Any) -> None:
    state: dict[str, Any] = {str(i): {"a": t(i)} for i in MANY}
    binder = Binder()
    binder.bind({"s": state})
    state["4"]["a"] = tagged(7)
    back = read_state(save({"s": state, "flat": {str(i): tagged(i) for i in MANY}}))
    assert type(back["s"]["4"]["a"]) is type(back["flat"]["0"]) is Tagged
    assert back["s"]["4"]["a"].tolist() == [7.0, 7.0]
    assert "s.4.a" not in {bound.name for bound in binder.bind({"s": state}).tensors}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_among_dicts_that_becomes_composite_is_taken_apart_and_put_back() -> None:
    state: dict[str, Any] = {"s": {str(i): {"a": t(i)} for i in MANY}, "other": t(1)}
    binder = Binder()
    plain = binder.bind(state)
    for tensor in (torch.eye(2).to_sparse(), torch.quantize_per_tensor(t(3), 0.1, 0, torch.qint8)):
        state["s"]["4"]["a"] = tensor
        for _ in range(2):
            found = {bound.name for bound in binder.bind(state).tensors}
            assert "s.4.a" not in found
            assert {"s.4.a.values", "s.4.a.bytes"} & found
        assert torch.equal(read_state(save(state))["s"]["4"]["a"].to_dense(), tensor.to_dense())
    state["s"]["4"]["a"] = t(4)
    assert binder.bind(state).fingerprint == plain.fingerprint
    assert as_said(live(binder.bind(state))) == as_said(state)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD], ids=["with state", "without"])
def test_the_state_dict_of_an_optimizer_comes_back_with_its_int_keys(make: Any) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in MANY])
    optimizer = make([{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.5}], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"m": model.state_dict(), "o": optimizer.state_dict()}
    assert as_said(read_state(save({"o": state["o"]}))["o"]) == as_said(state["o"])
    if state["o"]["state"]:
        assert "exp_avg" not in str(bind(state).outline()), "it is walked value by value"


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({**{str(i): {"a": t(i)} for i in MANY}, "f": {}}, id="another empty entry"),
        pytest.param({**{str(i): {"a": t(i)} for i in MANY}}, id="no empty entry"),
    ],
)
def test_ranks_see_that_they_differ_where_no_tensor_tells(other: Any) -> None:
    own = {**{str(i): {"a": t(i)} for i in MANY}, "e": {}}
    assert bind({"s": own}).outline() != bind({"s": other}).outline()


def test_fragments_whose_dotted_places_are_equal_are_both_left_out_of_the_outline() -> None:
    binding = bind({"a.b": {str(i): t(i) for i in MANY}, "a": {"b": {str(i): t(-i) for i in MANY}}})
    assert len(binding.fragments) == 2
    assert "tensor" not in str(binding.outline())


def test_what_is_kept_between_saves_does_not_grow_with_keys_that_come_and_go() -> None:
    binder = Binder()
    for episode in range(5 * STRUCTURES_KEPT):
        binder.bind({"episodes": {f"{episode}": {str(i): t(i) for i in MANY}}, "m": nn.Linear(2, 2)})
    assert len(binder._fragments) == STRUCTURES_KEPT + 1
