"""Optimizer state goes by parameter name, in place, and neither saving nor loading does anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_checkpoint import save
from sameness import assert_same
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state
from ckptstore.errors import LoadMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[[Any], torch.optim.Optimizer]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))


def step(optimizer: torch.optim.Optimizer, *modules: nn.Module, count: int = 2, seed: int = 7) -> None:
    """Real steps with gradients that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(lambda: torch.tensor(1.0))
        else:
            optimizer.step()


def bits(*things: Any) -> Any:
    return [copy.deepcopy(thing.state_dict()) for thing in things]


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW single": lambda p: torch.optim.AdamW(p, foreach=False),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    known = {type(make(net().parameters())) for make in OPTIMIZERS.values()}
    all_of_them = {
        cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert {cls.__name__ for cls in all_of_them - known} <= {"SparseAdam", "Muon"}, "these have tests of their own"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("target", ["fresh", "stepped"])
def test_training_goes_on_bit_for_bit_when_loaded(name: str, target: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(optimizer, model)
    checkpoint = save({"model": model, "optimizer": optimizer})

    other = net(seed=1)
    resumed = OPTIMIZERS[name](other.parameters())
    if target == "stepped":
        step(resumed, other, count=1, seed=8)
    storages = {
        (i, key): value.data_ptr()
        for i, entry in resumed.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    load_into({"model": other, "optimizer": resumed}, checkpoint)

    assert_same(bits(model, optimizer), bits(other, resumed))
    for (i, key), address in storages.items():
        now = resumed.state_dict()["state"][i][key]
        assert not isinstance(now, torch.Tensor) or now.data_ptr() == address, "a moment stays where it is"
    step(optimizer, model, seed=9)
    step(resumed, other, seed=9)
    assert_same(bits(model, optimizer), bits(other, resumed))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Adagrad"])  # which has state at once
def test_empty_state_stays_empty_and_nothing_fires_when_saved_and_loaded(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    before, fired = bits(model, optimizer), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global step")),
        optimizer.register_step_post_hook(lambda *_: fired.append("step")),
        optimizer.register_state_dict_pre_hook(lambda *_: fired.append("state_dict")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: fired.append("load_state_dict")),
        model.register_forward_pre_hook(lambda *_: fired.append("forward")),
        model[0].weight.register_hook(lambda g: fired.append("grad")),
    ]
    checkpoint = save({"model": model, "optimizer": optimizer})
    load_into({"model": model, "optimizer": optimizer}, checkpoint)
    for handle in handles:
        handle.remove()
    assert fired == []
    assert len(optimizer.state) == 0
    assert all(p.grad is None for p in model.parameters())
    assert_same(before, bits(model, optimizer))
    # And an optimizer that has state loses it, when there was none.
    step(optimizer, model)
    load_into({"model": model, "optimizer": optimizer}, checkpoint)
    assert not any(optimizer.state.values())


def test_sparse_adam_goes_on_bit_for_bit_when_loaded() -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Embedding(10, 3, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([1, 4, 4])).square().sum().backward()
        optimizer.step()

    model, optimizer = fresh(0)
    train(model, optimizer)
    other, resumed = fresh(1)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    train(model, optimizer)
    train(other, resumed)
    assert_same(bits(model, optimizer), bits(other, resumed))


def test_muon_goes_on_bit_for_bit_when_loaded() -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(6, 4, bias=False)
        return model, torch.optim.Muon(model.parameters())

    model, optimizer = fresh(0)
    step(optimizer, model)
    other, resumed = fresh(1)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    step(optimizer, model, seed=9)
    step(resumed, other, seed=9)
    assert_same(bits(model, optimizer), bits(other, resumed))


def test_parameters_without_state_stay_without_when_only_some_were_stepped() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    other = net(seed=1)
    resumed = torch.optim.AdamW(other.parameters())
    step(resumed, other)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert [bool(resumed.state.get(p)) for p in other.parameters()] == [True, False, False, False, False, False]
    assert_same(bits(optimizer)[0]["state"][0], resumed.state[other[0].weight])


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": [model[0].weight, model[0].bias], "lr": 0.1, "weight_decay": 0.0},
        {"params": [model[2].weight, model[2].bias], "lr": 0.2},
        {"params": [model[3].weight, model[3].bias], "lr": 0.3},
    ]


REGROUPED: dict[str, Callable[[nn.Sequential], list[dict[str, Any]]]] = {
    "the same": groups_of,
    "reordered": lambda m: groups_of(m)[::-1],
    "params within a group reordered": lambda m: [{**g, "params": g["params"][::-1]} for g in groups_of(m)],
    "split": lambda m: [{**g, "params": [p]} for g in groups_of(m) for p in g["params"]],
}


@pytest.mark.parametrize("how", REGROUPED)
def test_state_and_hyperparameters_follow_the_parameters_when_groups_change(how: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1.0)
    step(optimizer, model)
    other = net(seed=1)
    resumed = torch.optim.AdamW([{**g, "lr": 9.0} for g in REGROUPED[how](other)], lr=1.0)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
        assert_same(optimizer.state[ours], resumed.state[theirs])

    def options(opt: torch.optim.Optimizer, parameter: torch.Tensor) -> Any:
        (group,) = [g for g in opt.param_groups if any(p is parameter for p in g["params"])]
        return {key: value for key, value in group.items() if key != "params"}

    for theirs, ours in zip(other.parameters(), model.parameters(), strict=True):
        assert options(resumed, theirs) == options(optimizer, ours)


def test_merged_groups_are_refused_and_nothing_is_changed_when_their_hyperparameters_differ() -> None:
    model = net()
    optimizer = torch.optim.AdamW(groups_of(model))
    step(optimizer, model)
    other = net(seed=1)
    resumed = torch.optim.AdamW(other.parameters())
    before = bits(other, resumed)
    with pytest.raises(LoadMismatchError, match="hyperparameters differ"):
        load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert_same(before, bits(other, resumed))


def test_frozen_parameters_are_where_they_were_when_loaded() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(optimizer, model)
    other = net(seed=1)
    other[0].requires_grad_(False)
    resumed = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert_same(bits(model, optimizer), bits(other, resumed))
    assert not other[0].weight.requires_grad


def test_frozen_parameters_in_the_optimizer_have_no_state_when_loaded() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    step(optimizer, model)
    other = net(seed=1)
    resumed = torch.optim.AdamW(other.parameters())
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert_same(bits(model, optimizer), bits(other, resumed))


@pytest.mark.parametrize("target", ["fresh", "stepped"])
def test_moments_keep_their_dtype_when_it_is_not_the_parameters(target: str) -> None:
    """bf16 weights with fp32 moments and a master copy, as mixed-precision optimizers keep them."""

    class Master(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["master"] = p.float()
                        state["moment"] = torch.zeros_like(p, dtype=torch.float16)
                        state["count"] = 0
                    state["moment"].mul_(0.9).add_(p.grad.half())
                    state["master"].add_(state["moment"].float(), alpha=-group["lr"])
                    state["count"] += 1
                    p.copy_(state["master"])

    model, other = net().bfloat16(), net(seed=1).bfloat16()
    optimizer, resumed = Master(model.parameters()), Master(other.parameters())
    step(optimizer, model)
    if target == "stepped":
        step(resumed, other, count=1, seed=3)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert_same(bits(model, optimizer), bits(other, resumed))
    step(optimizer, model, seed=9)
    step(resumed, other, seed=9)
    assert_same(bits(model, optimizer), bits(other, resumed))


class Wrapped:
    """An optimizer of somebody else's making: no torch class, a plain state dict."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.velocity = [torch.zeros_like(p) for p in model.parameters()]
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for velocity, p in zip(self.velocity, self.model.parameters(), strict=True):
            velocity.mul_(0.9).add_(p.grad if p.grad is not None else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity, "count": self.count, "by id": {0: self.velocity[0][:1]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.velocity, self.count = state["velocity"], state["count"]


class OwnStateDict(torch.optim.SGD):
    """A torch optimizer that knows better what its state is (8-bit ones do)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.table = torch.linspace(-1, 1, 256)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": super().state_dict(), "table": self.table, "codes": torch.arange(9, dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["inner"])
        self.table = state["table"]


@pytest.mark.parametrize("make", [Wrapped, lambda m: OwnStateDict(m.parameters())], ids=["duck-typed", "overridden"])
def test_custom_optimizers_get_their_own_state_dict_back(make: Any) -> None:
    model, other = net(), net(seed=1)
    optimizer, resumed = make(model), make(other)
    step(optimizer, model)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert_same(bits(model, optimizer), bits(other, resumed))


def test_several_optimizers_over_one_model_keep_their_own_state() -> None:
    def fresh(seed: int) -> dict[str, Any]:
        model = net(seed)
        return {
            "model": model,
            "weights": torch.optim.AdamW([p for p in model.parameters() if p.dim() == 2]),
            "biases": torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.1, momentum=0.9),
            "all": torch.optim.RMSprop(model.parameters()),
        }

    state, other = fresh(0), fresh(1)
    for name in ("weights", "biases", "all"):
        step(state[name], state["model"])
    load_into(other, save(state))
    assert_same(bits(*state.values()), bits(*other.values()))


@pytest.mark.parametrize("order", ["generator first", "discriminator first"])
def test_one_optimizer_over_two_models_finds_each_parameter(order: str) -> None:
    def fresh(seed: int, flip: bool) -> dict[str, Any]:
        g, d = net(seed), net(seed + 10)
        both = [*d.parameters(), *g.parameters()] if flip else [*g.parameters(), *d.parameters()]
        return {"g": g, "d": d, "opt": torch.optim.Adam(both)}

    state, other = fresh(0, False), fresh(1, order != "generator first")
    step(state["opt"], state["g"], state["d"])
    load_into(other, save(state))
    for name in ("g", "d"):
        for ours, theirs in zip(state[name].parameters(), other[name].parameters(), strict=True):
            assert_same(state["opt"].state[ours], other["opt"].state[theirs], name)


def test_parameter_groups_that_hold_extra_options_keep_them() -> None:
    model, other = net(), net(seed=1)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "all", "lr_scale": 0.5}], lr=0.1)
    resumed = torch.optim.SGD([{"params": list(other.parameters()), "name": "?", "lr_scale": 1.0}], lr=9.0)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert (resumed.param_groups[0]["name"], resumed.param_groups[0]["lr_scale"]) == ("all", 0.5)
    assert resumed.param_groups[0]["lr"] == 0.1


def test_named_parameters_of_an_optimizer_do_not_matter() -> None:
    model, other = net(), net(seed=1)
    optimizer, resumed = torch.optim.Adam(model.named_parameters()), torch.optim.Adam(other.parameters())
    step(optimizer, model)
    load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(optimizer.state[ours], resumed.state[theirs])


def test_lr_scheduler_and_optimizer_stay_connected_when_loaded() -> None:
    def fresh(seed: int) -> tuple[nn.Module, Any, Any]:
        model = net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    model, optimizer, scheduler = fresh(0)
    for _ in range(3):
        step(optimizer, model, count=1)
        scheduler.step()
    other, resumed, rescheduled = fresh(1)
    held = resumed.param_groups[0]["lr"]
    load_into({"m": other, "o": resumed, "s": rescheduled}, save({"m": model, "o": optimizer, "s": scheduler}))
    assert resumed.param_groups[0]["lr"] is held, "a captured learning rate stays the tensor it is"
    for _ in range(2):
        scheduler.step()
        rescheduled.step()
    assert torch.equal(resumed.param_groups[0]["lr"], optimizer.param_groups[0]["lr"])


def test_missing_and_unexpected_parameters_are_listed_and_nothing_changes() -> None:
    model = net()
    optimizer = torch.optim.AdamW(list(model.parameters())[:4])
    step(optimizer, model)
    other = net(seed=1)
    resumed = torch.optim.AdamW(list(other.parameters())[2:])
    step(resumed, other)
    before = bits(other, resumed)
    with pytest.raises(LoadMismatchError) as caught:
        load_into({"m": other, "o": resumed}, save({"m": model, "o": optimizer}))
    assert any("3.weight" in key for key in caught.value.context["missing"])
    assert any("0.weight" in key for key in caught.value.context["unexpected"])
    assert_same(before, bits(other, resumed))


def test_state_is_readable_by_name_when_there_is_no_target() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step(optimizer, model)
    stored = read_state(save({"m": model, "o": optimizer}))["o"]
    assert_same(dict(optimizer.state[model[2].weight]), stored["state"]["2.weight"])
