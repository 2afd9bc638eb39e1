"""Targets that don't fit are told so with both sides, and are left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_checkpoint import save
from sameness import assert_same
from torch import nn

from ckptstore import CheckpointStore, StoreConfig, trainable
from ckptstore.dcp.loader import load_into
from ckptstore.errors import LoadMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def training(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (1 + seed))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model,
        "opt": optimizer,
        "sched": scheduler,
        "rng": torch.Generator().manual_seed(seed),
        "n": {"epoch": seed, "list": [torch.full((2,), float(seed)), seed]},
        "sparse": torch.sparse_coo_tensor([[seed]], [1.0], (5,), check_invariants=True),
    }


def seen(state: dict[str, Any]) -> Any:
    """All that a trainer could notice, the process's random generators included."""
    return {
        "model": {name: t.clone() for name, t in state["model"].state_dict().items()},
        "opt": torch.utils._pytree.tree_map(
            lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state["opt"].state_dict()
        ),
        "sched": dict(state["sched"].state_dict()),
        "rng": state["rng"].get_state(),
        "n": {"epoch": state["n"]["epoch"], "list": [torch.clone(state["n"]["list"][0]), state["n"]["list"][1]]},
        "sparse": state["sparse"].to_dense(),
        "grads": [None if p.grad is None else p.grad.clone() for p in state["model"].parameters()],
        "requires_grad": [p.requires_grad for p in state["model"].parameters()],
        "training": [m.training for m in state["model"].modules()],
        "torch": torch.get_rng_state(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
    }


def _no_bias(state: dict[str, Any]) -> None:
    state["model"][2] = nn.Linear(6, 2, bias=False)


def _one_more(state: dict[str, Any]) -> None:
    state["model"].register_buffer("extra", torch.ones(2))


def _other_shape(state: dict[str, Any]) -> None:
    state["model"][0].weight = nn.Parameter(torch.zeros(6, 5))


def _other_moments(state: dict[str, Any]) -> None:
    state["opt"].state[state["model"][0].weight]["exp_avg"] = torch.zeros(1)


#: What is wrong with the target -> (how to make it so, what the error says).
MISFITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a name is not in the target": (_no_bias, r"not in the target: .*model\.2\.bias"),
    "a name is not stored": (_one_more, r"missing in the checkpoint: .*model\.extra"),
    "another shape": (_other_shape, r"model\.0\.weight: stored shape \[6, 4\], target shape \[6, 5\]"),
    "another dtype": (lambda s: s["model"].to(torch.bfloat16), r"stored as float32, target is bfloat16"),
    "moments of another shape": (_other_moments, r"opt\.state\.0\.weight\.exp_avg: stored shape"),
    "a tensor for a mapping": (lambda s: s.update(n=torch.ones(1)), r"n: stored is a dict, the target is a tensor"),
    "a mapping for a tensor": (lambda s: s["n"].update(epoch={"a": torch.ones(1)}), r"n\.epoch"),
    "a module for values": (lambda s: s.update(n=nn.Linear(1, 1)), r"\bn\b"),
    "an optimizer for values": (
        lambda s: s.update(n=torch.optim.SGD([nn.Parameter(torch.ones(1))])), r"n: .*not an optimizer's state",
    ),
    "plain for sparse": (lambda s: s.update(sparse=torch.ones(5)), r"sparse: stored is a sparse_coo tensor"),
    "sparse for plain": (
        lambda s: s["n"]["list"].__setitem__(0, torch.ones(2).to_sparse()), r"n\.list\.0: stored is a plain tensor",
    ),
    "sparse of another size": (
        lambda s: s.update(sparse=torch.ones(6).to_sparse()), r"sparse: stored is sparse_coo .*\[5\].*\[6\]",
    ),
    "sparse of another layout": (
        lambda s: s.update(sparse=torch.ones(5, 1).to_sparse_csr()), r"sparse: stored is sparse_coo .*sparse_csr",
    ),
    "a longer list": (lambda s: s["n"]["list"].append(torch.ones(1)), r"missing in the checkpoint: .*n\.list\.2"),
    "a key that was not saved": (lambda s: s.update(new=torch.ones(1)), r"missing in the checkpoint: .*new"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_nothing_is_changed_when_the_target_does_not_fit(name: str) -> None:
    change, message = MISFITS[name]
    checkpoint = save(training(0))
    target = training(1)
    whole = dict(target)
    change(target)
    before = seen(whole) if name != "another dtype" else None
    read_before = checkpoint.reads.total()
    with pytest.raises(LoadMismatchError, match=message):
        load_into(target, checkpoint)
    assert checkpoint.reads.total() == read_before, "not a byte is read"
    if before is not None and name not in ("a longer list",):
        assert_same(before, seen({**whole, "n": whole["n"], "sparse": whole["sparse"]}))


def test_random_generators_of_the_process_are_untouched_when_saving_and_loading() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    checkpoint = save(training(0))
    target = training(1)
    here = torch.get_rng_state()
    load_into(target, checkpoint)
    assert torch.equal(torch.get_rng_state(), here)
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_only_what_fits_is_loaded_and_the_rest_reported_when_not_strict() -> None:
    target = training(1)
    _no_bias(target)
    _one_more(target)
    source = training(0)
    report = load_into({"model": target["model"]}, save({"model": source["model"]}), strict=False)
    assert report.missing == ("model.extra",)
    assert report.unexpected == ("model.2.bias",)
    assert torch.equal(target["model"][0].weight, source["model"][0].weight)


# -- LoRA, by hand as adapter libraries do it --------------------------------------------------------------------------


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def lora(seed: int) -> nn.Module:
    model = training(seed)["model"]
    model[0], model[2] = Lora(model[0]), Lora(model[2])
    return model


def test_adapters_alone_are_stored_and_loaded_when_the_base_is_frozen() -> None:
    model, other = lora(0), lora(1)
    frozen = other[0].base_layer.weight.clone()
    checkpoint = save({"model": trainable(model)})
    assert not [name for name in checkpoint.tensors if "base_layer" in name]
    load_into({"model": trainable(other)}, checkpoint)
    assert torch.equal(other[0].lora_A["default"].weight, model[0].lora_A["default"].weight)
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert torch.equal(other[0].base_layer.weight, frozen)


def test_plain_checkpoint_fills_the_base_of_a_wrapped_model_when_renamed() -> None:
    plain, other = training(0)["model"], lora(1)
    rename = {f"model.{i}.": f"model.{i}.base_layer." for i in (0, 2)}
    report = load_into({"model": other}, save({"model": plain}), rename=rename, strict=False)
    assert torch.equal(other[0].base_layer.weight, plain[0].weight)
    assert torch.equal(other[2].base_layer.bias, plain[2].bias)
    assert {name.split(".")[2] for name in report.missing} == {"lora_A", "lora_B"}
    with pytest.raises(LoadMismatchError, match="lora_A"):
        load_into({"model": other}, save({"model": plain}), rename=rename)


def test_both_sides_are_listed_when_adapters_meet_a_plain_model() -> None:
    plain = training(1)["model"]
    with pytest.raises(LoadMismatchError) as caught:
        load_into({"model": plain}, save({"model": trainable(lora(0))}))
    assert "model.0.weight" in caught.value.context["missing"]
    assert "model.0.lora_A.default.weight" in caught.value.context["unexpected"]


# -- compilation and capture -------------------------------------------------------------------------------------------


def test_save_and_load_stay_out_of_compiled_graphs(tmp_path: Path) -> None:
    graphs: list[list[str]] = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes if node.op.startswith("call")])
        return module

    with CheckpointStore(tmp_path / "store", config=StoreConfig(agent_idle_exit_seconds=5)) as store:
        state: dict[str, Any] = {"x": torch.zeros(3), "n": 0}

        def train(x: torch.Tensor, step: int) -> torch.Tensor:
            y = x + 1
            store.save({"x": y, "n": step}, step).wait("local", 60)
            store.load(state)
            return y * 2

        compiled = torch.compile(train, backend=backend)
        for step in range(1, 4):
            result = compiled(torch.full((3,), float(step)), step)
            assert torch.equal(result, torch.full((3,), 2.0 * (step + 1)))
            assert state["n"] == step
            assert torch.equal(state["x"], torch.full((3,), step + 1.0))
    inside = {name for graph in graphs for name in graph}
    assert len(inside) == 2, f"only the two additions of the step are compiled, not {inside}"
    for method in (CheckpointStore.save, CheckpointStore.load, CheckpointStore.read):
        assert method._torchdynamo_disable


def test_a_compiled_model_goes_on_without_a_new_compilation_when_loaded() -> None:
    compiled_times: list[int] = []

    def backend(module: Any, _: Any) -> Any:
        compiled_times.append(1)
        return module

    model, source = training(1)["model"].eval(), training(0)["model"].eval()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 4)
    with torch.no_grad():
        compiled(x)
        load_into({"model": compiled}, save({"model": source}))
        assert torch.equal(compiled(x), source(x))
    assert compiled_times == [1]
