"""What "comes back unchanged" means: the same type, the same bits, the same order, all the way down."""

from __future__ import annotations

import argparse
import dataclasses
import random
import struct
import sys
from collections import defaultdict, deque
from collections.abc import Mapping
from datetime import datetime, time
from types import SimpleNamespace
from typing import Any

import numpy as np
from pydantic import BaseModel


def assert_same(a: Any, b: Any, where: str = "value") -> None:
    """``b`` is what ``a`` was."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(a, torch.Tensor):
        _assert_same_tensor(a, b, where)
        return
    if torch is not None and isinstance(a, torch.Generator):
        assert type(a) is type(b), where
        assert a.device == b.device, where
        assert torch.equal(a.get_state(), b.get_state()), where
        return
    assert type(a) is type(b), f"{where}: {type(a)} became {type(b)}"
    if isinstance(a, (BaseModel, argparse.Namespace, SimpleNamespace)) or dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a)] if dataclasses.is_dataclass(a) else list(vars(a))
        assert getattr(a, "__dict__", None) is None or list(vars(a)) == list(vars(b)), where
        for name in names:
            if not hasattr(a, name):
                assert not hasattr(b, name), f"{where}.{name}"
                continue
            assert_same(getattr(a, name), getattr(b, name), f"{where}.{name}")
        if isinstance(a, BaseModel):
            assert a.model_fields_set == b.model_fields_set, where
            assert_same(a.__pydantic_extra__, b.__pydantic_extra__, where)
            assert_same(a.__pydantic_private__, b.__pydantic_private__, where)
    elif type(a) is float:
        assert _bits(a) == _bits(b), where
    elif type(a) is complex:
        assert _bits(a.real) + _bits(a.imag) == _bits(b.real) + _bits(b.imag), where
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
        if isinstance(a, deque):
            assert a.maxlen == b.maxlen, where
    elif isinstance(a, (set, frozenset)):
        assert_same(sorted(a, key=_rank), sorted(b, key=_rank), where)
    elif isinstance(a, Mapping):
        assert_same(list(a), list(b), f"{where} keys")
        for key, x, y in zip(a, a.values(), b.values(), strict=True):
            assert_same(x, y, f"{where}.{key}")
        if isinstance(a, defaultdict):
            assert a.default_factory is b.default_factory, where
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert a.dtype.isalignedstruct == b.dtype.isalignedstruct, where
        if a.flags.f_contiguous != a.flags.c_contiguous:
            assert a.flags.f_contiguous == b.flags.f_contiguous, where
        if a.dtype == object:
            assert_same(a.tolist(), b.tolist(), where)
        else:
            assert _raw(a) == _raw(b), where
    elif isinstance(a, np.generic):
        assert a.dtype == b.dtype, where
        assert _raw(a) == _raw(b), where
    elif isinstance(a, np.random.Generator):
        assert_same(a.bit_generator, b.bit_generator, where)
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
        assert_same(a.tzinfo, b.tzinfo, where)
    else:
        assert repr(a) == repr(b), where


def tensor_bytes(tensor: Any) -> bytes:
    """The elements of a plain tensor in row-major order, whatever its strides, dtype and views."""
    import torch

    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    elif tensor.dtype is torch.bits16:
        tensor = tensor.view(torch.int16)
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def _assert_same_tensor(a: Any, b: Any, where: str) -> None:
    import torch

    from ckptstore.dcp import composites

    expected = torch.Tensor if type(a) is torch.nn.Parameter else type(a)
    assert type(b) is expected, f"{where}: {type(a)} became {type(b)}"
    assert (a.dtype, a.layout, a.is_nested, a.is_quantized) == (b.dtype, b.layout, b.is_nested, b.is_quantized), where
    if a.is_nested:
        for x, y in zip(a.unbind(), b.unbind(), strict=True):
            _assert_same_tensor(x, y, where)
    elif a.is_quantized:
        assert a.shape == b.shape, where
        assert a.qscheme() == b.qscheme(), where
        assert torch.equal(a.dequantize(), b.dequantize()), where
        if a.dtype not in (torch.quint4x2, torch.quint2x4):
            assert torch.equal(a.int_repr(), b.int_repr()), where
    elif composites.is_composite(a):
        ours, theirs = composites.take_apart(where, a), composites.take_apart(where, b)
        assert ours.kind == theirs.kind, where
        assert_same(ours.facts, theirs.facts, where)
        assert_same(ours.parts, theirs.parts, where)
    else:
        assert a.shape == b.shape, where
        assert tensor_bytes(a) == tensor_bytes(b), where


def _raw(array: np.ndarray[Any, Any] | np.generic) -> bytes:
    """The bytes of the elements, without what a long double leaves unused."""
    data = array.tobytes()
    if array.dtype.char not in "gG" or np.finfo(np.longdouble).nmant != 63:
        return data
    return np.frombuffer(data, np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize)[:, :10].tobytes()


def _bits(value: float) -> bytes:
    return struct.pack(">d", value)


def _rank(value: Any) -> tuple[str, str]:
    """A place in an order that doesn't depend on hashes."""
    if isinstance(value, frozenset):
        text = repr(sorted(map(_rank, value)))
    elif isinstance(value, tuple):
        text = repr(list(map(_rank, value)))
    else:
        text = _bits(value).hex() if type(value) is float else repr(value)
    return type(value).__name__, text
