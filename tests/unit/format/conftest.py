"""What "comes back unchanged" means for values of a state."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from datetime import datetime, time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from ckptstore.format import tree
from ckptstore.format.manifest import canonical


def _through_json(value: object, **how: Any) -> Any:
    """The value after encoding, being a file, and decoding; references stay."""
    text = canonical(tree.encode(value))
    how = {"trusted": "loaded", **how}
    return tree.decode(json.loads(text), lambda ref: ref, **how)


def _bits(value: float) -> bytes:
    return struct.pack(">d", value)


def _assert_same(a: Any, b: Any, where: str = "value") -> None:
    """Same type, same bits, same order, all the way down."""
    assert type(a) is type(b), f"{where}: {type(a)} became {type(b)}"
    if isinstance(a, (BaseModel, argparse.Namespace, SimpleNamespace)) or dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a)] if dataclasses.is_dataclass(a) else list(vars(a))
        assert getattr(a, "__dict__", None) is None or list(vars(a)) == list(vars(b)), where
        for name in names:
            if not hasattr(a, name):
                assert not hasattr(b, name), f"{where}.{name}"
                continue
            _assert_same(getattr(a, name), getattr(b, name), f"{where}.{name}")
        if isinstance(a, BaseModel):
            assert a.model_fields_set == b.model_fields_set, where
            _assert_same(a.__pydantic_extra__, b.__pydantic_extra__, where)
            _assert_same(a.__pydantic_private__, b.__pydantic_private__, where)
    elif type(a) is float:
        assert _bits(a) == _bits(b), where
    elif type(a) is complex:
        assert _bits(a.real) + _bits(a.imag) == _bits(b.real) + _bits(b.imag), where
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{where}[{i}]")
        if isinstance(a, deque):
            assert a.maxlen == b.maxlen, where
    elif isinstance(a, (set, frozenset)):
        _assert_same(sorted(a, key=_rank), sorted(b, key=_rank), where)
    elif isinstance(a, Mapping):
        _assert_same(list(a), list(b), f"{where} keys")
        _assert_same(list(a.values()), list(b.values()), f"{where} values")
        if isinstance(a, defaultdict):
            assert a.default_factory is b.default_factory, where
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert a.dtype.isalignedstruct == b.dtype.isalignedstruct, where
        if a.flags.f_contiguous != a.flags.c_contiguous:
            assert a.flags.f_contiguous == b.flags.f_contiguous, where
        if a.dtype == object:
            _assert_same(a.tolist(), b.tolist(), where)
        else:
            assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, np.generic):
        assert a.dtype == b.dtype, where
        assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, np.random.Generator):
        _assert_same(a.bit_generator, b.bit_generator, where)
    elif isinstance(a, np.random.BitGenerator):
        assert str(a.state) == str(b.state), where
        assert (a.seed_seq is None) == (b.seed_seq is None), where
        if isinstance(a.seed_seq, np.random.SeedSequence):
            assert str(a.seed_seq.state) == str(b.seed_seq.state), where
    elif isinstance(a, np.random.SeedSequence):
        assert str(a.state) == str(b.state), where
    elif isinstance(a, np.random.RandomState):
        assert str(a.get_state(legacy=False)) == str(b.get_state(legacy=False)), where
    elif isinstance(a, random.Random):
        assert a.getstate() == b.getstate(), where
    elif isinstance(a, (datetime, time)):
        assert a.replace(tzinfo=None) == b.replace(tzinfo=None), where
        assert a.fold == b.fold, where
        _assert_same(a.tzinfo, b.tzinfo, where)
    else:
        assert repr(a) == repr(b), where


def _rank(value: Any) -> tuple[str, str]:
    """A place in an order that doesn't depend on hashes."""
    if isinstance(value, frozenset):
        text = repr(sorted(map(_rank, value)))
    elif isinstance(value, tuple):
        text = repr(list(map(_rank, value)))
    else:
        text = _bits(value).hex() if type(value) is float else repr(value)
    return type(value).__name__, text


@pytest.fixture(scope="session")
def through_json() -> Callable[..., Any]:
    return _through_json


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    return _assert_same
