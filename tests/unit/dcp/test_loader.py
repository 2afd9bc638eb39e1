"""Loading: what went in comes out, in place, whatever boxes and chunks lie between."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_checkpoint import MemoryCheckpoint, save, shard_of
from sameness import assert_same
from torch import nn

from ckptstore.dcp.agreement import Agreement
from ckptstore.dcp.boxes import dtype_name
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.prepare import Preparer
from ckptstore.dcp.reading import read_state
from ckptstore.errors import IncompleteCheckpointError, IntegrityError
from ckptstore.format.dtypes import DTYPES
from ckptstore.format.tree import register_type


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3))


def train(model: nn.Module, *stepped: Any, steps: int = 3, width: int = 30) -> None:
    for _ in range(steps):
        for each in stepped:
            if isinstance(each, torch.optim.Optimizer):
                each.zero_grad()
        model(torch.randn(6, width)).square().sum().backward()
        for each in stepped:
            each.step()


def state_of(optimizer: torch.optim.Optimizer) -> str:
    torch.set_printoptions(precision=17, threshold=100_000)
    return str(optimizer.state_dict())


def same_module(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def test_training_goes_on_bit_for_bit_when_everything_is_loaded_into_fresh_objects() -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    model, optimizer, scheduler = fresh(0)
    train(model, optimizer, scheduler)
    checkpoint = save({"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 4})

    other, moments, schedule = fresh(1)
    target = {"model": other, "optimizer": moments, "scheduler": schedule, "epoch": 0}
    report = load_into(target, checkpoint)

    assert target["epoch"] == 4
    assert report.missing == report.unexpected == ()
    for trained in ((model, optimizer, scheduler), (other, moments, schedule)):
        torch.manual_seed(5)
        train(*trained)
    assert same_module(model, other)
    assert state_of(optimizer) == state_of(moments)
    assert scheduler.state_dict() == schedule.state_dict()


def test_memory_stays_in_place_when_modules_and_moments_exist() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    checkpoint = save({"m": model, "o": optimizer})
    places = [t.data_ptr() for t in model.state_dict().values()]
    moments = [t.data_ptr() for entry in optimizer.state.values() for t in entry.values()]
    train(model, optimizer)
    load_into({"m": model, "o": optimizer}, checkpoint)
    assert places == [t.data_ptr() for t in model.state_dict().values()]
    assert moments == [t.data_ptr() for entry in optimizer.state.values() for t in entry.values()]


def test_no_hook_fires_and_no_gradient_appears_when_loading() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    checkpoint = save({"m": model, "o": optimizer})
    other = net(1)
    moments = torch.optim.AdamW(other.parameters())
    fired: list[str] = []
    moments.register_step_pre_hook(lambda *_: fired.append("step"))
    moments.register_load_state_dict_pre_hook(lambda *_: fired.append("load"))
    other.register_load_state_dict_post_hook(lambda *_: fired.append("load"))
    load_into({"m": other, "o": moments}, checkpoint)
    assert fired == []
    assert all(p.grad is None for p in other.parameters())


def test_an_optimizer_saved_without_state_is_loaded_without_state() -> None:
    model = net()
    fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
    checkpoint = save({"m": model, "o": fresh})
    used = torch.optim.AdamW(model.parameters())
    train(model, used)
    load_into({"m": model, "o": used}, checkpoint)
    assert not used.state
    assert used.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=1e-3), id="sgd"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), id="momentum"),
        pytest.param(lambda p: torch.optim.Adam(p, amsgrad=True), id="amsgrad"),
        pytest.param(lambda p: torch.optim.AdamW(p, fused=True), id="fused"),
        pytest.param(lambda p: torch.optim.AdamW(p, foreach=True), id="foreach"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)), id="lr tensor"),
        pytest.param(lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5), id="rmsprop"),
        pytest.param(lambda p: torch.optim.Adafactor(p), id="adafactor"),
        pytest.param(lambda p: torch.optim.Adagrad(p), id="adagrad"),
        pytest.param(lambda p: torch.optim.NAdam(p), id="nadam"),
        pytest.param(lambda p: torch.optim.Adadelta(p), id="adadelta"),
        pytest.param(lambda p: torch.optim.ASGD(p), id="asgd"),
        pytest.param(lambda p: torch.optim.Rprop(p), id="rprop"),
    ],
)
def test_every_optimizer_comes_back_into_one_without_state(make: Any) -> None:
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer)
    checkpoint = save({"m": model, "o": optimizer})
    other = net(1)
    moments = make(other.parameters())
    load_into({"m": other, "o": moments}, checkpoint)
    assert state_of(moments) == state_of(optimizer)
    for trained in ((model, optimizer), (other, moments)):
        torch.manual_seed(5)
        train(*trained)
    assert same_module(model, other)


def test_frozen_parameters_have_no_moments_before_and_after() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    checkpoint = save({"m": model, "o": optimizer})
    other = net(1)
    other[0].requires_grad_(False)
    moments = torch.optim.AdamW(other.parameters())
    load_into({"m": other, "o": moments}, checkpoint)
    assert state_of(moments) == state_of(optimizer)
    assert other[0].weight not in moments.state


def test_one_optimizer_over_two_modules_comes_back_when_names_collide() -> None:
    def gan(seed: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        g, d = nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(6, 4))
        return g, d, torch.optim.Adam([*d.parameters(), *g.parameters()])

    g, d, optimizer = gan(0)
    train(nn.Sequential(g, d), optimizer, width=4)
    checkpoint = save({"g": g, "d": d, "o": optimizer})
    g2, d2, moments = gan(1)
    load_into({"o": moments, "d": d2, "g": g2}, checkpoint)
    assert same_module(g, g2)
    assert same_module(d, d2)
    assert state_of(moments) == state_of(optimizer)


def test_moments_follow_names_when_groups_are_reordered_and_split() -> None:
    model = net()
    optimizer = torch.optim.AdamW(
        [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[3].parameters()), "lr": 0.2}]
    )
    train(model, optimizer)
    checkpoint = save({"m": model, "o": optimizer})
    other = net(1)
    moments = torch.optim.AdamW(
        [{"params": [other[3].bias]}, {"params": [other[0].bias, other[0].weight]}, {"params": [other[3].weight]}]
    )
    load_into({"m": other, "o": moments}, checkpoint)
    assert [group["lr"] for group in moments.param_groups] == [0.2, 0.1, 0.2]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if a in optimizer.state:
            assert torch.equal(optimizer.state[a]["exp_avg"], moments.state[b]["exp_avg"])


def test_moments_in_another_dtype_than_the_parameter_keep_it() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn(p.shape).bfloat16()
    checkpoint = save({"m": model, "o": optimizer})
    other = nn.Linear(3, 3)
    moments = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    load_into({"m": other, "o": moments}, checkpoint)
    assert moments.state[other.weight]["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(moments.state[other.weight]["momentum_buffer"], optimizer.state[model.weight]["momentum_buffer"])


def test_an_optimizers_own_bookkeeping_comes_back() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["total"] = {"count": 3}
    checkpoint = save({"m": model, "o": optimizer})
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    load_into({"m": model, "o": other}, checkpoint)
    assert other.state["total"] == {"count": 3}


def test_an_optimizer_takes_a_plain_optimizer_state_dict_by_position() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    checkpoint = save({"m": model.state_dict(), "o": optimizer.state_dict()})
    other = net(1)
    moments = torch.optim.AdamW(other.parameters())
    load_into({"m": other, "o": moments}, checkpoint)
    assert same_module(model, other)
    assert state_of(moments) == state_of(optimizer)


def test_tied_weights_stay_tied_and_equal() -> None:
    def tied(seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"emb": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
        model["head"].weight = model["emb"].weight
        return model

    a, b = tied(0), tied(1)
    checkpoint = save({"m": a})
    load_into({"m": b}, checkpoint)
    assert same_module(a, b)
    assert b["head"].weight is b["emb"].weight
    assert sum(checkpoint.reads.values()) == 7 * 3 * 4, "tied bytes are read once"
    both = read_state(checkpoint)["m"]
    assert both["head.weight"] is both["emb.weight"]


def test_a_model_tied_in_the_target_only_needs_one_of_the_names() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["emb"].weight
    checkpoint = save({"m": {"emb.weight": torch.ones(7, 3)}})
    load_into({"m": model}, checkpoint)
    assert torch.equal(model["head"].weight, torch.ones(7, 3))


VIEWS = {
    "transposed": lambda: torch.arange(40.0).reshape(5, 8).t(),
    "strided": lambda: torch.arange(100.0)[::7],
    "flipped view": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "small view of a big storage": lambda: torch.arange(1_000_000.0)[5:8],
    "conj": lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
    "neg": lambda: torch.randn(5, dtype=torch.complex128).conj().imag,
    "real": lambda: torch.randn(5, dtype=torch.complex64).real,
    "0-dim": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0),
    "empty (0, 3)": lambda: torch.empty(0, 3, dtype=torch.int64),
    "nan and -0.0": lambda: torch.tensor([float("nan"), -0.0, float("inf")]),
    "requires grad": lambda: torch.ones(3, requires_grad=True),
    "non-leaf": lambda: torch.ones(3, requires_grad=True) * 2,
}


def bits(t: torch.Tensor) -> bytes:
    return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())
def test_what_is_visible_of_a_view_is_stored_and_comes_back(make: Any) -> None:
    original = make()
    checkpoint = save({"x": original})
    assert checkpoint.shards[0].pieces[0].size_bytes == original.numel() * original.element_size()
    back = read_state(checkpoint)["x"]
    assert (back.shape, back.dtype) == (original.shape, original.dtype)
    assert bits(back) == bits(original)

    target = {"x": torch.empty_like(original).detach()}
    target["x"].zero_()
    load_into(target, checkpoint)
    assert bits(target["x"]) == bits(original)


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())
def test_a_view_is_filled_through_when_it_is_the_target(make: Any) -> None:
    target = make().detach()
    values = torch.randn(target.shape).to(target.dtype)
    state = {"x": target}
    load_into(state, save({"x": values}))
    assert torch.equal(state["x"], values)


def test_the_rest_of_a_storage_is_left_alone_when_a_view_is_the_target() -> None:
    storage = torch.zeros(10)
    load_into({"x": storage[3:6]}, save({"x": torch.ones(3)}))
    assert storage.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_comes_back_bit_for_bit(name: str) -> None:
    dtype = getattr(torch, name)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2, (7 * size,), dtype=torch.uint8)
    original = raw.view(dtype)
    back = read_state(save({"x": original}))["x"]
    assert dtype_name(back.dtype) == name
    assert torch.equal(back.view(torch.uint8), raw)


@pytest.mark.parametrize("chunk_elements", [1024, 4096])
def test_tensors_of_many_chunks_come_back(chunk_elements: int) -> None:
    state = {"big": torch.randn(123, 457), "small": torch.randn(3)}
    checkpoint = save(state, chunk_elements=chunk_elements)
    target = {"big": torch.zeros(123, 457), "small": torch.zeros(3)}
    report = load_into(target, checkpoint, threads=3)
    assert torch.equal(target["big"], state["big"])
    assert report.bytes_by_source == {"local": (123 * 457 + 3) * 4}


def grid_checkpoint(full: torch.Tensor, cuts: list[list[int]]) -> MemoryCheckpoint:
    """``full`` stored in boxes between the given cuts, one rank per box."""
    from itertools import pairwise, product

    from ckptstore.dcp.binder import Binder
    from ckptstore.dcp.planner import Claim, plan_of
    from ckptstore.dcp.prepare import Prepared

    edges = [[0, *sorted(set(c)), n] for c, n in zip(cuts, full.shape, strict=True)]
    boxes = list(product(*[list(pairwise(e)) for e in edges]))
    bindings = []
    for box in boxes:
        part = full[tuple(slice(a, b) for a, b in box)]
        binding = Binder().bind({"x": part})
        (bound,) = binding.tensors
        bound.global_shape = tuple(full.shape)
        bound.offsets = tuple(a for a, _ in box)
        bindings.append(binding)
    claims = [
        ([Claim(t.name, t.dtype, t.global_shape, t.offsets, t.shape, t.size_bytes, t.kind, t.is_empty)], {})
        for binding in bindings
        for t in binding.tensors
    ]
    shards = [
        shard_of(Prepared(b, plan_of(claims, r, b), True), rank=r, world_size=len(boxes))
        for r, b in enumerate(bindings)
    ]
    return MemoryCheckpoint(shards)


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 60), min_size=1, max_size=3)))
    cuts = [draw(st.lists(st.integers(1, n - 1), max_size=2)) if n > 1 else [] for n in shape]
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return shape, cuts, offsets, extent


@settings(max_examples=60, deadline=None)
@given(grids(), st.booleans())
def test_any_box_is_filled_from_any_grid_of_pieces(grid: Any, transposed: bool) -> None:
    from ckptstore.dcp.boxes import Box
    from ckptstore.dcp.loader import fill
    from ckptstore.dcp.parts import Slot

    shape, cuts, offsets, extent = grid
    full = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
    checkpoint = grid_checkpoint(full, cuts)
    local = torch.full(extent[::-1] if transposed else extent, -1, dtype=torch.int32)
    local = local.permute(*reversed(range(local.dim()))) if transposed else local
    fill([Slot("x", "x", Box(local, shape, offsets, extent))], checkpoint, threads=1)
    assert torch.equal(local, full[tuple(slice(o, o + e) for o, e in zip(offsets, extent, strict=True))])


def test_only_the_rows_wanted_are_read_when_a_piece_is_larger() -> None:
    from ckptstore.dcp.boxes import Box
    from ckptstore.dcp.loader import fill
    from ckptstore.dcp.parts import Slot

    checkpoint = save({"x": torch.arange(64 * 1024.0).reshape(64, 1024)}, chunk_elements=1024)
    local = torch.empty(4, 1024)
    assert fill([Slot("x", "x", Box(local, (64, 1024), (8, 0), (4, 1024)))], checkpoint) == {"local": 4 * 1024 * 4}
    assert local[0, 0] == 8 * 1024


@pytest.mark.parametrize("was_on", [True, False])
def test_no_garbage_is_collected_while_loading_and_all_is_as_before_when_it_ends(was_on: bool) -> None:
    seen: list[bool] = []

    class Told:
        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            seen.append(gc.isenabled())
            if state["n"] != 1:
                raise ValueError("another state")

    checkpoint = save({"told": Told()})
    try:
        gc.enable() if was_on else gc.disable()
        load_into({"told": Told()}, checkpoint)
        assert (seen, gc.isenabled()) == ([False], was_on)
        with pytest.raises(KeyError):
            load_into({"told": Told(), "more": 1}, checkpoint)
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


def test_damage_names_the_parameter_and_what_was_changed() -> None:
    model = nn.Linear(3, 3)
    checkpoint = save({"m": model, "x": torch.ones(2)})
    (piece,) = [p for p in checkpoint.shards[0].pieces if p.fqn == "m.weight"]
    image = bytearray(checkpoint.images[0])
    image[piece.start] ^= 1
    checkpoint.images[0] = bytes(image)
    with pytest.raises(IntegrityError, match=r"m\.weight") as caught:
        load_into({"m": model, "x": torch.zeros(2)}, checkpoint)
    assert "m.weight" in caught.value.context["changed"]


def test_a_checkpoint_with_a_hole_is_said_to_be_incomplete() -> None:
    checkpoint = grid_checkpoint(torch.arange(10), [[5]])
    checkpoint.shards[1] = checkpoint.shards[1].model_copy(update={"pieces": ()})
    with pytest.raises(IncompleteCheckpointError, match="x"):
        load_into({"x": torch.zeros(10, dtype=torch.int64)}, checkpoint)


@dataclass
class Ema:
    decay: float
    shadow: torch.Tensor


def test_tensors_inside_other_objects_come_back() -> None:
    state = {"ema": Ema(0.9, torch.arange(3.0)), "array": np.arange(4), "plain": {"deep": Ema(0.5, torch.ones(2))}}
    checkpoint = save(state)
    target: dict[str, Any] = {"ema": None, "array": None, "plain": {"deep": None}}
    load_into(target, checkpoint)
    assert target["ema"].decay == 0.9
    assert torch.equal(target["ema"].shadow, torch.arange(3.0))
    assert np.array_equal(target["array"], np.arange(4))
    assert torch.equal(target["plain"]["deep"].shadow, torch.ones(2))


def test_read_gives_equal_values_types_and_order() -> None:
    state: dict[Any, Any] = {
        "z": 1,
        "a": (1, [2.5, None], {"k": b"x"}),
        3: {True: "yes"},
        "t": {"x": torch.tensor(1), "y": [torch.zeros(1)]},
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
    }
    back = read_state(save(copy.deepcopy(state)))
    assert back == state
    assert list(back) == list(state)
    assert type(back["a"]) is tuple
    assert type(back["size"]) is torch.Size


def test_read_takes_only_what_is_asked_for() -> None:
    model = net()
    checkpoint = save({"model": model, "x": torch.ones(3), "epoch": 3})
    back = read_state(checkpoint, only=["model.0.*", "epoch"])
    assert back.keys() == {"model", "epoch"}
    assert back["model"].keys() == {"0.weight", "0.bias"}
    assert set(checkpoint.reads) == {"model.0.weight", "model.0.bias"}


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


def test_a_registered_type_comes_back() -> None:
    register_type(Celsius, name="celsius", encode=lambda c: c.degrees, decode=Celsius)
    target: dict[str, Any] = {"t": None}
    load_into(target, save({"t": Celsius(3.5)}))
    assert target["t"].degrees == 3.5


def test_a_generator_continues_its_stream_in_place() -> None:
    generator = torch.Generator().manual_seed(3)
    checkpoint = save({"g": generator})
    expected = torch.rand(4, generator=generator)
    fresh = torch.Generator()
    load_into({"g": fresh}, checkpoint)
    assert torch.equal(torch.rand(4, generator=fresh), expected)


def test_preparing_in_one_process_needs_no_process_group() -> None:
    prepared = Preparer(Agreement()).prepare({"x": torch.ones(3)}, step=1, counter=1, flags={"busy": True})
    assert prepared.flags == {"busy"}
    assert [piece.fqn for piece in prepared.plan.pieces] == ["x"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_default_device_changes_nothing() -> None:
    rows = [torch.ones(2), torch.ones(3)]
    state: dict[str, Any] = {
        "plain": torch.arange(3.0),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor(rows),
        "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
        "array": np.arange(20_000.0),
    }
    with torch.device("meta"):  # as with set_default_device("cuda")
        checkpoint = save(state)
        read, target = read_state(checkpoint), dict.fromkeys(state)
        load_into(target, checkpoint)
    assert_same(state, read)
    assert_same(state, target)
