"""Every kind of value and every kind of tensor that a state may hold, made anew and alike by each call.

Importable in a fresh process, which has to know the same classes.
"""

from __future__ import annotations

import argparse
import enum
import random
import struct
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from ckptstore import register_type

torch.serialization.add_safe_globals([TwoTensor])


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Flags(enum.Flag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: Any = None


@dataclass
class Plan:
    name: str
    sizes: list[int] = field(default_factory=list)
    weight: Any = None


@dataclass(frozen=True, slots=True)
class Slotted:
    a: int


class Settings(BaseModel):
    lr: float = 0.1
    layers: list[int] = []


class Celsius:
    """Known to the store by registration only."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __repr__(self) -> str:
        return f"Celsius({self.degrees})"


register_type(Celsius, encode=lambda c: {"degrees": c.degrees}, decode=lambda v: Celsius(v["degrees"]))


class Curve:
    """Registered, and made of what its tensors hold, not of the tensors."""

    def __init__(self, points: list[float]) -> None:
        self.points = points

    def __repr__(self) -> str:
        return f"Curve({self.points})"


register_type(Curve, encode=lambda c: {"t": torch.tensor(c.points)}, decode=lambda v: Curve(v["t"].tolist()))


class Tagged(torch.Tensor):
    """A tensor class that keeps itself, by registration."""


register_type(
    Tagged,
    encode=lambda t: t.as_subclass(torch.Tensor),
    decode=lambda v: v.as_subclass(Tagged),
)


def _nan(bits: int) -> float:
    return float(struct.unpack(">d", struct.pack(">Q", bits))[0])


def _objects() -> Any:
    array = np.empty(3, dtype=object)
    array[:] = [1, "x", (2, None)]
    return array


def _shared() -> Any:
    tensor = torch.arange(3.0)
    return {"w": tensor, "plan": Plan("p", weight=tensor), "again": [tensor]}


def _structured() -> Any:
    array = np.zeros(2, dtype=np.dtype([("a", "i2"), ("b", "f8")], align=True))
    array["b"] = [2.5, np.nan]
    return array


def _used_generator() -> torch.Generator:
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    return generator


def values() -> dict[str, Any]:
    """Name -> value; no tensors but those inside objects."""
    rng = np.random.default_rng(3)
    rng.random(5)
    legacy = np.random.RandomState(4)
    legacy.randn(3)
    mersenne = random.Random(5)
    mersenne.gauss(0, 1)
    return {
        "none": None,
        "true": True,
        "int": 7,
        "big int": 2**200 + 1,
        "negative big int": -(2**64),
        "2**53 + 1": 2**53 + 1,
        "float": 0.1,
        "-0.0": -0.0,
        "nan": float("nan"),
        "nan with payload": _nan(0xFFF8_0000_0000_0123),
        "inf": float("-inf"),
        "subnormal": 5e-324,
        "complex": complex(-0.0, float("inf")),
        "str": "ünï/code\n\x00",
        "lone surrogate": "\ud800",
        "empty str": "",
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "list": [1, [2.0, None], []],
        "tuple": (1, (2,), ()),
        "namedtuple": Point(1, (2,)),
        "set": {1, "a", (2, 3)},
        "frozenset": frozenset({1, frozenset({2})}),
        "deque": deque([1, 2], maxlen=5),
        "dict": {"b": 1, "a": {"~": 2, "~~": 3}},
        "int keys": {3: "int", "3": "str", True: "bool", None: "none", 1.5: "float", (1, "x"): "tuple"},
        "bytes and enum keys": {b"k": 1, Colour.RED: 2, date(2026, 1, 2): 3},
        "strange keys": {"": 1, "a.b": 2, "a/b": 3, "模型": 4, "k" * 300: 5, " ": 6},
        "order": {"z": 1, "a": 2, "m": 3},
        "OrderedDict": OrderedDict([("z", 1), ("a", 2)]),
        "defaultdict": defaultdict(list, {"a": [1]}),
        "Counter": Counter("hello"),
        "mappingproxy": types.MappingProxyType({"a": 1}),
        "range": range(10, 0, -3),
        "slice": slice(1, None, 2),
        "Enum": Colour.BLUE,
        "IntEnum": Level.LOW,
        "Flag": Flags.A | Flags.B,
        "dataclass": Plan("x", [1, 2]),
        "slotted dataclass": Slotted(3),
        "pydantic": Settings(layers=[1]),
        "Namespace": argparse.Namespace(lr=0.1, names=["a"]),
        "SimpleNamespace": types.SimpleNamespace(a=1),
        "datetime": datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001
        "datetime utc": datetime(2026, 1, 2, tzinfo=timezone.utc),
        "datetime offset": datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5, minutes=30), "IST")),
        "datetime zone": datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        "date": date(2026, 1, 2),
        "time": time(1, 2, 3, tzinfo=timezone.utc),
        "timedelta": timedelta(days=-1, microseconds=3),
        "timezone": timezone(timedelta(hours=-3)),
        "Decimal": Decimal("1.10"),
        "Decimal nan": Decimal("-sNaN12"),
        "Fraction": Fraction(-3, 7),
        "UUID": UUID(int=5),
        "Path": Path("/a/b"),
        "PurePosixPath": PurePosixPath("a"),
        "PureWindowsPath": PureWindowsPath(r"c:\x"),
        "Random": mersenne,
        "np.float32": np.float32(0.1),
        "np.int64": np.int64(2**62),
        "np.bool": np.bool_(True),
        "np.datetime64": np.datetime64("2026-01-02", "D"),
        "np.str": np.str_("x\x00"),
        "np.complex64": np.complex64(1 + 2j),
        "np.longdouble": np.longdouble("0.1"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "array 0-dim": np.array(5.0),
        "array empty": np.empty((0, 3), np.float16),
        "array big-endian": np.arange(3, dtype=">f8"),
        "array fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "array strided": np.arange(20)[::-3],
        "array datetime64": np.array(["2026-01-02", "NaT"], "M8[ns]"),
        "array structured": _structured(),
        "array str": np.array(["ab", "c"]),
        "array object": _objects(),
        "large array": np.arange(30_000, dtype=np.float32).reshape(100, 300),
        "large array fortran": np.asfortranarray(np.arange(30_000.0).reshape(100, 300)),
        "large array big-endian": np.arange(20_000, dtype=">i8"),
        "large array datetime64": np.arange(20_000).astype("M8[us]").reshape(200, 100),
        "large array structured": np.zeros(9_000, dtype=[("a", "<i2"), ("b", ">f8")]),
        "large array str": np.array(["ab", "cde"] * 8_000),
        "large array reversed": np.arange(20_000)[::-1],
        "large array read-only": np.frombuffer(bytes(range(256)) * 400, dtype=np.uint8),
        "large array bool": np.arange(70_000) % 3 == 0,
        "np.dtype": np.dtype([("a", ">i2")]),
        "np.Generator": rng,
        "np.RandomState": legacy,
        "torch.dtype": torch.float8_e4m3fn,
        "torch.device": torch.device("cuda", 3),
        "torch.Size": torch.Size([2, 3]),
        "torch.layout": torch.sparse_csr,
        "torch.memory_format": torch.channels_last,
        "torch.Generator": _used_generator(),
        "registered": Celsius(21.5),
        "registered by tensors": Curve([1.0, 2.0, 0.5]),
        "registered by tensors, deep": [{"a": Curve([3.0])}, (Curve([4.0]), 1)],
        "dataclass of registered": Plan("r", weight=Curve([5.0])),
        "dataclass of sparse": Plan("s", weight=torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True)),
        "tensor also in a dataclass": _shared(),
        "array under a key with a nan": {(float("nan"), 1): [Plan("n", weight=torch.arange(2))], "b": torch.ones(1)},
        "list of numbers": [0.1 * i for i in range(50)],
        "list of np scalars": [np.float64(i) for i in range(40)],
        "tensor in a dataclass": Plan("t", weight=torch.arange(4.0)),
        "tensor in a namedtuple": Point(1, torch.arange(4)),
        "tensor in a deque": deque([torch.ones(2), {"x": torch.zeros(1)}]),
        "tensor under an int key": {0: torch.ones(1), "0": torch.zeros(1)},
    }


def _of(dtype: torch.dtype) -> torch.Tensor:
    """A few elements of this dtype with every byte in use."""
    raw = (torch.arange(64, dtype=torch.int64) * 37 % 251).to(torch.uint8)
    if dtype is torch.bool:
        return raw.bool()
    return raw.view(dtype)


QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)} - set(QUANTIZED), key=str)


def tensors() -> dict[str, torch.Tensor]:
    """Name -> tensor."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 3, generator=g), torch.randn(4, 3, generator=g)]
    big = torch.arange(1 << 18, dtype=torch.float32)
    z = torch.randn(3, 4, dtype=torch.complex64, generator=g)
    x = torch.randn(3, 4, generator=g)
    dense = torch.tensor([[0, 0, 1.0], [2.0, 0, 0], [0, 0, 0], [0, 3.0, 4.0]])
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            **{str(dtype): _of(dtype) for dtype in DTYPES},
            "0-dim": torch.tensor(1.5),
            "0-dim bool": torch.tensor(True),
            "empty": torch.empty(0),
            "empty (0, 3)": torch.empty(0, 3, dtype=torch.int32),
            "empty (2, 0, 3)": torch.empty(2, 0, 3, dtype=torch.bfloat16),
            "one row": torch.ones(1, 1, 1),
            "nan payload": torch.tensor([0x7FC00001, -4194303], dtype=torch.int32).view(torch.float32),
            "transposed": torch.arange(12).reshape(3, 4).t(),
            "strided": torch.arange(40)[3:33:7],
            "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 1000),
            "expanded 0-dim": torch.tensor(7).expand(5),
            "overlapping": torch.arange(10.0).as_strided((4, 3), (2, 1)),
            "channels_last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
            "channels_last_3d": torch.arange(48.0).reshape(1, 3, 2, 4, 2).to(memory_format=torch.channels_last_3d),
            "small view": big[5:9],
            "conj": z.conj(),
            "neg": z.conj().imag,
            "real": z.real,
            "imag": z.imag,
            "conj transposed": z.mH,
            "view as real": torch.view_as_real(z),
            "other dtype view": x.view(torch.int32),
            "requires grad": torch.ones(2, requires_grad=True),
            "in a graph": torch.ones(2, requires_grad=True) * 3,
            "parameter": nn.Parameter(torch.arange(3.0)),
            "inference": _inference(),
            "registered class": torch.arange(4.0).as_subclass(Tagged),
            "sparse_coo": dense.to_sparse(),
            "sparse_coo uncoalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (3, 3)),
            "sparse_coo hybrid": torch.sparse_coo_tensor([[0, 2]], torch.arange(8).reshape(2, 4), (3, 4)),
            "sparse_coo without values": torch.sparse_coo_tensor(size=(3, 4)),
            "sparse_coo complex": z.to_sparse(),
            "sparse_csr": dense.to_sparse_csr(),
            "sparse_csr int32": torch.sparse_csr_tensor(
                torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), torch.ones(2)
            ),
            "sparse_csr batched": torch.stack([dense, dense]).to_sparse_csr(),
            "sparse_csc": dense.to_sparse_csc(),
            "sparse_bsr": torch.eye(4).to_sparse_bsr((2, 2)),
            "sparse_bsc": torch.eye(4).to_sparse_bsc((2, 2)),
            "nested": torch.nested.nested_tensor(rows),
            "nested transposed": torch.nested.nested_tensor(rows).transpose(1, 2),
            "nested 0 rows": torch.nested.nested_tensor([]),
            "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
            "jagged with holes": torch.nested.nested_tensor_from_jagged(
                torch.arange(10.0), torch.tensor([0, 4, 8]), torch.tensor([2, 3])
            ),
            "jagged transposed": torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2),
            "qint8": torch.quantize_per_tensor(x, 0.1, 3, torch.qint8),
            "quint8 transposed": torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).t(),
            "qint32": torch.quantize_per_tensor(x, 1e-9, 0, torch.qint32),
            "qint8 0-dim": torch.quantize_per_tensor(torch.tensor(0.3), 0.1, 0, torch.qint8),
            "quint8 view": torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)[1:],
            "qint8 per channel": torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8),
            "quint4x2": torch.quantize_per_channel(x, scales, zeros.float(), 0, torch.quint4x2),
            "quint4x2 odd": torch.quantize_per_channel(torch.rand(3, 5, generator=g), scales, zeros.float(), 0,
                                                       torch.quint4x2),
            "quint2x4": torch.quantize_per_channel(x, scales, zeros.float(), 0, torch.quint2x4),
            "int4 in uint8": (torch.arange(32, dtype=torch.uint8) * 17),
            "wrapper": TwoTensor(torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)),
            "wrapper of a wrapper": TwoTensor(
                TwoTensor(torch.arange(3.0), torch.ones(3)), TwoTensor(torch.zeros(3), torch.full((3,), 2.0))
            ),
            "wrapper parameter": nn.Parameter(TwoTensor(torch.arange(2.0), torch.ones(2))).detach(),
        }  # fmt: skip
    return found


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.arange(3.0)


class NoFlatten(torch.Tensor):
    """A wrapper that tells nobody what is in it."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> NoFlatten:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(torch.ones(1)) if func is torch.ops.aten.detach.default else NotImplemented

    def __repr__(self) -> str:
        return "NoFlatten()"


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


def _cycle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def _deep() -> Any:
    value: list[Any] = []
    for _ in range(150):
        value = [value]
    return value


class Unknown:
    pass


class DictOfMine(dict):
    pass


#: Name -> a function that makes something no checkpoint can hold.
REFUSED: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse meta": lambda: torch.empty(2, 2, device="meta", layout=torch.sparse_coo),
    "fake": _fake,
    "wrapper without flatten": lambda: NoFlatten(torch.ones(2)),
    "wrapper around nothing storable": lambda: TwoTensor(torch.empty(2, device="meta"), torch.empty(2, device="meta")),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "lambda": lambda: lambda: 0,
    "function": lambda: values,
    "class": lambda: Unknown,
    "module": lambda: types,
    "object": lambda: Unknown(),
    "dict subclass": lambda: DictOfMine(a=1),
    "str subclass": lambda: type("Name", (str,), {})("x"),
    "cycle": _cycle,
    "too deep": _deep,
    "generator": lambda: (i for i in range(3)),
    "file": lambda: open("/dev/null"),  # noqa: SIM115
    "defaultdict of code": lambda: defaultdict(lambda: 0),
    "local class": lambda: dataclass(type("Local", (), {"__annotations__": {"a": int}}))(1),
    "array of objects": lambda: np.array([Unknown()], dtype=object),
    "huge bytes": lambda: bytes(33 << 20),
    "parameter of an exotic zone": lambda: datetime(2026, 1, 1, tzinfo=_Zone()),
}


class _Zone(timezone.__base__):  # type: ignore[misc,name-defined]
    def utcoffset(self, _: Any) -> timedelta:
        return timedelta(0)
