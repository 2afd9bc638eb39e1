"""The state tree: what the standard library brings goes in and comes out, or is refused by key."""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import random
import struct
import threading
import time as clock
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from ckptstore.errors import FormatError, StateError
from ckptstore.format import tree
from ckptstore.format.manifest import ShardManifest, canonical


def nan_with(payload: int) -> float:
    (value,) = struct.unpack(">d", struct.pack(">Q", 0x7FF0000000000000 | payload))
    return float(value)


SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**53, -(2**53), 2**53 + 1, -(2**63), 2**64, 10**400, -(7**5000),
    0.0, -0.0, 1.0, 0.1, 1e16, 1e22, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, -math.nan,
    nan_with(0x8000000000001), nan_with(1), nan_with(0xFFFFFFFFFFFFF),
    1j, complex(-0.0, math.nan), complex(math.inf, -0.0),
    "", "plain", "é 漢字 😀", "\x00\n\u2028\"\\", "\ud800 alone", "~", "~tilde", b"", b"\x00\xff~", bytearray(b"ab"),
]  # fmt: skip

CONTAINERS: list[Any] = [
    [], [1, 2.5, "x", None, True], [[], [[]]], [1, 1.0, True], (), (1,), ((1, (2,)), [3]),
    set(), {1, "1", 1.5, None, (1, 2), b"x"}, frozenset({frozenset({1}), frozenset()}), {math.nan},
    deque([1, 2], maxlen=5), deque([3]), deque(maxlen=0),
    {}, {"b": 1, "a": 2}, {"a": 1, "b": 2}, {"": 1, ".": 2, "a.b": 3, "~": 4, "~~": 5, "~x": 6, "é": 7, "/": 8},
    {"v": 1, "~": [1, 0]}, {"~": "tuple", "v": [1]}, {"version": 2, "tree": 3}, {"a\ud800": 1, "b": 2},
    {2: "b", 1: "a"}, {1: 1, "1": 2, (1,): 3, None: 4, b"1": 5, "True": 6}, {True: 1, False: 2}, {0: 1, 1: 2},
    {0.5: 1, -0.0: 2, math.inf: 3, math.nan: 4}, {(1, ("a", None)): 1, frozenset({1}): 2}, {2**80: 1},
    {i: {str(i): i} for i in range(20)},
    OrderedDict([("z", 1), ("a", [2])]), OrderedDict(), OrderedDict([(3, 1), ("3", 2)]),
    defaultdict(list, {"b": [1], "a": []}), defaultdict(None, {1: 2}), defaultdict(int), defaultdict(Counter),
    Counter("hello"), Counter({"a": -1, 2: 0}), MappingProxyType({"b": 1, "a": (2,)}),
    range(5), range(5, -3, -2), range(0), range(2**70, 2**71), slice(None), slice(1, None, 2), slice("a", 1.5, None),
    argparse.Namespace(lr=0.1, betas=(0.9, 0.999), name=None), SimpleNamespace(b=1, a=SimpleNamespace()),
]  # fmt: skip

LEAVES: list[Any] = [
    datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001 - naive on purpose
    datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime.max.replace(tzinfo=timezone.utc), datetime(1, 1, 1, tzinfo=timezone.utc),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-5, minutes=-30), "EST")),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(seconds=1, microseconds=2))),
    date(1, 1, 1), date(2026, 12, 31), time(0), time(23, 59, 59, 999999, tzinfo=timezone.utc, fold=1),
    timedelta(), timedelta(days=-3, microseconds=5), timedelta.max, timezone.utc, timezone(timedelta(0), "Z"),
    ZoneInfo("UTC"), ZoneInfo("America/Argentina/Buenos_Aires"),
    Decimal("0.1"), Decimal("-0"), Decimal("1.10"), Decimal("1E+999999"), Decimal("NaN123"), Decimal("-sNaN"),
    Decimal("Infinity"),
    Fraction(1, 3), Fraction(-(10**30), 7), Fraction(0), UUID("12345678-1234-5678-1234-567812345678"),
    Path("/a/b.c"), Path("a"), Path(), Path("/tmp/\udcff"), PurePosixPath("a/b"), PureWindowsPath(r"C:\a\b"),
    random.Random(3),
]  # fmt: skip


@pytest.mark.parametrize("value", [*SCALARS, *CONTAINERS, *LEAVES], ids=lambda v: type(v).__name__)
def test_value_comes_back_unchanged_when_stored(value: Any, through_json: Any, assert_same: Any) -> None:
    assert_same(value, through_json(value))
    assert_same({"k": [value]}, through_json({"k": [value]}))


def test_random_generator_continues_when_stored(through_json: Any) -> None:
    generator = random.Random(7)
    generator.gauss(0, 1)  # holds the second half of a pair
    copy = through_json(generator)
    assert [copy.gauss(0, 1), copy.random(), copy.getrandbits(99)] == [
        generator.gauss(0, 1), generator.random(), generator.getrandbits(99),
    ]  # fmt: skip


def test_hashable_value_comes_back_when_it_is_a_key(through_json: Any, assert_same: Any) -> None:
    unhashable = (bytearray, random.Random)
    for key in [*SCALARS, *LEAVES, (1, 2.0), range(3)]:
        if isinstance(key, unhashable) or (isinstance(key, Decimal) and key.is_snan()):
            continue
        assert_same({key: 1, "other": 2}, through_json({key: 1, "other": 2}))


def test_plain_state_is_readable_when_encoded() -> None:
    node = tree.encode({"epoch": 3, "losses": [1.5, 0.25], "name": "run", "opt": {"lr": 0.1, "betas": [0.9, 0.99]}})
    assert node == {
        "version": 1,
        "tree": {
            "epoch": 3,
            "losses": [1.5, 0.25],
            "name": "run",
            "opt": {"lr": 0.1, "betas": [0.9, 0.99], "~": [1, 0]},
        },
    }


def test_equal_sets_are_equal_bytes_when_built_in_another_order() -> None:
    names = [f"layer.{i}" for i in range(50)]
    other = sorted(names, reverse=True)
    assert canonical(tree.encode(set(names))) == canonical(tree.encode(set(other)))


def test_encoding_is_a_snapshot_when_the_state_changes_afterwards() -> None:
    state = {"losses": [1.0, 2.0], "seen": {"a": bytearray(b"x")}}
    node = tree.encode(state)
    before = canonical(node)
    state["losses"].append(3.0)  # type: ignore[attr-defined]
    state["seen"]["a"][0] = 0  # type: ignore[index]
    assert canonical(node) == before


def test_long_history_is_encoded_fast_when_it_is_plain_numbers() -> None:
    history = [i * 0.1 for i in range(100_000)]
    for values in (history, list(range(100_000)), [*history[1:], math.nan]):
        assert min(_seconds(lambda v=values: tree.encode({"loss": v})) for _ in range(5)) < 0.05  # type: ignore[misc]


def _seconds(run: Any) -> float:
    start = clock.thread_time()
    run()
    return clock.thread_time() - start


def test_tree_survives_the_manifest_when_as_deep_as_allowed(assert_same: Any) -> None:
    value: Any = 1.5
    for _ in range(98):
        value = {(1,): value}
    node = tree.encode({"deep": value})
    shard = ShardManifest(
        save_id="000000000000-1",
        step=1,
        rank=0,
        world_size=1,
        file="__0_0.distcp",
        file_bytes=0,
        chunk_elements=1,
        tree=node,
    )
    again = ShardManifest.decode(shard.encode(), what="shard").tree
    assert again is not None
    assert_same({"deep": value}, tree.decode(again, lambda ref: ref))


# --- leaf callback ----------------------------------------------------------------------------------------------------


class Tensor:
    """Stands for whatever the caller stores elsewhere."""


def test_references_come_back_to_the_caller_when_decoded() -> None:
    weight, rng = Tensor(), Tensor()
    state = {"model": {"w": weight, "n": 3}, "list": [weight, (rng,)], "rng": rng}

    def leaf(path: tree.Path, value: object) -> object:
        if value is weight:
            return tree.TensorRef(".".join(map(str, path)))
        return tree.PerRankRef("rng") if value is rng else value

    node = json.loads(canonical(tree.encode(state, leaf)))
    assert tree.tensor_names(node) == ["model.w", "list.0"]
    decoded = tree.decode(node, lambda ref: ref)
    assert decoded == {
        "model": {"w": tree.TensorRef("model.w"), "n": 3},
        "list": [tree.TensorRef("list.0"), (tree.PerRankRef("rng"),)],
        "rng": tree.PerRankRef("rng"),
    }


def test_replacement_is_walked_when_leaf_gives_another_value() -> None:
    module, weight = UserDict(), Tensor()
    seen: list[tree.Path] = []

    def leaf(path: tree.Path, value: object) -> object:
        seen.append(path)
        if value is module:
            return {"w": weight}
        return tree.TensorRef("m.w") if value is weight else value

    assert tree.encode({"m": module, 1: "scalar"}, leaf)["tree"]["v"] == [
        "m",
        {"w": {"~": "tensor", "v": "m.w"}},
        1,
        "scalar",
    ]
    assert seen == [(), ("m",), ("m", "w")]


def test_callback_is_not_asked_when_a_value_is_a_key_or_in_a_set() -> None:
    seen: list[object] = []

    def leaf(path: tree.Path, value: object) -> object:
        seen.append(value)
        return value

    state = {(1, (2,)): {b"a"}, "n": [(3,)]}
    tree.encode(state, leaf)
    assert seen == [state, {b"a"}, [(3,)], (3,)]


def test_array_is_made_of_the_tensor_when_it_was_stored_as_one() -> None:
    node = tree.encode({"buffer": tree.ArrayRef("replay.buffer")})
    assert tree.tensor_names(node) == ["replay.buffer"]
    decoded = tree.decode(node, lambda ref: [[1, 2], [3, 4]])
    assert decoded["buffer"].tolist() == [[1, 2], [3, 4]]
    assert list(tree.iter_leaves(node)) == [(("buffer",), tree.ArrayRef("replay.buffer"))]


def test_error_of_the_callback_passes_unchanged_when_decoding() -> None:
    node = tree.encode({"a": (tree.TensorRef("w"),)})

    def leaf(ref: object) -> object:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        tree.decode(node, leaf)


def test_each_entry_is_a_tree_of_its_own_when_taken_apart(assert_same: Any) -> None:
    state = {"b": (1, tree.TensorRef("w")), 2: {"x": None}, "a": 1.5}
    parts = tree.subtrees(json.loads(canonical(tree.encode(state))))
    assert_same(state, {key: tree.decode(part, lambda ref: ref) for key, part in parts.items()})
    with pytest.raises(FormatError, match="not a mapping"):
        tree.subtrees(tree.encode([1]))


# --- leaves as stock readers see them ---------------------------------------------------------------------------------


def test_leaves_are_those_of_stock_dcp_when_iterated() -> None:
    w = tree.TensorRef("w")
    state = OrderedDict(
        model={"w": w},
        opt={"state": {0: {"step": 1.0}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        plain=[1, [2, 3]],
        mixed=[1, [w]],
        hidden=(w, 1),
        rank=tree.PerRankRef("r"),
        empty={},
        when=date(2026, 1, 1),
    )
    leaves = dict(tree.iter_leaves(json.loads(canonical(tree.encode(state)))))
    hidden = leaves.pop(("hidden",))
    assert isinstance(hidden, tree.Opaque)
    assert list(leaves.items()) == [
        (("model", "w"), w),
        (("opt", "state", "0", "step"), 1.0),
        (("opt", "groups", 0, "lr"), 0.1),
        (("opt", "groups", 0, "betas"), (0.9, 0.99)),
        (("plain",), [1, [2, 3]]),
        (("mixed", 0), 1),
        (("mixed", 1, 0), w),
        (("rank",), tree.PerRankRef("r")),
        (("when",), date(2026, 1, 1)),
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


class MyDict(dict):  # type: ignore[type-arg]
    pass


class MyList(list):  # type: ignore[type-arg]
    pass


class MyStr(str):
    pass


class MyInt(int):
    pass


class Somewhere(tzinfo):
    def utcoffset(self, when: datetime | None) -> timedelta:
        return timedelta(hours=1)


def _generator() -> Any:
    yield 1


REFUSED: list[tuple[Any, str]] = [
    (lambda: 1, "code"), (len, "code"), (functools.partial(len, "a"), "code"), (_generator(), "generator"),
    (threading.Lock(), "lock"), (io.StringIO(), "StringIO"), (object(), "object"), (int, "class"), (MyDict, "class"),
    (MyDict(a=1), "MyDict is a subclass of dict"), (MyList([1]), "MyList is a subclass of list"),
    (MyStr("a"), "MyStr is a subclass of str"), (MyInt(1), "MyInt is a subclass of int"), (UserDict(a=1), "UserDict"),
    (memoryview(b"a"), "memoryview"), ({}.keys(), "dict_keys"), (iter([1]), "iterator"),
    (clock.localtime(), "struct_time"),
    (defaultdict(lambda: 1), "default_factory"), (defaultdict(MyDict), "default_factory"), (1 << (1 << 21), "bits"),
    (datetime(2026, 1, 1, tzinfo=Somewhere()), "Somewhere"), (ValueError("x"), "ValueError"), (..., "ellipsis"),
    (threading, "module"), (random.SystemRandom(), "SystemRandom"),
]  # fmt: skip


@pytest.mark.parametrize("value,word", REFUSED, ids=lambda v: type(v).__name__)
def test_refusal_names_key_and_type_when_a_value_has_no_stored_form(value: Any, word: str) -> None:
    with pytest.raises(StateError, match=word) as caught:
        tree.encode({"model": {"layers.0": [1, value]}})
    assert caught.value.context["key"] == "model.layers.0.1"
    assert "model.layers.0.1" in str(caught.value)
    if "bits" not in word:
        assert caught.value.hint


def test_refusal_when_a_key_has_no_stored_form() -> None:
    with pytest.raises(StateError, match="object"):
        tree.encode({"a": {object(): 1}})


def test_cycle_is_refused_when_a_container_holds_itself() -> None:
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(StateError, match=r"a\.1\.again.*itself"):
        tree.encode({"a": loop})


def test_shared_object_is_stored_twice_when_it_is_no_cycle(through_json: Any) -> None:
    shared = [1, [2]]
    back = through_json({"a": shared, "b": [shared, shared]})
    assert back == {"a": shared, "b": [shared, shared]}
    assert back["a"] is not back["b"][0]


def test_depth_is_bounded_when_encoding() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(StateError, match="100 levels"):
        tree.encode({"a": value})


def test_depth_limit_is_exact_when_encoding_and_decoding(through_json: Any) -> None:
    def nested(levels: int) -> Any:
        value: Any = 1
        for _ in range(levels):
            value = (value,)
        return value

    assert through_json(nested(100)) == nested(100)
    with pytest.raises(StateError, match="deeper than 100 levels"):
        tree.encode(nested(101))
    node = tree.encode(nested(100))
    for _ in range(2):
        node["tree"] = [node["tree"]]
    with pytest.raises(FormatError, match="deeper than 100 levels"):
        tree.decode(node, lambda ref: ref)


def test_large_bytes_are_refused_when_a_tensor_would_do() -> None:
    with pytest.raises(StateError, match="store it as a tensor") as caught:
        tree.encode({"blob": bytes(32 * 1024 * 1024 + 1)})
    assert caught.value.context["key"] == "blob"


def test_number_of_values_is_bounded_when_shared_lists_multiply() -> None:
    bomb: list[Any] = [0] * 1000
    for _ in range(4):
        bomb = [bomb] * 1000
    with pytest.raises(StateError, match="values"):
        tree.encode({"bomb": bomb})


def test_newer_version_is_refused_when_read() -> None:
    with pytest.raises(FormatError, match="version 2") as caught:
        tree.decode({"version": 2, "tree": {}}, lambda ref: ref)
    assert caught.value.hint == "upgrade ckptstore"
