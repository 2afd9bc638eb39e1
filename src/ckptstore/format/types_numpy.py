"""NumPy: scalars, arrays of every dtype whose bytes say all, object arrays of what can be stored, random generators.

Arrays keep dtype (byte order, structure, alignment), shape and memory order; a view is stored as what it shows. Where
a platform has two names for one dtype (``longlong`` and ``int64``), a scalar comes back as the common one.
Imported when NumPy is loaded or a tree names it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from ckptstore.format.types_base import (
    BY_TAG,
    BY_TYPE,
    MAX_VALUES,
    RUNS,
    SAFE_INT,
    TAG,
    Json,
    Path,
    add_codec,
    are_verbatim,
    blob,
    integer,
    malformed,
    refuse,
    text,
)
from ckptstore.format.types_engine import Decoder, Encoder

_MAX_NDIM = 64
_MAX_DTYPE_DEPTH = 16
_MAX_FIELDS = 4096
_MAX_ITEMSIZE = 1 << 24
#: The array interface's spelling only: never a name, a comma list or an object.
_DTYPE_TEXT = re.compile(r"[<>|][biufcmMSUV][0-9]{1,8}(\[[0-9]{0,9}[A-Za-z]{1,3}\])?")

# --- dtypes -----------------------------------------------------------------------------------------------------------


def _dtype_node(dtype: np.dtype[Any], path: Path, depth: int = 0) -> Any:
    if depth > _MAX_DTYPE_DEPTH or dtype.itemsize > _MAX_ITEMSIZE or len(dtype.names or ()) > _MAX_FIELDS:
        refuse(path, "its dtype is too large", "store its fields apart")
    if dtype.metadata:
        refuse(path, "its dtype carries metadata", "drop it with array.astype(np.dtype(array.dtype.str))")
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"of": _dtype_node(base, path, depth + 1), "shape": list(shape)}
    if dtype.names is not None and dtype.fields is not None:
        fields = []
        for name in dtype.names:
            field = dtype.fields[name]
            if len(field) > 2:
                refuse(path, f"field {name!r} of its dtype has a title", "make the dtype without titles")
            fields.append([name, _dtype_node(field[0], path, depth + 1), field[1]])
        return {"fields": fields, "size": dtype.itemsize, "aligned": dtype.isalignedstruct}
    if dtype.kind not in "biufcmMSUV" or np.dtype(dtype.str) != dtype:
        refuse(path, f"its dtype {dtype!r} has no stored form", "convert it with astype, or to a list")
    return dtype.str


def _dtype(node: Any, path: Path, depth: int = 0) -> np.dtype[Any]:
    if depth > _MAX_DTYPE_DEPTH:
        malformed(path, "a dtype is too deep")
    if type(node) is str:
        if not _DTYPE_TEXT.fullmatch(node):
            malformed(path, f"unknown dtype {node!r:.60}")
        dtype = np.dtype(node)
    elif type(node) is dict and "of" in node:
        shape = _shape(node.get("shape"), path)
        dtype = np.dtype((_dtype(node["of"], path, depth + 1), shape))
    elif type(node) is dict and type(node.get("fields")) is list and len(node["fields"]) <= _MAX_FIELDS:
        names, formats, offsets = [], [], []
        for name, field, offset in node["fields"]:
            names.append(text(name, path))
            formats.append(_dtype(field, path, depth + 1))
            offsets.append(integer(offset, path, low=0, high=_MAX_ITEMSIZE))
        size = integer(node.get("size"), path, low=0, high=_MAX_ITEMSIZE)
        spec: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
        dtype = np.dtype(spec, align=node.get("aligned") is True)
    else:
        malformed(path, "damaged dtype")
    if dtype.hasobject or dtype.itemsize > _MAX_ITEMSIZE:
        malformed(path, "a dtype is not of fixed size")
    return dtype


def _shape(node: Any, path: Path) -> tuple[int, ...]:
    if type(node) is not list or len(node) > _MAX_NDIM:
        malformed(path, "damaged shape")
    return tuple(integer(n, path, low=0, high=1 << 48) for n in node)


# --- arrays -----------------------------------------------------------------------------------------------------------


def _encode_array(enc: Encoder, value: np.ndarray[Any, Any], path: Path) -> Json:
    node: Json = {"shape": list(value.shape)}
    order: Any = "C"
    if value.flags.f_contiguous and not value.flags.c_contiguous:
        order = node["order"] = "F"
    if value.dtype == np.dtype(object):
        return {**node, "dtype": "O", "v": enc.values(value.ravel(order).tolist(), path)}
    if value.dtype.hasobject and value.dtype.names is not None:
        refuse(path, "a structured array with object fields has no stored form", "store its fields apart")
    return {**node, "dtype": _dtype_node(value.dtype, path), "v": enc.blob(_bytes_of(value, order), path)}


def _bytes_of(array: np.ndarray[Any, Any] | np.generic, order: Any = "C") -> bytes:
    """The elements; what x86 leaves unused of a long double is zero, so that equal values are equal bytes."""
    data = array.tobytes(order)
    if array.dtype.char not in "gG" or np.finfo(np.longdouble).nmant != 63:
        return data
    words = np.frombuffer(bytearray(data), np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize)
    words[:, 10:] = 0
    return words.tobytes()


def _decode_array(dec: Decoder, node: Json, path: Path) -> np.ndarray[Any, Any]:
    shape, order = _shape(node.get("shape"), path), node.get("order", "C")
    if order not in ("C", "F"):
        malformed(path, "the order of an array is C or F")
    size = math.prod(shape)
    if node.get("dtype") == "O":
        values = dec.values(node.get("v"), path)
        if len(values) != size:
            malformed(path, "an array doesn't fit its shape")
        flat = np.empty(size, dtype=object)
        # Element by element: NumPy would unpack sequences.
        for i, value in enumerate(values):
            flat[i] = value
        array: np.ndarray[Any, Any] = flat.reshape(shape, order=order)
        return array
    dtype, data = _dtype(node.get("dtype"), path), blob(node.get("v"), path)
    if size * dtype.itemsize != len(data) or size > max(len(data), MAX_VALUES) or dtype.subdtype is not None:
        malformed(path, "an array doesn't fit its shape")
    array = np.ndarray(shape, dtype, buffer=bytearray(data), order=order)
    return array


add_codec("np.array", np.ndarray, "shape order dtype v", _encode_array, _decode_array)


# --- scalars ----------------------------------------------------------------------------------------------------------


def _encode_scalar(enc: Encoder, value: np.generic, path: Path) -> Json:
    if isinstance(value, (np.str_, np.bytes_)):  # their dtype would cut trailing zeros off
        whole = slice(None)
        plain = str.__getitem__(value, whole) if isinstance(value, np.str_) else bytes.__getitem__(value, whole)
        return {"dtype": value.dtype.kind, "v": enc.key(plain, path)}
    dtype = value.dtype
    if dtype.hasobject:
        refuse(path, "a structured scalar with object fields has no stored form", "store its fields apart")
    node: Json = {"dtype": _dtype_node(dtype, path)}
    if dtype.kind in "biuf" and dtype.itemsize <= 8:
        plain = value.item()
        if math.isfinite(plain) and abs(plain) <= SAFE_INT:
            return {**node, "v": plain}
    return {**node, "v": enc.blob(_bytes_of(value), path)}


def _decode_scalar(dec: Decoder, node: Json, path: Path) -> Any:
    kind, plain = node.get("dtype"), dec.value(node.get("v"), path)
    if kind in ("U", "S"):
        if type(plain) is not (str if kind == "U" else bytes):
            malformed(path, "damaged NumPy scalar")
        return np.str_(plain) if kind == "U" else np.bytes_(plain)
    dtype = _dtype(kind, path)
    if type(plain) is str:
        data = blob(plain, path)
        if len(data) != dtype.itemsize:
            malformed(path, "damaged NumPy scalar")
        return np.ndarray((), dtype, buffer=bytearray(data))[()]
    expected = {"b": bool, "i": int, "u": int, "f": float}.get(dtype.kind)
    if type(plain) is not expected:
        malformed(path, "damaged NumPy scalar")
    return np.array(plain, dtype)[()]


add_codec("np.scalar", None, "dtype v", _encode_scalar, _decode_scalar)
for _cls in {np.dtype(_code).type for _code in np.typecodes["All"]} - {np.object_}:
    BY_TYPE[_cls] = BY_TAG["np.scalar"]


def _encode_run(enc: Encoder, values: list[Any], path: Path) -> Json:
    array = np.array(values)
    plain = array.tolist()
    node: Json = {TAG: "np.list", "dtype": _dtype_node(array.dtype, path)}
    return {**node, "v": plain if are_verbatim(plain) else enc.blob(array.tobytes(), path)}


def _decode_run(dec: Decoder, node: Json, path: Path) -> list[Any]:
    dtype, plain = _dtype(node.get("dtype"), path), node.get("v")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        malformed(path, "a list of NumPy scalars has numbers")
    if type(plain) is str:
        return list(np.frombuffer(blob(plain, path), dtype))
    numbers = dec.values(plain, path)
    if not set(map(type, numbers)) <= {float if dtype.kind == "f" else int}:
        malformed(path, "a list of NumPy scalars has numbers of one type")
    return list(np.array(numbers, dtype))


#: Histories are often lists of these: one node for all of them instead of one for each.
add_codec("np.list", None, "dtype v", _encode_run, _decode_run)
for _code in np.typecodes["AllInteger"] + "efd":
    RUNS[np.dtype(_code).type] = _encode_run


def _encode_dtype(_: Encoder, value: np.dtype[Any], path: Path) -> Json:
    return {"v": "O" if value == np.dtype(object) else _dtype_node(value, path)}


def _decode_dtype(_: Decoder, node: Json, path: Path) -> np.dtype[Any]:
    return np.dtype(object) if node.get("v") == "O" else _dtype(node.get("v"), path)


add_codec("np.dtype", None, "v", _encode_dtype, _decode_dtype)
for _cls in {type(np.dtype(_code)) for _code in np.typecodes["All"]}:
    BY_TYPE[_cls] = BY_TAG["np.dtype"]
