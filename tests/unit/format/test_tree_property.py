"""Random nested states come back equal in type, order and every bit."""

from __future__ import annotations

import argparse
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import timezone
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptstore.format import tree

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
    lists = st.lists(inner, max_size=4)
    plain = st.dictionaries(any_text, inner, max_size=4)
    mixed = st.dictionaries(keys, inner, max_size=4)
    names = st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), inner, max_size=3)
    arrays = lists.map(lambda values: _object_array(values))
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


numeric_arrays = st.builds(
    lambda dtype, data, shape: np.frombuffer(
        (data * 64)[: np.dtype(dtype).itemsize * int(np.prod(shape))], dtype
    ).reshape(shape),
    st.sampled_from(["<f4", ">f8", "|i1", "<u8", "<c8", "<M8[ns]", "|S3", "<i2,<f4", "<f2"]),
    st.binary(min_size=16, max_size=16),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
states = st.recursive(scalars | numeric_arrays, containers, max_leaves=25)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(states)
def test_random_state_comes_back_unchanged(through_json: Any, assert_same: Any, state: Any) -> None:
    assert_same(state, through_json(state))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(states)
def test_encoding_is_canonical_when_repeated(through_json: Any, state: Any) -> None:
    assert tree.encode(through_json(state)) == tree.encode(state)
    list(tree.iter_leaves(tree.encode(state)))
