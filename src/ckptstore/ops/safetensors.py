"""The safetensors file format: a length, a JSON header, and the bytes. Reading believes nothing before it was bounded.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckptstore.errors import FormatError, StateError
from ckptstore.format.dtypes import itemsize

#: torch's name -> the format's.
NAMES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
}
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
#: The format's own limit.
MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` is its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The bytes before the data of these (name, dtype, shape), and where in the file each tensor starts.

    Raises:
        StateError: a dtype the format lacks; names the tensor.
    """
    document: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    starts = []
    for name, dtype, shape in tensors:
        if dtype not in NAMES:
            raise StateError(
                f"{name!r} is {dtype}, which safetensors can't hold", hint="export with --format dcp", key=name
            )
        size = prod(shape) * itemsize(dtype)
        document[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts.append(at)
        at += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = _LENGTH.pack(len(text)) + text
    return head, [len(head) + start for start in starts]


def read_header(path: Path, fd: int) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of an open file, in file order, and its metadata.

    Raises:
        FormatError: not such a file, or its sizes don't fit.
    """

    def damaged(why: str) -> FormatError:
        return FormatError(f"{path} is not a whole safetensors file: {why}", path=str(path))

    size = os.fstat(fd).st_size
    raw = os.pread(fd, _LENGTH.size, 0)
    length = _LENGTH.unpack(raw)[0] if len(raw) == _LENGTH.size else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH.size):
        raise damaged(f"its header would have {length} bytes")
    try:
        document = json.loads(os.pread(fd, length, _LENGTH.size), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(str(error)) from None
    if not isinstance(document, dict):
        raise damaged("its header is no object")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged("its metadata are not texts")
    begin = _LENGTH.size + length
    entries = sorted((_entry(name, value, begin, damaged) for name, value in document.items()), key=lambda e: e.start)
    at = begin
    for entry in entries:
        if entry.start != at:
            raise damaged(f"the bytes of {entry.name!r} leave a gap or overlap others")
        at += entry.size_bytes
    if at != size:
        raise damaged(f"it has {size} bytes, its header describes {at}")
    return entries, metadata


def _entry(name: str, value: Any, begin: int, damaged: Any) -> Entry:
    try:
        dtype = _DTYPES.get(value["dtype"])
        shape, (start, end) = value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged(f"the entry of {name!r} is malformed") from None
    if dtype is None:
        raise damaged(f"{name!r} has the dtype {value['dtype']!r}, which is unknown here")
    if type(shape) is not list or not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, start, end)):
        raise damaged(f"the numbers of {name!r} are malformed")
    if end - start != prod(shape) * itemsize(dtype):
        raise damaged(f"{name!r} has {end - start} bytes, which is not its shape")
    return Entry(name, dtype, tuple(shape), begin + start, end - start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found
