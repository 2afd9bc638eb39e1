"""Values that aren't tensors, as stock readers see them."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.format import tree
from ckptstore.format.manifest import canonical
from ckptstore.format.pickling import NoPickleFormError, dumps
from ckptstore.format.stock import stock_items
from ckptstore.format.stock_items import named_leaves
from ckptstore.format.tree import Opaque, PerRankRef, TensorRef

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**3000), max_value=2**3000)
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.complex_numbers()
)
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4).map(OrderedDict)
        | st.sets(hashable, max_size=4)
        | st.lists(inner, max_size=3).map(deque)
    ),
    max_leaves=20,
)


def encoded(value: object) -> dict[str, Any]:
    """The tree of a value, as it comes back from a manifest on disk."""
    return json.loads(canonical(tree.encode(value, lambda _, item: item)))  # type: ignore[no-any-return]


def as_seen(value: Any) -> str:
    """A text that tells apart what == does not: types, signs of zero, NaN, order of mappings."""
    if isinstance(value, dict):
        return f"{type(value)}{[(as_seen(k), as_seen(v)) for k, v in value.items()]}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value)}{sorted(map(as_seen, value))}"
    if isinstance(value, (list, tuple, deque)):
        return f"{type(value)}{[as_seen(v) for v in value]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes()!r}"
    return f"{type(value)}{value!r}"


@given(values)
def test_values_come_back_when_unpickled(value: object) -> None:
    assert as_seen(pickle.loads(dumps(value))) == as_seen(value)


@given(values)
def test_pickles_are_the_same_when_equal_objects_are_not_identical(value: object) -> None:
    assert dumps([value, value]) == dumps([value, pickle.loads(pickle.dumps(value))])


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"\x00\xff"),
        Counter("abca"),
        defaultdict(list, {1: [2]}),
        deque([1, 2], maxlen=3),
        range(1, 9, 2),
        slice(None, 4),
        Decimal("1.10"),
        Fraction(2, 3),
        UUID(int=5),
        date(2026, 2, 3),
        datetime(2026, 2, 3, 4, 5, 6, 7),  # noqa: DTZ001 - a time without zone is the case
        datetime(2026, 2, 3, tzinfo=timezone.utc),
        datetime(2026, 2, 3, tzinfo=timezone(timedelta(hours=-3), "here")),
        timedelta(days=-1, microseconds=5),
        np.float32(0.1),
        np.int64(-5),
        np.bool_(True),
        np.complex128(1 - 2j),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 3), dtype=np.float16),
        np.array(1.5),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=lambda v: f"{type(v).__name__}-{v!r:.20}",
)
def test_types_of_the_library_and_of_numpy_load_as_torch_saves_them_when_in_a_tuple(value: object) -> None:
    items = stock_items(encoded({"a": (value,), "b": 1}))
    theirs = io.BytesIO()
    torch.save((value,), theirs)
    theirs.seek(0)

    loaded = torch.load(io.BytesIO(items["a"]), weights_only=False)

    assert as_seen(loaded) == as_seen(torch.load(theirs, weights_only=False))


def test_plain_values_load_when_torch_allows_weights_only() -> None:
    value = [None, True, -1, 2**70, 0.5, "text", b"\x00\xff", (1, 2, 3, 4), [], (), [[1], {"a": {1, 2}}]]
    items = stock_items(encoded({"a": (value, OrderedDict(x=1))}))

    loaded = torch.load(io.BytesIO(items["a"]), weights_only=True)

    assert as_seen(loaded) == as_seen((value, OrderedDict(x=1)))


def test_opcodes_are_those_of_torch_save_when_its_memo_is_set_aside() -> None:
    value = {"lr": 0.1, "betas": (0.9, 0.99), "n": 300, "big": 70_000, "neg": -1, "flags": [True, None]}
    (item,) = stock_items(encoded({"a": (value,)})).values()
    theirs = io.BytesIO()
    torch.save((value,), theirs)

    def values_and_calls(archive: io.BytesIO) -> list[Any]:
        pickled = zipfile.ZipFile(archive).read("archive/data.pkl")
        ignored = {"BINPUT", "LONG_BINPUT", "MARK", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}
        return [(op.name, arg) for op, arg, _ in pickletools.genops(pickled) if op.name not in ignored]

    assert values_and_calls(io.BytesIO(item)) == values_and_calls(theirs)


def test_items_are_the_same_when_the_hash_seed_differs() -> None:
    program = """
import hashlib
from ckptstore.format import stock, tree
state = {"names": {f"n{i}" for i in range(50)}, "t": (frozenset(map(str, range(20))), {("a", 1): 2})}
items = stock.stock_items(tree.encode(state, lambda _, v: v))
print(hashlib.sha256(repr(items).encode()).hexdigest())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    }

    assert len(outputs) == 1


@dataclass
class Settings:
    lr: float = 0.1


def test_leaves_without_a_stock_form_are_left_out_when_others_have_one() -> None:
    state = {
        "mine": Settings(),
        "zoned": datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        "rng": PerRankRef("rng"),
        "inside": [1, [2, Settings()]],
        "kept": 3,
    }

    assert list(stock_items(encoded(state))) == ["kept"]


@pytest.mark.parametrize(
    ("name", "content", "value"),
    [
        ("torch.dtype", "torch.bfloat16", torch.bfloat16),
        ("torch.device", "cuda:1", torch.device("cuda", 1)),
        ("torch.device", "cpu", torch.device("cpu")),
        ("torch.Size", [2, 3], torch.Size([2, 3])),
    ],
)
def test_torch_types_load_when_they_are_leaves(name: str, content: object, value: object) -> None:
    leaf = Opaque(name, {"~": "type", "name": name, "v": content})
    (item,) = stock_items(encoded({"a": leaf})).values()

    assert as_seen(torch.load(io.BytesIO(item), weights_only=True)) == as_seen(value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("torch.dtype", "torch.load"), ("torch.device", "cpu\nos"), ("torch.Size", ["x"]), ("torch.Generator", {"a": 1})],
)
def test_torch_types_are_left_out_when_damaged_or_not_plain(name: str, content: object) -> None:
    assert stock_items(encoded({"a": Opaque(name, {"~": "type", "name": name, "v": content})})) == {}


def test_tensors_are_no_items_when_they_stand_among_values() -> None:
    state = {"a": [TensorRef("a.0"), 5, "x"], "b": {"c": TensorRef("b.c")}, "d": [1, 2]}

    assert set(stock_items(encoded(state))) == {"a.1", "a.2", "d"}
    assert [(leaf.name, leaf.path) for leaf in named_leaves(encoded(state))] == [
        ("a.0", ("a", 0)),
        ("a.1", ("a", 1)),
        ("a.2", ("a", 2)),
        ("b.c", ("b", "c")),
        ("d", ("d",)),
    ]


def test_every_leaf_keeps_a_name_of_its_own_when_dotted_paths_collide() -> None:
    state = {
        "a.b": 1,
        "a": {"b": TensorRef("a.b")},
        "n": {1: "int", "1": "text"},
        "x.y": TensorRef("x.y"),
        "x": {"y": TensorRef('["x","y"]')},
    }

    leaves = {leaf.name: leaf for leaf in named_leaves(encoded(state))}
    items = stock_items(encoded(state))

    assert leaves["a.b"].tensor == "a.b"
    assert leaves["x.y"].path == ("x.y",)
    assert leaves['["x","y"]'].path == ('["x","y"]',)
    assert len(leaves) == 6
    loaded = {torch.load(io.BytesIO(data), weights_only=True) for data in items.values()}
    assert loaded == {1, "int", "text"}
    assert all(".".join(map(str, leaf.path)) == name for name, leaf in leaves.items())


def test_tensors_inside_a_tuple_stand_at_the_top_when_named() -> None:
    state = {"pair": (TensorRef("pair.0"), 1), "n": 2}

    leaves = {leaf.name: leaf.path for leaf in named_leaves(encoded(state)) if leaf.tensor}

    assert leaves == {"pair.0": ("pair.0",)}


@pytest.mark.parametrize("value", [object(), Settings(), np.array([None]), np.float32, type("L", (list,), {})([1])])
def test_unknown_types_are_refused_when_pickled(value: object) -> None:
    with pytest.raises(NoPickleFormError, match="no stock form"):
        dumps([1, value])


def test_numbers_keep_every_bit_when_they_are_odd() -> None:
    loaded = pickle.loads(dumps([-0.0, math.nan, math.inf, 255, 256, 65_535, 65_536, -(2**31), -(2**31) - 1, 2**63]))

    assert [math.copysign(1, loaded[0]), math.isnan(loaded[1]), *loaded[2:]] == [
        -1,
        True,
        math.inf,
        255,
        256,
        65_535,
        65_536,
        -(2**31),
        -(2**31) - 1,
        2**63,
    ]
