"""What version 1 of the state tree looks like is fixed: tests/compat/tree_v1.json is read by every later version."""

from __future__ import annotations

import argparse
import dataclasses
import http
import json
import math
import random
import re
import struct
import sys
import types
import urllib.parse
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from types import MappingProxyType, SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr

from ckptstore.format import tree, types_base
from ckptstore.format.manifest import canonical

FILE = Path(__file__).parents[2] / "compat" / "tree_v1.json"


@dataclasses.dataclass
class Recipe:
    """A dataclass under a name that stays, wherever this file moves."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


class Settings(BaseModel):
    """A model under a name that stays."""

    model_config = ConfigDict(extra="allow")
    epochs: int
    name: str = "run"
    _seen: int = PrivateAttr(default=0)


for _cls in (Recipe, Settings):
    _cls.__module__ = "golden_v1"
sys.modules["golden_v1"] = types.ModuleType("golden_v1")
vars(sys.modules["golden_v1"]).update(Recipe=Recipe, Settings=Settings)


def _random() -> random.Random:
    generator = random.Random(0)
    generator.setstate((3, (*range(624), 624), 0.5))
    return generator


def _bits(kind: str) -> Any:
    bits = getattr(np.random, kind)(np.random.SeedSequence(7))
    state = bits.state
    if kind == "MT19937":
        state["state"] = {"key": np.arange(624, dtype=np.uint32), "pos": 5}
        bits.state = state
    return bits


def _legacy() -> np.random.RandomState:
    state = np.random.RandomState(0)
    state.set_state(("MT19937", np.arange(624, dtype=np.uint32), 3, 1, 0.25))
    return state


NAN = struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]
VALUES: dict[str, Any] = {
    "none": None, "bool": True, "int": 3, "int of 54 bits": 2**53 + 1, "negative int": -(2**80), "float": 0.1,
    "negative zero": -0.0,
    "nan": math.nan, "nan with payload": NAN, "infinity": -math.inf, "str": "é~\n",
    "str with a lone surrogate": "a\udcff",
    "bytes": b"\x00\xff", "bytearray": bytearray(b"ab"), "complex": complex(1.5, math.nan),
    "list": [1, 2.5, "x", [None]], "tuple": (1, (2,)), "set": {3, 1, "a"}, "frozenset": frozenset({(1, 2)}),
    "deque": deque([1], maxlen=3), "deque without end": deque([1]), "range": range(1, 9, 2), "slice": slice(None, 5),
    "dict in sorted order": {"a": 1, "b": {"c": 2}}, "dict in another order": {"lr": 0.1, "epoch": 3, "betas": [0.9]},
    "dict with tildes": {"~": 1, "~x": 2}, "dict with int keys": {1: "a", 0: "b"},
    "dict with mixed keys": {"1": 1, 1: 2, None: 3, (1,): 4},
    "OrderedDict": OrderedDict(b=1, a=2), "defaultdict": defaultdict(list, a=[1]),
    "defaultdict without factory": defaultdict(None, a=1),
    "Counter": Counter(a=2), "mappingproxy": MappingProxyType({"a": 1}), "SimpleNamespace": SimpleNamespace(b=1, a=2),
    "Namespace": argparse.Namespace(lr=0.1),
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001 - naive on purpose
    "datetime in a zone": datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    "datetime at an offset": datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-5), "EST")),
    "date": date(2026, 1, 2), "time": time(1, 2, 3, tzinfo=timezone.utc), "timedelta": timedelta(-1, 2, 3),
    "timezone": timezone(timedelta(hours=1)), "ZoneInfo": ZoneInfo("UTC"), "Decimal": Decimal("-1.10"),
    "Fraction": Fraction(-1, 3),
    "UUID": UUID(int=5), "PosixPath": PosixPath("/a/b"), "PurePosixPath": PurePosixPath("a"),
    "PureWindowsPath": PureWindowsPath("C:/a"),
    "Random": _random(),
    "Enum": http.HTTPStatus.OK, "Flag": re.RegexFlag.I | re.RegexFlag.M,
    "namedtuple": urllib.parse.SplitResult("a", "b", "c", "", ""),
    "dataclass": Recipe(0.1), "pydantic": Settings(epochs=3, more=[1]),
    "array": np.array([[1, 2, 3]], "<f4"),
    "array in Fortran order": np.asfortranarray(np.array([[1, 2], [3, 4]], "<i2")),
    "array of times": np.array(["2026-01-01", "NaT"], "<M8[D]"),
    "array of objects": np.array([1, "a", (2,)], dtype=object),
    "array of structs": np.array([(1, [2, 3])], [("a", "<i2"), ("b", ">u2", (2,))]),
    "array of no dimensions": np.array(5, "<i8"),
    "NumPy scalar": np.float32(0.1), "NumPy scalar that is no number": np.float64("nan"), "NumPy int": np.int64(2**62),
    "NumPy str": np.str_("a"), "list of NumPy scalars": [np.float64(i) / 2 for i in range(16)],
    "dtype": np.dtype(">f8"),
    "SeedSequence": np.random.SeedSequence(3, spawn_key=(1,)), "RandomState": _legacy(),
    "Generator": np.random.Generator(_bits("PCG64")),
    **{kind: _bits(kind) for kind in ("MT19937", "PCG64DXSM", "Philox", "SFC64")},
    "tensor": tree.TensorRef("model.w"), "per rank": tree.PerRankRef("rng"),
    "array kept as a tensor": tree.ArrayRef("replay.obs"),
    "array kept as bytes": tree.ArrayRef("replay.t", np.dtype("<M8[us]"), (3, 2), is_transposed=True),
    "composite tensor": tree.Composite(
        "sparse_coo",
        {"indices": tree.TensorRef("emb.indices"), "values": tree.TensorRef("emb.values")},
        {"size": [4, 3], "dtype": "float32", "coalesced": True},
    ),
    "registered type": tree.Opaque("golden.type", {"name": "golden.type", "v": [1], "~": "type"}),
}  # fmt: skip

CASES: dict[str, Any] = {case["name"]: case["node"] for case in json.loads(FILE.read_text(encoding="utf-8"))["cases"]}


@pytest.mark.parametrize("name", VALUES)
def test_value_is_written_as_ever(name: str) -> None:
    assert canonical(tree.encode(VALUES[name])["tree"]) == canonical(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_node_is_read_as_ever(name: str, assert_same: Any) -> None:
    how = {"unknown": "opaque"} if name == "registered type" else {"trusted": "loaded"}
    assert_same(VALUES[name], tree.decode({"version": 1, "tree": CASES[name]}, lambda ref: ref, **how))


def test_every_type_of_the_format_has_a_golden_node() -> None:
    text = json.dumps(CASES)
    assert [tag for tag in types_base.BY_TAG if f'"~": "{tag}"' not in text] == ["WindowsPath"]
