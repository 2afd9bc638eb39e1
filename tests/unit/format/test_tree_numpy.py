"""NumPy in the state tree: every fixed dtype, memory order, scalars and generators come back bit for bit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from ckptstore.errors import FormatError, StateError
from ckptstore.format import tree

ALIGNED = np.dtype([("a", "u1"), ("b", "<f8")], align=True)
NESTED = np.dtype([("id", "<i4"), ("pos", "<f4", (3,)), ("sub", [("x", ">u2"), ("y", "S3")])])
HOLES = np.dtype({"names": ["a", "b"], "formats": ["<i2", "<M8[s]"], "offsets": [4, 8], "itemsize": 24})
SQUARE = np.arange(12, dtype=np.float32).reshape(3, 4)

ARRAYS: list[Any] = [
    *(np.arange(5).astype(code) for code in "?bBhHiIlLqQefdgFDG"),
    *(np.array([1, 2**15, 3]).astype(code) for code in (">i4", "<i4", ">f8", ">c16", ">u2")),
    np.array([np.nan, -np.inf, -0.0, 5e-324]), np.array([b"ab", b"c\x00"]), np.array(["é", "😀😀"]),
    np.array(["2026-01-01", "NaT"], "M8[D]"), np.array([1, -2], "m8[ns]"), np.array([1], "M8[25s]"),
    np.array(["NaT"], "m8"),
    np.array([b"ab\x00\x01"], "V4"), np.zeros(3, ALIGNED), np.ones(2, NESTED), np.zeros(2, HOLES),
    np.float64(3) * np.ones(()), np.array(7), np.zeros((0,)), np.zeros((0, 3)), np.zeros((2, 0, 4), "<i8"),
    SQUARE.T, SQUARE[::2, ::-1], np.asfortranarray(SQUARE), np.broadcast_to(np.arange(3), (4, 3)), SQUARE[:, :1],
    np.array([1, "a", None, (1, 2), [3, [4]], np.float32(1)], dtype=object), np.array([[{1: 2}, {3}]], dtype=object),
    np.array([], dtype=object), np.array(None, dtype=object),
    np.asfortranarray(np.array([[1, "b"], [None, 2.5]], dtype=object)),
]  # fmt: skip

OTHERS: list[Any] = [
    *(np.dtype(code).type(1) for code in "?bBhHiIlLefdgFDG"),
    np.float32(0.1), np.float64("nan"), np.float64("-inf"), np.float64(-0.0), np.float16(65504), np.int64(2**63 - 1),
    np.uint64(2**64 - 1), np.int64(-(2**63)), np.complex64(complex(np.nan, -0.0)), np.longdouble(1) / 3,
    np.str_("a\x00"),
    np.bytes_(b"a\x00"), np.str_("\ud800"), np.datetime64("2026-01-01T00:00:00.5"), np.datetime64("NaT"),
    np.timedelta64(3, "h"),
    np.timedelta64(5), np.void(b"ab"), np.ones(1, NESTED)[0],
    [np.float64(i) / 3 for i in range(40)], [np.float32("nan")] * 20, [np.int64(2**62)] * 20, [np.int8(3)] * 17,
    [np.float64(1)] * 20 + [1.0], [np.bool_(True)] * 20, [np.datetime64(1, "s")] * 20, [np.longdouble(1)] * 20,
    np.dtype("f4"), np.dtype(">i8"), NESTED, ALIGNED, np.dtype(object), np.dtype("M8[ns]"), np.dtype(("<i4", (2, 3))),
    np.random.SeedSequence(5, spawn_key=(1, 2), pool_size=8), np.random.SeedSequence([2**40, 3]),
]  # fmt: skip

BITS = [np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64]


@pytest.mark.parametrize("value", [*ARRAYS, *OTHERS], ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}")
def test_numpy_value_comes_back_unchanged_when_stored(value: Any, through_json: Any, assert_same: Any) -> None:
    assert_same({"k": value}, through_json({"k": value}))


def test_array_is_writable_and_its_own_when_decoded(through_json: Any) -> None:
    array = np.arange(4)
    copy = through_json(array)
    copy[0] = 9
    assert array[0] == 0


@pytest.mark.parametrize("kind", BITS)
def test_generator_continues_and_spawns_the_same_when_stored(kind: Any, through_json: Any, assert_same: Any) -> None:
    generator = np.random.Generator(kind(3))
    generator.integers(10, size=7, dtype=np.int32)
    generator.spawn(2)
    copy = through_json(generator)
    assert_same(generator, copy)
    assert generator.normal(size=5).tolist() == copy.normal(size=5).tolist()
    assert generator.integers(9, size=9, dtype=np.int32).tolist() == copy.integers(9, size=9, dtype=np.int32).tolist()
    assert generator.spawn(1)[0].random() == copy.spawn(1)[0].random()
    assert_same(generator.bit_generator, through_json(generator.bit_generator))


def test_random_state_continues_when_stored(through_json: Any) -> None:
    state = np.random.RandomState(4)
    state.standard_normal()
    copy = through_json(state)
    assert state.standard_normal(3).tolist() == copy.standard_normal(3).tolist()
    legacy = np.random.RandomState(4).get_state()
    assert str(through_json(legacy)) == str(legacy)


def test_long_history_is_encoded_fast_when_it_is_numpy_scalars() -> None:
    history = [np.float64(i) for i in range(100_000)]
    seconds = []
    for _ in range(5):
        start = time.thread_time()
        node = tree.encode(history)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.05
    assert len(node["tree"]["v"]) == 100_000


def _deep_dtype() -> np.dtype[Any]:
    dtype: Any = np.dtype("i1")
    for _ in range(17):
        dtype = np.dtype([("a", dtype)])
    return dtype


REFUSED: list[tuple[Any, str]] = [
    (np.zeros(1, _deep_dtype()), "too large"), (np.dtype("S99999999"), "too large"),
    (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"), (np.zeros(2, [("a", object)]), "object fields"),
    (np.zeros(2, [("a", object)])[0], "object fields"), (np.array([1, 2]).view(np.recarray), "recarray"),
    (np.zeros(2, np.dtype("i4", metadata={"x": 1})), "metadata"),
    (np.zeros(33 << 20, np.uint8), "store it as a tensor"),
    (np.dtype([(("title", "a"), "i4")]), "title"), (np.array([object()], dtype=object), "no stored form"),
    (np.random.RandomState(np.random.PCG64(1)), "numpy.random.Generator"), (np.add, "ufunc"),
    (np.nditer([1]), "nditer"),
]  # fmt: skip


@pytest.mark.parametrize("value,word", REFUSED, ids=lambda v: type(v).__name__)
def test_numpy_value_is_refused_by_key_when_its_bytes_say_not_all(value: Any, word: str) -> None:
    with pytest.raises(StateError, match=word) as caught:
        tree.encode({"env": {"obs": value}})
    assert caught.value.context["key"].startswith("env.obs")


def test_string_dtype_is_refused_when_numpy_has_it() -> None:
    if not hasattr(np.dtypes, "StringDType"):
        pytest.skip("NumPy 1")
    with pytest.raises(StateError, match="to a list"):
        tree.encode(np.array(["a"], dtype=np.dtypes.StringDType()))


A = {"~": "np.array", "shape": [1], "dtype": "<i4", "v": "AAAAAA=="}
MT = {"~": "dict", "v": []}
HOSTILE: list[Any] = [
    A | {"shape": [2]}, A | {"shape": [-1]}, A | {"shape": [2**40, 2**40]}, A | {"shape": "x"}, A | {"shape": [1] * 65},
    A | {"shape": [True]}, A | {"dtype": "object"}, A | {"dtype": "|O"}, A | {"dtype": "i4,i4"},
    A | {"dtype": "<f4(2,3)"},
    A | {"dtype": "|V0", "v": "", "shape": [10**12]}, A | {"dtype": "|S99999999", "v": "", "shape": [0]},
    A | {"dtype": {"of": "<i2", "shape": [2]}}, A | {"dtype": {"of": "<i2", "shape": [2**30, 2**30]}},
    A | {"order": "K"},
    A | {"dtype": {"fields": [["a", "<i4", 10**6]], "size": 4, "aligned": False}}, A | {"dtype": 5},
    A | {"dtype": "int32"}, A | {"dtype": "=i4"}, A | {"dtype": "<i4 "},
    A | {"dtype": "<q99"},
    A | {"dtype": {"fields": [["a", "<i4", 0], ["a", "<i4", 0]], "size": 4, "aligned": False}}, A | {"v": "AAAAAA"},
    A | {"dtype": {"fields": [["a", {"of": "|O", "shape": [1]}, 0]], "size": 8, "aligned": False}}, A | {"extra": 1},
    A | {"dtype": "O", "v": [1, 2]}, A | {"dtype": "O", "v": [], "shape": [0, 2**48, 2**48]}, A | {"dtype": "O"},
    {"~": "np.scalar", "dtype": "<i4", "v": "AA=="}, {"~": "np.scalar", "dtype": "<i4", "v": 1.5},
    {"~": "np.scalar", "dtype": "|u1", "v": 300}, {"~": "np.scalar", "dtype": "U", "v": 1}, {"~": "np.scalar"},
    {"~": "np.list", "dtype": "|O", "v": [1]}, {"~": "np.list", "dtype": "<i8", "v": ["a"]},
    {"~": "np.list", "dtype": "<i8", "v": "AA=="},
    {"~": "np.bits", "kind": "MT19937", "state": MT}, {"~": "np.bits", "kind": "RandomState", "state": {}},
    {"~": "np.Generator", "v": 5}, {"~": "np.RandomState", "v": {}}, {"~": "np.RandomState", "v": 3},
    {"~": "np.SeedSequence", "v": {"entropy": 1, "pool_size": 10**9, "spawn_key": [], "n_children_spawned": 0}},
    {"~": "np.SeedSequence", "v": {"entropy": "0x", "pool_size": 4, "spawn_key": [], "n_children_spawned": 0}},
    {"~": "np.unknown"}, {"~": "np."},
]  # fmt: skip


@pytest.mark.parametrize("node", HOSTILE, ids=lambda n: str(n)[:60])
def test_node_is_a_format_error_when_it_lies_about_numpy(node: Any) -> None:
    with pytest.raises(FormatError):
        tree.decode({"version": 1, "tree": {"k": node}}, lambda ref: ref)


@pytest.mark.parametrize("kind,field,wrong", [
    ("MT19937", "pos", 625), ("MT19937", "pos", -1), ("Philox", "buffer_pos", 5), ("Philox", "buffer_pos", 10**9),
    ("PCG64", "uinteger", 1 << 33), ("SFC64", "has_uint32", 2),
])  # fmt: skip
def test_generator_state_is_refused_when_it_points_outside_its_buffers(kind: str, field: str, wrong: int) -> None:
    node = tree.encode(getattr(np.random, kind)(1))
    state = node["tree"]["state"]
    target = state["state"] if field in state["state"] else state
    assert field in target
    target[field] = wrong
    with pytest.raises(FormatError, match=r"0\.\."):
        tree.decode(node, lambda ref: ref)
