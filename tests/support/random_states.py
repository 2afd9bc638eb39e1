"""Hypothesis strategies for states: any nesting of any values, with tensors of every kind among them."""

from __future__ import annotations

import argparse
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import timezone
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

# Every bit pattern of a double, so NaNs with payload and subnormals come up, too.
any_float = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", struct.pack(">Q", bits))[0]) | st.floats()
any_text = st.text(max_size=6) | st.text(st.characters(), max_size=3) | st.sampled_from(["~", "~~", "a.b", "", "/"])
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | any_float | any_text
    | st.binary(max_size=9)
    | st.complex_numbers() | st.datetimes(timezones=st.just(timezone.utc) | st.none() | st.timezones()) | st.dates()
    | st.times() | st.timedeltas() | st.decimals(allow_nan=False) | st.fractions() | st.uuids()
)  # fmt: skip
keys = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=4
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every kind of container around ``inner``."""
    lists = st.lists(inner, max_size=4)
    plain = st.dictionaries(any_text, inner, max_size=4)
    mixed = st.dictionaries(keys, inner, max_size=4)
    names = st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), inner, max_size=3)
    arrays = lists.map(_object_array)
    return (
        lists | lists.map(tuple) | lists.map(deque) | lists.map(lambda v: deque(v, maxlen=len(v) + 1)) | plain | mixed
        | mixed.map(OrderedDict) | plain.map(lambda d: defaultdict(list, d)) | mixed.map(Counter)
        | st.sets(keys, max_size=4) | st.frozensets(keys, max_size=4) | names.map(lambda d: SimpleNamespace(**d))
        | names.map(lambda d: argparse.Namespace(**d)) | arrays
    )  # fmt: skip


def _object_array(values: list[Any]) -> Any:
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _array(dtype: str, data: bytes, shape: tuple[int, ...]) -> Any:
    return np.frombuffer((data * 64)[: np.dtype(dtype).itemsize * int(np.prod(shape))], dtype).reshape(shape)


numeric_arrays = st.builds(
    _array,
    st.sampled_from(["<f4", ">f8", "|i1", "<u8", "<c8", "<M8[ns]", "|S3", "<i2,<f4", "<f2"]),
    st.binary(min_size=16, max_size=16),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
plain_states = st.recursive(scalars | numeric_arrays, containers, max_leaves=25)


def tensors() -> st.SearchStrategy[Any]:
    """Tensors of every dtype, shape, memory order and kind; small."""
    import torch

    dtypes = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
    storable = [dtype for dtype in dtypes if not str(dtype).startswith("torch.q")]

    def strided(dtype: Any, shape: tuple[int, ...], data: bytes) -> Any:
        size = int(np.prod(shape))
        raw = torch.frombuffer(bytearray((data * 64)[: max(1, size * dtype.itemsize)]), dtype=torch.uint8)
        raw = raw % 2 if dtype is torch.bool else raw
        return raw[: size * dtype.itemsize].view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    data = st.binary(min_size=24, max_size=24)
    whole = st.builds(strided, st.sampled_from(storable), shapes, data)
    floats = st.builds(lambda shape, data: strided(torch.int16, shape, data).float(), shapes, data)
    matrices = st.builds(
        lambda rows, columns, data: strided(torch.int8, (rows, columns), data).relu().double(),
        st.integers(1, 4), st.integers(1, 4), data,
    )  # fmt: skip
    return (
        whole
        | floats.map(lambda t: t.T if t.dim() == 2 else t.unsqueeze(0).expand(2, *t.shape))
        | floats.map(lambda t: t[..., ::2] if t.dim() else t)
        | floats.map(torch.nn.Parameter)
        | floats.map(lambda t: torch.complex(t, t).conj())
        | matrices.map(lambda t: _quietly(t.to_sparse))
        | matrices.map(lambda t: _quietly(t.to_sparse_csr))
        | matrices.map(lambda t: _quietly(lambda: torch.nested.nested_tensor([t, t[:1]])))
        | matrices.map(lambda t: _quietly(lambda: torch.quantize_per_tensor(t.float(), 0.5, 3, torch.quint8)))
    )


def _quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


class Held:
    """A state that can be shown: torch can't print tensors of every dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        try:
            return repr(self.value)
        except Exception as error:
            return f"<a state that can't be shown: {error}>"


@st.composite
def states(draw: Any) -> Held:
    """Any nesting, tensors included."""
    return Held(draw(_with_tensors()))


@lru_cache
def _with_tensors() -> st.SearchStrategy[Any]:
    return st.recursive(scalars | numeric_arrays | tensors(), containers, max_leaves=20)
