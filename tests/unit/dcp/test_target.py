"""Strictness: what doesn't fit is listed with both sides, and then nothing has changed."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from memory_checkpoint import save
from torch import nn

from ckptstore.dcp.loader import load_into
from ckptstore.dcp.markers import per_rank, trainable
from ckptstore.errors import LoadMismatchError


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


MISFITS = {
    "missing": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["missing", "m.1.weight", "m.1.bias"]),
    "unexpected": (lambda: nn.Sequential(nn.Linear(2, 2, bias=False)), ["not in the target", "m.0.bias"]),
    "shape": (lambda: nn.Sequential(nn.Linear(3, 2)), ["m.0.weight", "[2, 2]", "[2, 3]"]),
    "dtype": (lambda: nn.Sequential(nn.Linear(2, 2)).double(), ["m.0.weight", "float32", "float64"]),
}


@pytest.mark.parametrize(("make", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_a_misfit_is_listed_with_both_sides_and_nothing_changes(make: Any, words: list[str]) -> None:
    checkpoint = save({"m": nn.Sequential(nn.Linear(2, 2)), "epoch": 3})
    target = make()
    before = values(target)
    state = {"m": target, "epoch": 0}
    with pytest.raises(LoadMismatchError) as caught:
        load_into(state, checkpoint)
    assert all(word in str(caught.value) for word in words)
    assert unchanged(target, before)
    assert state["epoch"] == 0
    assert not checkpoint.reads


def test_all_kinds_of_misfit_are_in_one_error() -> None:
    checkpoint = save({"m": {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}})
    with pytest.raises(LoadMismatchError) as caught:
        load_into({"m": {"a": torch.ones(3), "b": torch.ones(2).int(), "d": torch.ones(1)}}, checkpoint)
    context = caught.value.context
    assert context["missing"] == ["m.d"]
    assert context["unexpected"] == ["m.c"]
    assert len(context["mismatched"]) == 2


def test_lenient_loading_fills_what_fits_and_reports_the_rest() -> None:
    checkpoint = save({"m": {"a": torch.ones(2), "extra": torch.ones(1)}})
    target = {"m": {"a": torch.zeros(2, dtype=torch.float64), "new": torch.zeros(1)}}
    report = load_into(target, checkpoint, strict=False)
    assert target["m"]["a"].tolist() == [1, 1]
    assert target["m"]["new"].tolist() == [0]
    assert report.missing == ("m.new",)
    assert report.unexpected == ("m.extra",)
    assert report.cast == {"m.a": ("float32", "float64")}


def test_lenient_loading_converts_into_a_negated_view() -> None:
    target = torch.zeros(1, dtype=torch.complex64).conj().imag
    assert target.is_neg()
    load_into({"a": target}, save({"a": torch.tensor([40.0], dtype=torch.float16)}), strict=False)
    assert target.item() == 40.0


def test_a_wrong_shape_is_an_error_even_when_lenient() -> None:
    with pytest.raises(LoadMismatchError, match=r"m\.a"):
        load_into({"m": {"a": torch.zeros(3)}}, save({"m": {"a": torch.ones(2)}}), strict=False)


@pytest.mark.parametrize("first", [0, 3], ids=["whole", "offset"])
def test_a_target_whose_memory_was_given_back_is_a_misfit(first: int) -> None:
    target = torch.zeros(8)[first:]
    target.untyped_storage().resize_(0)
    with pytest.raises(LoadMismatchError, match=r"'a'.*given back"):
        load_into({"a": target}, save({"a": torch.ones(8 - first)}))


def test_top_level_keys_not_named_are_neither_read_nor_missed() -> None:
    checkpoint = save({"model": nn.Linear(2, 2), "big": torch.ones(1000), "odd": {1, 2}})
    load_into({"model": nn.Linear(2, 2)}, checkpoint)
    assert set(checkpoint.reads) == {"model.weight", "model.bias"}


def test_a_missing_top_level_key_is_listed() -> None:
    with pytest.raises(LoadMismatchError, match=r"other\.weight"):
        load_into({"other": nn.Linear(2, 2)}, save({"model": nn.Linear(2, 2)}))


def test_only_touches_and_reads_what_its_globs_name() -> None:
    model, optimizer = nn.Linear(2, 2), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint = save({"model": model, "optimizer": optimizer, "epoch": 5})
    other = nn.Linear(2, 2)
    moments = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    state = {"model": other, "optimizer": moments, "epoch": 0}
    load_into(state, checkpoint, only=["model.*"])
    assert unchanged(other, values(model))
    assert not moments.state
    assert moments.param_groups[0]["lr"] == 0.1
    assert state["epoch"] == 0
    assert set(checkpoint.reads) == {"model.weight", "model.bias"}


def test_only_ignores_misfits_outside_its_globs() -> None:
    checkpoint = save({"m": {"a": torch.ones(2), "b": torch.ones(2)}})
    target = {"m": {"a": torch.zeros(2), "b": torch.zeros(5), "c": torch.zeros(1)}}
    load_into(target, checkpoint, only=["m.a"])
    assert target["m"]["a"].tolist() == [1, 1]


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(LoadMismatchError, match="nothing"):
        load_into({"m": nn.Linear(2, 2)}, save({"m": nn.Linear(2, 2)}), only=["modle.*"])


def test_rename_maps_stored_prefixes_to_the_target() -> None:
    model = nn.Sequential(OrderedDict(encoder=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint = save({"model": model, "optimizer": optimizer})
    other = nn.Sequential(OrderedDict(enc=nn.Linear(2, 3), head=nn.Linear(3, 1)))
    moments = torch.optim.AdamW(other.parameters())
    report = load_into(
        {"backbone": other, "optimizer": moments},
        checkpoint,
        rename={"model.": "backbone.", "model.encoder.": "backbone.enc."},
    )
    assert torch.equal(other.enc.weight, model.encoder.weight)
    assert torch.equal(other.head.weight, model.head.weight)
    assert torch.equal(moments.state[other.enc.weight]["exp_avg"], optimizer.state[model.encoder.weight]["exp_avg"])
    assert report.renamed["model.encoder.weight"] == "backbone.enc.weight"


def test_rename_swaps_two_keys_at_once() -> None:
    checkpoint = save({"a": torch.zeros(2), "b": torch.ones(2)})
    target = {"a": torch.full((2,), 9.0), "b": torch.full((2,), 9.0)}
    load_into(target, checkpoint, rename={"a": "b", "b": "a"})
    assert target["a"].tolist() == [1, 1]
    assert target["b"].tolist() == [0, 0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_in_stored_names_are_seen_through(prefix: str) -> None:
    model = nn.Linear(2, 2)
    checkpoint = save({"m": {prefix + name: tensor for name, tensor in model.state_dict().items()}})
    other = nn.Linear(2, 2)
    load_into({"m": other}, checkpoint)
    assert unchanged(other, values(model))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_a_wrapped_target_takes_a_plain_checkpoint(wrap: Any) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    load_into({"m": wrap(other)}, save({"m": model}))
    assert unchanged(other, values(model))


def test_trainable_takes_back_what_it_stored_and_leaves_the_frozen() -> None:
    def lora(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        return model

    model, other = lora(0), lora(1)
    frozen = other[0].weight.clone()
    load_into({"m": trainable(other)}, save({"m": trainable(model)}))
    assert torch.equal(other[2].weight, model[2].weight)
    assert torch.equal(other[0].weight, frozen)


def test_trainable_takes_its_part_of_a_full_checkpoint() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight.requires_grad_(False)
    frozen = other.weight.clone()
    load_into({"m": trainable(other)}, save({"m": model}))
    assert torch.equal(other.bias, model.bias)
    assert torch.equal(other.weight, frozen)


def test_plain_values_are_replaced_in_their_nearest_container() -> None:
    history, seen = [9], {"old": 1}
    state: dict[str, Any] = {"epoch": 0, "history": history, "seen": {}, "deep": {"list": [1, {"x": 2}]}, "cfg": None}
    checkpoint = save(
        {"epoch": 3, "history": [1.0, 2.0], "seen": {5: "a"}, "deep": {"list": [7, {"x": 8}]}, "cfg": {"lr": 1}}
    )
    load_into(state, checkpoint)
    assert state == {
        "epoch": 3, "history": [1.0, 2.0], "seen": {5: "a"}, "deep": {"list": [7, {"x": 8}]}, "cfg": {"lr": 1},
    }  # fmt: skip
    assert state["history"] is history
    assert seen == {"old": 1}


Pair = namedtuple("Pair", "tensor number")


def test_tuples_keep_their_tensors_and_get_new_values() -> None:
    tensor = torch.zeros(2)
    state: dict[str, Any] = {"t": (tensor, 1), "n": Pair(torch.zeros(1), 1)}
    load_into(state, save({"t": (torch.ones(2), 5), "n": Pair(torch.ones(1), 6)}))
    assert state["t"][1] == 5
    assert state["t"][0] is tensor
    assert tensor.tolist() == [1, 1]
    assert type(state["n"]) is Pair
    assert state["n"].number == 6
    assert state["n"].tensor.tolist() == [1]


def test_modules_in_lists_are_filled_in_place() -> None:
    stored = [nn.Linear(2, 2), nn.Linear(2, 2)]
    target = [nn.Linear(2, 2), nn.Linear(2, 2)]
    load_into({"nets": target}, save({"nets": stored}))
    assert all(unchanged(a, values(b)) for a, b in zip(target, stored, strict=True))


def test_lists_of_another_length_are_a_misfit_when_they_hold_tensors() -> None:
    with pytest.raises(LoadMismatchError, match=r"x\.1"):
        load_into({"x": [torch.zeros(1), torch.zeros(1)]}, save({"x": [torch.ones(1)]}))


def test_a_per_rank_target_gets_its_value_back() -> None:
    mine = {"rng": torch.zeros(3), "n": 0}
    state = {"a": per_rank(mine), "b": per_rank(0)}
    load_into(state, save({"a": per_rank({"rng": torch.ones(3), "n": 4}), "b": per_rank(5)}))
    assert state["a"].value is mine
    assert mine["n"] == 4
    assert mine["rng"].tolist() == [1, 1, 1]
    assert state["b"].value == 5


class Counter:
    def __init__(self) -> None:
        self.calls = 0
        self.tensor = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.tensor = state["calls"], state["tensor"]


def test_a_stateful_object_is_handed_its_state() -> None:
    saved, target = Counter(), Counter()
    saved.calls, saved.tensor = 3, torch.ones(2)
    load_into({"c": target}, save({"c": saved}))
    assert target.calls == 3
    assert target.tensor.tolist() == [1, 1]
    assert target.tensor is not saved.tensor


def test_an_object_that_refuses_its_state_is_named() -> None:
    class Picky(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise RuntimeError("no thanks")

    with pytest.raises(LoadMismatchError, match=r"'c'.*no thanks"):
        load_into({"c": Picky()}, save({"c": Counter()}))


class Renaming(nn.Module):
    """Stores its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self._register_state_dict_hook(
            lambda _, state, prefix, __: state.update({prefix + "w": state.pop(prefix + "weight")})
        )
        self._register_load_state_dict_pre_hook(
            lambda state, prefix, *_: state.update({prefix + "weight": state.pop(prefix + "w")})
        )


def test_a_module_with_hooks_gets_its_own_state_dict_back() -> None:
    saved, target = Renaming(), Renaming()
    saved.weight.data.fill_(3)
    place = target.weight.data_ptr()
    load_into({"m": nn.Sequential(target)}, save({"m": nn.Sequential(saved)}))
    assert target.weight.tolist() == [3, 3]
    assert target.weight.data_ptr() == place


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_set_with_its_tensors() -> None:
    saved, target = Extra(), Extra()
    saved.extra = {"amax": torch.ones(2), "n": 3}
    load_into({"m": nn.Sequential(target)}, save({"m": nn.Sequential(saved)}))
    assert target.extra["n"] == 3
    assert target.extra["amax"].tolist() == [1, 1]


def test_a_plain_value_where_the_target_has_a_tensor_is_a_misfit() -> None:
    with pytest.raises(LoadMismatchError, match="x"):
        load_into({"x": torch.zeros(1)}, save({"x": 3}))


def test_hyperparameters_of_merged_groups_must_agree() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    with pytest.raises(LoadMismatchError, match=r"o\.param_groups\.0"):
        load_into({"m": model, "o": torch.optim.SGD(model.parameters(), lr=1.0)}, save({"m": model, "o": optimizer}))


def test_a_parameter_the_stored_optimizer_did_not_have_is_missing() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(LoadMismatchError, match=r"o\.state\.bias"):
        load_into(
            {"m": model, "o": torch.optim.SGD(model.parameters(), lr=1.0)},
            save({"m": model, "o": torch.optim.SGD([model.weight], lr=1.0)}),
        )


def trained(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    model = nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_optimizer_without_its_model_is_told_to_bring_it_along() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    checkpoint = save({"model": model, "opt": optimizer})
    for strict in (True, False):
        target = {"opt": trained(torch.optim.AdamW)[1]}
        if strict:
            with pytest.raises(LoadMismatchError, match=r"opt\.state\.weight") as caught:
                load_into(target, checkpoint)
            assert caught.value.hint == "pass the model along with 'opt': parameters have their names from it"
        else:
            assert "opt.state.weight" in load_into(target, checkpoint, strict=False).unexpected


def test_another_kind_of_optimizer_is_warned_of_by_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    checkpoint = save({"model": model, "opt": optimizer})
    other = nn.Linear(2, 2)
    load_into({"model": other, "opt": torch.optim.SGD(other.parameters(), lr=0.1)}, checkpoint)
    (warning,) = caplog.messages
    assert warning.startswith("'opt' is of class SGD, what is stored is another kind of optimizer's: ")
    assert "state exp_avg, exp_avg_sq, step;" in warning
    assert "betas" in warning
    assert warning.endswith("instead of dampening, momentum, nesterov")

    caplog.clear()
    model, moments = trained(torch.optim.SGD, momentum=0.9)
    with pytest.raises(LoadMismatchError) as caught:
        load_into({"model": model, "opt": moments}, checkpoint)
    assert (caught.value.hint or "").startswith("'opt' is of class SGD")
    assert not caplog.messages, "the error says it"


def test_options_of_schedulers_and_other_versions_are_no_other_kind(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained(torch.optim.AdamW)
    for group in optimizer.param_groups:  # as an older torch kept it, with a scheduler
        group.pop("decoupled_weight_decay", None)
        group["initial_lr"] = 0.5
    checkpoint = save({"model": model, "opt": optimizer})
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        other = nn.Linear(2, 2)
        load_into({"model": other, "opt": kind(other.parameters(), lr=0.1)}, checkpoint)
    assert not caplog.messages
