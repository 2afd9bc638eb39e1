"""Every dtype a checkpoint can hold, by torch's name without ``torch.``: its size, its kind, its stock form.

Left out are the quantized ones: their values need a scale and a zero point that live outside the bytes.

Source: ``torch.storage._dtype_to_storage_type_map`` and ``torch.storage._new_dtypes``, torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ckptstore.errors import FormatError

Kind = Literal["float", "complex", "int", "bool", "bits"]


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        itemsize: bytes of one element as torch stores it; sub-byte types take a whole byte.
        stock_global: what ``torch.save`` names in module ``torch`` for it: a typed storage class for the older types,
            the dtype itself for the newer ones.
        stock_dtype: the dtype under which stock readers see the bytes: itself, but ``uint8`` for the sub-byte integers,
            which ``torch.save`` can't hold.
    """

    name: str
    itemsize: int
    kind: Kind
    stock_global: str
    stock_dtype: str


def _typed(name: str, itemsize: int, kind: Kind, storage: str) -> DType:
    return DType(name, itemsize, kind, storage, name)


def _untyped(name: str, itemsize: int, kind: Kind) -> DType:
    return DType(name, itemsize, kind, name, name)


def _sub_byte(name: str) -> DType:
    return DType(name, 1, "int", "ByteStorage", "uint8")


_ALL = (
    _typed("float64", 8, "float", "DoubleStorage"),
    _typed("float32", 4, "float", "FloatStorage"),
    _typed("float16", 2, "float", "HalfStorage"),
    _typed("bfloat16", 2, "float", "BFloat16Storage"),
    _untyped("float8_e4m3fn", 1, "float"),
    _untyped("float8_e4m3fnuz", 1, "float"),
    _untyped("float8_e5m2", 1, "float"),
    _untyped("float8_e5m2fnuz", 1, "float"),
    _untyped("float8_e8m0fnu", 1, "float"),
    _untyped("float4_e2m1fn_x2", 1, "float"),
    _typed("complex128", 16, "complex", "ComplexDoubleStorage"),
    _typed("complex64", 8, "complex", "ComplexFloatStorage"),
    _untyped("complex32", 4, "complex"),
    _typed("int64", 8, "int", "LongStorage"),
    _typed("int32", 4, "int", "IntStorage"),
    _typed("int16", 2, "int", "ShortStorage"),
    _typed("int8", 1, "int", "CharStorage"),
    _untyped("uint64", 8, "int"),
    _untyped("uint32", 4, "int"),
    _untyped("uint16", 2, "int"),
    _typed("uint8", 1, "int", "ByteStorage"),
    _typed("bool", 1, "bool", "BoolStorage"),
    _untyped("bits16", 2, "bits"),
    _untyped("bits8", 1, "bits"),
    _untyped("bits4x2", 1, "bits"),
    _untyped("bits2x4", 1, "bits"),
    _untyped("bits1x8", 1, "bits"),
    *(_sub_byte(f"{sign}int{bits}") for sign in ("", "u") for bits in range(1, 8)),
)

#: Every dtype by its name.
DTYPES: Mapping[str, DType] = MappingProxyType({dtype.name: dtype for dtype in _ALL})


def dtype_of(name: str) -> DType:
    """The dtype of this name.

    Raises:
        FormatError: no checkpoint of this version can hold such elements.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise FormatError(
            f"dtype {name!r} is unknown to this version of ckptstore", hint="upgrade ckptstore", dtype=name
        ) from None


def itemsize(name: str) -> int:
    """Bytes of one element.

    Raises:
        FormatError: as :func:`dtype_of`.
    """
    return dtype_of(name).itemsize
