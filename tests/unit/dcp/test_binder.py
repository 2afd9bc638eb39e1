"""Binding: names, boxes and values as stock DCP would give them, without touching anything."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from memory_checkpoint import save
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from ckptstore.dcp.binder import STRUCTURES_KEPT, Binder, Binding, bind
from ckptstore.dcp.markers import per_rank, trainable
from ckptstore.dcp.reading import read_state
from ckptstore.errors import StateError
from ckptstore.format import tree


def names(binding: Binding) -> set[str]:
    return {t.name for t in binding.tensors} | set(binding.aliases)


def value(binding: Binding, name: str) -> torch.Tensor:
    name = binding.aliases.get(name, name)
    (index,) = [i for i, t in enumerate(binding.tensors) if t.name == name]
    return binding.locals[index].detach()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def stepped(optimizer: torch.optim.Optimizer, *modules: nn.Module) -> None:
    for module in modules:
        for p in module.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()


def test_names_are_those_of_stock_dcp_when_module_optimizer_and_nested_values_are_saved() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(optimizer, model)
    extras = {"a": torch.ones(2), "list": [torch.ones(1), {"b": torch.zeros(1)}], 3: torch.ones(1)}

    binding = bind({"model": model, "optimizer": optimizer, "extras": extras})

    stock = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "extras": extras,
    }
    flat, _ = flatten_state_dict(stock)
    expected = {name: leaf for name, leaf in flat.items() if isinstance(leaf, torch.Tensor)}
    assert names(binding) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(value(binding, name), tensor), name


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor])
def test_optimizer_tree_is_that_of_stock_dcp_when_it_has_state(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = make(model.parameters(), lr=0.1)
    stepped(optimizer, model)
    stored = read_state(save({"m": model, "o": optimizer}))["o"]
    stock = get_optimizer_state_dict(model, optimizer)
    assert stored["param_groups"] == stock["param_groups"]
    assert set(stored["state"]) == {fqn for fqn, entry in stock["state"].items() if entry}
    for fqn, entry in stored["state"].items():
        assert list(entry) == list(stock["state"][fqn])
        for field, tensor in entry.items():
            assert torch.equal(tensor, torch.as_tensor(stock["state"][fqn][field]))


def test_nothing_changes_when_an_optimizer_without_state_is_bound() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("step"))
    optimizer.register_state_dict_pre_hook(lambda *_: fired.append("state_dict"))
    model[0].register_forward_hook(lambda *_: fired.append("forward"))

    bind({"model": model, "optimizer": optimizer})

    assert not optimizer.state
    assert fired == []
    assert all(p.grad is None for p in model.parameters())


def test_tied_weights_are_bound_once_and_both_names_known() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["emb"].weight
    binding = bind({"model": model})
    assert [t.name for t in binding.tensors] == ["model.emb.weight"]
    assert binding.aliases == {"model.head.weight": "model.emb.weight"}
    assert tree.tensor_names(binding.tree) == ["model.emb.weight", "model.head.weight"]


def test_weights_tied_by_storage_only_are_bound_once() -> None:
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    b.weight.data = a.weight.data
    assert bind({"a": a, "b": b}).aliases == {"b.weight": "a.weight"}


def test_views_of_one_storage_are_not_tied_when_they_show_different_values() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64)
    binding = bind({"x": x, "t": x.t(), "conj": x.conj(), "row": x[0], "same": x[:]})
    assert binding.aliases == {"same": "x"}
    assert len(binding.tensors) == 4


def test_one_memory_seen_as_two_dtypes_is_not_tied() -> None:
    x = torch.randn(4)
    back = read_state(save({"f": x, "i": x.view(torch.int32)}))
    assert torch.equal(back["f"], x)
    assert torch.equal(back["i"], x.view(torch.int32))


def test_ties_are_seen_again_when_they_change_between_saves() -> None:
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    binder = Binder()
    first = binder.bind({"a": a, "b": b})
    b.weight = a.weight
    second = binder.bind({"a": a, "b": b})
    b.weight = nn.Parameter(torch.zeros(3, 3))
    third = binder.bind({"a": a, "b": b})
    assert first.aliases == third.aliases == {}
    assert second.aliases == {"b.weight": "a.weight"}
    assert first.fingerprint == third.fingerprint != second.fingerprint
    assert torch.equal(value(third, "b.weight"), torch.zeros(3, 3))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.DataParallel, id="data_parallel"),
        pytest.param(lambda m: torch.compile(m, backend="eager"), id="compile"),
        pytest.param(lambda m: torch.compile(nn.DataParallel(m), backend="eager"), id="compile over data_parallel"),
        pytest.param(lambda m: nn.DataParallel(torch.compile(m, backend="eager")), id="data_parallel over compile"),
    ],
)
def test_names_are_those_of_the_plain_module_when_it_is_wrapped(wrap: Any) -> None:
    model = net()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    stepped(optimizer, model)
    plain, seen = bind({"m": model, "o": optimizer}), bind({"m": wrapped, "o": optimizer})
    assert names(seen) == names(plain)
    assert seen.tree == plain.tree


def test_names_are_those_of_the_plain_module_when_activations_are_checkpointed() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    plain = names(bind({"m": model}))
    model[0] = checkpoint_wrapper(model[0])
    binding = bind({"m": model})
    assert names(binding) == plain
    assert binding.slow_path is None


def test_a_submodule_called_module_keeps_its_name() -> None:
    outer = nn.Module()
    outer.module = nn.Linear(2, 2)
    assert names(bind({"m": outer})) == {"m.module.weight", "m.module.bias"}


def test_persistent_buffers_are_bound_and_others_are_not() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("dropped", torch.ones(2), persistent=False)
    module.register_parameter("none", None)
    (bound,) = bind({"m": module}).tensors
    assert (bound.name, bound.kind) == ("m.kept", "buffer")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra: Any = {"calls": 3}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_stored_beside_the_weights() -> None:
    stored = read_state(save({"m": nn.Sequential(Counting())}))
    assert stored["m"]["0._extra_state"] == {"calls": 3}


class Renaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self._register_state_dict_hook(self._rename)
        self._register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
        for key in list(state):
            if key.startswith(prefix + "inner."):
                state[key.replace("inner.", "renamed.")] = state.pop(key)

    @staticmethod
    def _rename_back(state: Any, *_: Any) -> None:
        for key in list(state):
            if "renamed." in key:
                state[key.replace("renamed.", "inner.")] = state.pop(key)


def test_a_module_with_hooks_is_asked_for_its_state_dict_and_the_reason_said() -> None:
    binding = bind({"m": Renaming()})
    assert names(binding) == {"m.renamed.weight", "m.renamed.bias"}
    assert binding.slow_path is not None
    assert "Renaming" in binding.slow_path


def test_one_optimizer_over_two_modules_names_parameters_by_module_only_when_they_collide() -> None:
    g, d = nn.Linear(2, 3), nn.Linear(3, 1)
    both = torch.optim.Adam([*g.parameters(), *d.parameters()])
    alone = torch.optim.Adam(d.parameters())
    stepped(both, g, d)
    stepped(alone, d)
    state = read_state(save({"g": g, "d": d, "both": both, "alone": alone}))
    assert set(state["both"]["state"]) == {"g.weight", "g.bias", "d.weight", "d.bias"}
    assert set(state["alone"]["state"]) == {"weight", "bias"}


def test_parameters_of_no_module_are_named_by_group_and_index() -> None:
    loose = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([loose], lr=0.1, momentum=0.9)
    loose.grad = torch.ones(2)
    optimizer.step()
    assert names(bind({"o": optimizer})) == {"o.state.param_groups.0.params.0.momentum_buffer"}


def test_the_optimizer_may_come_before_its_module_and_deep_inside() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(optimizer, model)
    found = names(bind({"app": {"opt": optimizer, "parts": [model]}}))
    assert "app.opt.state.0.weight.exp_avg" in found
    assert "app.parts.0.0.weight" in found


def test_trainable_leaves_out_what_is_frozen_and_keeps_buffers() -> None:
    model = net()
    model[0].requires_grad_(False)
    found = names(bind({"m": trainable(model)}))
    assert "m.0.weight" not in found
    assert {"m.2.weight", "m.1.running_mean"} <= found


def test_per_rank_tensors_carry_the_rank_and_live_in_a_tree_of_their_own() -> None:
    state = {"rng": per_rank({"cpu": torch.arange(3), "n": 5}), "epoch": 1}
    binding = bind(state, rank=3)
    assert [(t.name, t.kind, t.replicated) for t in binding.tensors] == [("rng.cpu@rank3", "per_rank", False)]
    assert binding.per_rank is not None
    assert tree.tensor_names(binding.per_rank) == ["rng.cpu@rank3"]
    assert tree.decode(binding.tree, lambda ref: ref) == {"rng": tree.PerRankRef("rng"), "epoch": 1}


def test_names_that_collide_after_joining_are_told_apart() -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "1": torch.full((1,), 2.0), 1: torch.full((1,), 3.0)}
    binding = bind(state)
    assert len(names(binding)) == 4
    assert "a.b" in names(binding)
    back = read_state(save(state))
    assert back == state


def test_keys_of_any_script_and_length_come_back() -> None:
    state = {"模型": {"": torch.zeros(1), "x/y z": torch.ones(1), "k" * 300: torch.full((1,), 2.0)}}
    assert read_state(save(state)) == state


def test_storages_are_read_anew_when_data_is_swapped_or_parameters_replaced() -> None:
    model = nn.Linear(2, 2)
    binder = Binder()
    before = binder.bind({"m": model})
    model.weight.data = torch.full((2, 2), 5.0)
    swapped = binder.bind({"m": model})
    model.weight = nn.Parameter(torch.full((2, 2), 6.0))
    replaced = binder.bind({"m": model})
    assert torch.equal(value(swapped, "m.weight"), torch.full((2, 2), 5.0))
    assert torch.equal(value(replaced, "m.weight"), torch.full((2, 2), 6.0))
    assert before.fingerprint == swapped.fingerprint == replaced.fingerprint
    assert before.tensors is replaced.tensors, "an unchanged structure is described once"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: setattr(m, "weight", nn.Parameter(torch.ones(3, 2))), id="shape"),
        pytest.param(lambda m: m.to(torch.bfloat16), id="dtype"),
        pytest.param(lambda m: m.weight.requires_grad_(False), id="requires_grad"),
        pytest.param(lambda m: m.register_buffer("new", torch.ones(1)), id="new name"),
        pytest.param(lambda m: m.register_parameter("bias", None), id="name gone"),
    ],
)
def test_the_fingerprint_changes_when_the_structure_does(change: Any) -> None:
    model = nn.Linear(2, 2)
    binder = Binder()
    before = binder.bind({"m": model}).fingerprint
    change(model)
    assert binder.bind({"m": model}).fingerprint != before


def test_structures_bound_in_turn_are_described_once_each() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(optimizer, model)
    tied = {"m": model, "again": model[0].weight}
    states: list[dict[str, Any]] = [{"m": model, "o": optimizer}, {"m": model}, tied]
    binder = Binder()
    first = [binder.bind(state) for state in states]
    second = [binder.bind(state) for state in states]
    for before, after in zip(first, second, strict=True):
        assert after.tensors is before.tensors
        assert (after.fingerprint, after.aliases) == (before.fingerprint, before.aliases)
    assert [binding.aliases for binding in second] == [{}, {}, {"again": "m.0.weight"}]
    model[0].weight = nn.Parameter(torch.full((8, 4), 7.0))
    for state, before in zip(states[1:], first[1:], strict=True):
        now = binder.bind(state)
        assert torch.equal(value(now, "m.0.weight"), model[0].weight)
        assert now.aliases == {}
        assert (now.fingerprint == before.fingerprint) is (before.aliases == {})


def test_the_last_few_structures_only_are_kept() -> None:
    binder = Binder()
    states = [{"x": torch.ones(1), str(i): torch.ones(1)} for i in range(STRUCTURES_KEPT + 1)]
    bound = [binder.bind(state) for state in states]
    assert binder.bind(states[-1]).tensors is bound[-1].tensors
    assert binder.bind(states[1]).tensors is bound[1].tensors
    assert binder.bind(states[0]).tensors is not bound[0].tensors
    assert binder.bind(states[1]).tensors is bound[1].tensors, "it was used since"
    assert binder.bind(states[2]).tensors is not bound[2].tensors


def test_the_fingerprint_says_nothing_about_values() -> None:
    model = nn.Linear(2, 2)
    binder = Binder()
    before = binder.bind({"m": model, "epoch": 1}).fingerprint
    with torch.no_grad():
        model.weight.add_(1)
    assert binder.bind({"m": model, "epoch": 2}).fingerprint == before


def test_nothing_of_the_state_is_kept_alive_between_saves() -> None:
    binder = Binder()
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(optimizer, model)
    binder.bind({"m": model, "o": optimizer, "x": torch.ones(3)})
    watched = [weakref.ref(p) for p in model.parameters()]
    watched += [weakref.ref(entry["exp_avg"]) for entry in optimizer.state.values()]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in watched if ref() is not None] == []


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "Wrapper"


REFUSED = {
    "meta": lambda: torch.empty(3, device="meta"),
    "wrapper": lambda: Wrapper(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_a_tensor_that_cannot_be_stored_is_refused_by_key(make: Any) -> None:
    with pytest.raises(StateError, match=r"deep\.bad") as caught:
        bind({"ok": torch.ones(1), "deep": {"bad": make()}})
    assert caught.value.context["key"] == "deep.bad"


def test_a_lazy_parameter_is_refused_by_key() -> None:
    with pytest.raises(StateError, match=r"m\.weight"):
        bind({"m": nn.LazyLinear(3)})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_becomes_composite_between_saves_is_taken_apart() -> None:
    state: dict[str, Any] = {"m": net(), "deep": {"x": torch.ones(3)}}
    state["m"].register_buffer("b", torch.ones(3))
    state["many"] = {str(i): torch.ones(3) for i in range(10)}
    binder = Binder()
    plain = names(binder.bind(state))
    state["deep"]["x"] = torch.eye(3).to_sparse()
    state["m"].b = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    state["many"]["7"] = torch.eye(3).to_sparse_csr()
    for _ in range(2):
        found = names(binder.bind(state))
        assert {"deep.x.indices", "deep.x.values", "m.b.bytes", "many.7.values"} <= found
        assert not {"deep.x", "m.b", "many.7"} & found
    state["deep"]["x"], state["m"].b, state["many"]["7"] = torch.ones(3), torch.ones(3), torch.ones(3)
    assert names(binder.bind(state)) == names(binder.bind(state)) == plain


@pytest.mark.parametrize("first", [0, 3], ids=["whole", "offset"])
def test_a_tensor_whose_memory_was_given_back_is_refused_by_key(first: int) -> None:
    binder, state = Binder(), {"a": torch.ones(8)[first:], "b": torch.ones(2)}
    binder.bind(state)
    state["a"].untyped_storage().resize_(0)
    for bound in (binder.bind, bind, binder.bind):
        with pytest.raises(StateError, match=r"'a'.*given back"):
            bound(state)
    state["a"] = torch.ones(8)[first:]
    assert names(binder.bind(state)) == {"a", "b"}


def test_a_tensor_that_comes_to_overlap_another_is_seen_to() -> None:
    whole = torch.arange(8.0)
    state = {"whole": whole, "apart": torch.ones(3), "other": torch.ones(3)}
    binder = Binder()
    binder.bind(state)
    state["apart"] = whole[2:5]
    assert binder.bind(state).tree == bind(state).tree
    assert binder.bind(state).tree["views"].keys() == {"whole", "apart"}
    state["apart"] = torch.ones(3)
    assert "views" not in binder.bind(state).tree
    state["other"] = state["apart"][1:]
    assert binder.bind(state).tree == bind(state).tree


def test_a_state_that_contains_itself_is_refused_by_key_when_an_optimizer_looks_through_it() -> None:
    state: dict[str, Any] = {"optimizer": torch.optim.SGD(net().parameters()), "config": {}}
    state["config"]["me"] = state["config"]
    with pytest.raises(StateError, match=r"config\.me.*contains itself"):
        bind(state)


@pytest.mark.parametrize("bad", [object(), lambda: 0, nn.Linear, open], ids=["object", "lambda", "class", "builtin"])
def test_a_value_that_cannot_be_stored_is_refused_by_key(bad: Any) -> None:
    with pytest.raises(StateError, match=r"deep\.bad"):
        bind({"deep": {"bad": bad}})


def test_a_state_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(StateError, match="mapping"):
        bind([torch.ones(1)])  # type: ignore[arg-type]


def test_a_harmless_tensor_subclass_is_stored_as_its_memory() -> None:
    class Tagged(torch.Tensor):
        pass

    tagged = torch.arange(3.0).as_subclass(Tagged)
    assert torch.equal(read_state(save({"x": tagged}))["x"], torch.arange(3.0))


def test_schedulers_and_stateful_objects_give_their_state_dict() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    stored = read_state(save({"s": scheduler, "scaler": torch.amp.GradScaler("cpu", enabled=False)}))
    assert stored["s"] == scheduler.state_dict()
    assert stored["scaler"] == {}


def test_a_prebuilt_state_dict_binds_like_its_objects() -> None:
    model = net()
    ready = OrderedDict(model.state_dict())
    assert names(bind({"m": ready})) == names(bind({"m": model})) == names(bind({"m": dict(ready)}))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_a_mapping_of_many_tensors_keeps_its_kind_and_is_not_walked_value_by_value(kind: type) -> None:
    value = kind((f"t{i}", torch.ones(2)) for i in range(20))
    binding = bind({"m": value})
    assert "t0" not in str(binding.outline()), "it is not one fragment"
    stored = read_state(save({"m": value}))["m"]
    assert type(stored) is kind
    assert list(stored) == list(value)


def test_an_optimizer_whose_state_is_not_only_tensors_is_stored_whole() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 3)) ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    stored = read_state(save({"m": model, "o": optimizer}))["o"]["state"]["weight"]
    live = optimizer.state[model.weight]
    assert stored["func_evals"] == live["func_evals"]
    assert all(torch.equal(a, b) for a, b in zip(stored["old_dirs"], live["old_dirs"], strict=True))
