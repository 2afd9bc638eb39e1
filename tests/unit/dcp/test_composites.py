"""Tensors made of others: taken apart without a copy, filled in place, and trusted no more than any file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from memory_checkpoint import MemoryCheckpoint, save
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from ckptstore.dcp import assembly, composites
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state
from ckptstore.errors import FormatError, LoadMismatchError, StateError
from ckptstore.format.tree import Composite

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Copying(TwoTensor):
    """Its way back doesn't wrap what it is given."""

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return Copying(inner["a"].clone(), inner["b"].clone())


class Untrusted(TwoTensor):
    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Any:
        return Untrusted(inner["a"], inner["b"])


@pytest.fixture
def trusted() -> Any:
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([TwoTensor, Copying])
    yield
    torch.serialization.clear_safe_globals()  # safe_globals() would take away what others had added too
    torch.serialization.add_safe_globals(before)


LIVE = {
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "sparse_csc": lambda: torch.eye(3).to_sparse_csc(),
    "sparse_bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "flattened": lambda: TwoTensor(torch.ones(3), torch.zeros(3)),
}


@pytest.mark.parametrize("name", LIVE)
def test_parts_are_the_memory_of_the_tensor_and_of_what_is_put_together(name: str, trusted: Any) -> None:
    tensor = LIVE[name]()
    parts = composites.take_apart("x", tensor)
    again = composites.take_apart("x", assembly.put_together("x", parts))
    assert parts.kind == again.kind == name
    assert parts.facts == again.facts
    for key, part in parts.parts.items():
        assert (
            part.data_ptr() == composites.take_apart("x", tensor).parts[key].data_ptr() == again.parts[key].data_ptr()
        )


@pytest.mark.parametrize("name", LIVE)
def test_parts_are_filled_in_place_when_the_target_has_the_same_ones(name: str) -> None:
    holder, other = nn.Module(), nn.Module()
    holder.register_buffer("t", LIVE[name]())
    other.register_buffer("t", LIVE[name]())
    for part in composites.take_apart("t", other.t).parts.values():
        if part.is_floating_point() or part.dtype is torch.uint8:
            part.zero_()
    before = {k: p.data_ptr() for k, p in composites.take_apart("t", other.t).parts.items()}
    load_into({"m": other}, save({"m": holder}))
    after = composites.take_apart("t", other.t).parts
    assert {k: p.data_ptr() for k, p in after.items()} == before
    for key, part in composites.take_apart("t", holder.t).parts.items():
        assert torch.equal(part, after[key]), key


def test_a_buffer_keeps_its_identity_when_its_number_of_values_changes() -> None:
    holder, other = nn.Module(), nn.Module()
    holder.register_buffer("t", torch.eye(5).to_sparse())
    other.register_buffer("t", torch.zeros(5, 5).to_sparse())
    held = other.t
    load_into({"m": other}, save({"m": holder}))
    assert other.t is held
    assert torch.equal(held.to_dense(), torch.eye(5))


def test_a_wrapped_parameter_is_filled_in_place_and_stays_a_parameter() -> None:
    def module(value: float) -> nn.Module:
        made = nn.Linear(3, 2, bias=False)
        made.weight = nn.Parameter(TwoTensor(torch.full((2, 3), value), torch.full((2, 3), value + 1)))
        return made

    source, target = module(1.0), module(5.0)
    weight, inner = target.weight, target.weight.a
    load_into({"m": target}, save({"m": source}))
    assert target.weight is weight
    assert target.weight.a is inner
    assert torch.equal(weight.a, source.weight.a)
    assert torch.equal(weight.b, source.weight.b)


@pytest.mark.parametrize("target", ["fresh", "stepped"])
def test_moments_of_an_optimizer_may_be_composite(target: str, trusted: Any) -> None:
    """8-bit optimizers keep their moments in wrapper tensors."""

    class Packed(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        def step(self) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["moment"] = TwoTensor(torch.rand_like(p), torch.rand_like(p))

    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer, resumed = Packed(source.parameters()), Packed(model.parameters())
    optimizer.step()
    if target == "stepped":
        resumed.step()
    load_into({"m": model, "o": resumed}, save({"m": source, "o": optimizer}))
    for ours, theirs in zip(source.parameters(), model.parameters(), strict=True):
        moment = resumed.state[theirs]["moment"]
        assert type(moment) is TwoTensor
        assert torch.equal(moment.a, optimizer.state[ours]["moment"].a)
        assert torch.equal(moment.b, optimizer.state[ours]["moment"].b)


# -- what a file may do ------------------------------------------------------------------------------------------------


def test_a_class_is_rebuilt_only_if_somebody_said_so_or_the_target_has_one() -> None:
    checkpoint = save({"x": Untrusted(torch.ones(2), torch.zeros(2))})
    with pytest.raises(FormatError, match=r"'x' .*nobody said") as caught:
        read_state(checkpoint)
    assert "add_safe_globals" in str(caught.value.hint)
    with pytest.raises(FormatError, match="nobody said"):
        load_into({"x": None}, checkpoint)
    target = {"x": Untrusted(torch.zeros(2), torch.ones(2))}
    load_into(target, checkpoint)
    assert torch.equal(target["x"].a, torch.ones(2))


def test_a_class_whose_way_back_copies_is_an_error_not_garbage(trusted: Any) -> None:
    checkpoint = save({"x": Copying(torch.ones(2), torch.zeros(2))})
    with pytest.raises(FormatError, match="does not wrap"):
        load_into({"x": None}, checkpoint)


def test_a_class_defined_inside_a_function_is_refused_by_key() -> None:
    class Local(TwoTensor):
        pass

    with pytest.raises(StateError, match=r"deep\.x"):
        save({"deep": {"x": Local(torch.ones(2), torch.zeros(2))}})


def _with_facts(checkpoint: MemoryCheckpoint, **facts: Any) -> MemoryCheckpoint:
    node = copy.deepcopy(checkpoint.tree)
    node["tree"]["x"]["facts"].update(facts)
    checkpoint.tree = node
    return checkpoint


def _with_values(checkpoint: MemoryCheckpoint, name: str, tensor: torch.Tensor) -> MemoryCheckpoint:
    """What a forger would do: other bytes, and digests that fit them."""
    from ckptstore.format.manifest import digest

    shard = checkpoint.shards[0]
    pieces = list(shard.pieces)
    (i,) = [i for i, piece in enumerate(pieces) if piece.fqn == name]
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    image = bytearray(checkpoint.images[0])
    image[pieces[i].start : pieces[i].start + len(data)] = data
    checkpoint.images[0] = bytes(image)
    pieces[i] = pieces[i].model_copy(update={"digests": (digest(data),)})
    checkpoint.shards[0] = shard.model_copy(update={"pieces": tuple(pieces)})
    return checkpoint


def coo() -> MemoryCheckpoint:
    return save({"x": torch.eye(3).to_sparse()})


def csr() -> MemoryCheckpoint:
    return save({"x": torch.eye(3).to_sparse_csr()})


def jagged() -> MemoryCheckpoint:
    return save({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)})


def nested() -> MemoryCheckpoint:
    return save({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})


def quantized() -> MemoryCheckpoint:
    return save({"x": torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8)})


DAMAGED = {
    "coo index outside": lambda: _with_values(coo(), "x.indices", torch.full((2, 3), 1 << 40)),
    "coo negative index": lambda: _with_values(coo(), "x.indices", torch.full((2, 3), -1)),
    "coo not coalesced": lambda: _with_values(coo(), "x.indices", torch.zeros(2, 3, dtype=torch.int64)),
    "coo smaller than its indices": lambda: _with_facts(coo(), size=[1, 1]),
    "coo of other dimensions": lambda: _with_facts(coo(), size=[3]),
    "coo size of text": lambda: _with_facts(coo(), size="3"),
    "csr column outside": lambda: _with_values(csr(), "x.col_indices", torch.tensor([0, 1, 99])),
    "csr rows outside": lambda: _with_values(csr(), "x.crow_indices", torch.tensor([0, 1, 2, 77])),
    "jagged offsets outside": lambda: _with_values(jagged(), "x.offsets", torch.tensor([0, 2, 4096])),
    "jagged offsets backwards": lambda: _with_values(jagged(), "x.offsets", torch.tensor([0, 9, 5])),
    "nested beyond its values": lambda: _with_facts(nested(), sizes=[[2], [3000]]),
    "nested at an offset outside": lambda: _with_facts(nested(), offsets=[0, 4]),
    "nested of a negative size": lambda: _with_facts(nested(), sizes=[[2], [-3]]),
    "quantized larger than its bytes": lambda: _with_facts(quantized(), size=[8000]),
    "quantized of no dtype": lambda: _with_facts(quantized(), dtype="load"),
    "quantized of a plain dtype": lambda: _with_facts(quantized(), dtype="float32"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("way", ["read", "load"])
def test_a_lie_about_a_composite_is_an_error_naming_the_key(name: str, way: str) -> None:
    checkpoint = DAMAGED[name]()
    with pytest.raises(FormatError, match=r"\bx\b"):
        read_state(checkpoint) if way == "read" else load_into({"x": None}, checkpoint)


@pytest.mark.parametrize("kind", ["exotic", "load", ""])
def test_an_unknown_kind_is_an_error(kind: str) -> None:
    checkpoint = coo()
    node = copy.deepcopy(checkpoint.tree)
    node["tree"]["x"]["kind"] = kind
    checkpoint.tree = node
    with pytest.raises(FormatError, match="x"):
        read_state(checkpoint)


def test_both_sides_are_described_when_kinds_differ() -> None:
    with pytest.raises(LoadMismatchError, match=r"stored is sparse_csr .*target is sparse_coo"):
        load_into({"x": torch.eye(3).to_sparse()}, csr())


def test_a_description_says_what_shows_from_outside() -> None:
    assert composites.described(Composite("sparse_coo", {}, {"size": [3], "dtype": "int8"})) == "sparse_coo (int8, [3])"
