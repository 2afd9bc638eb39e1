"""The ``torch.save`` archive around one tensor's bytes, and around one pickled value.

An archive is an uncompressed zip::

    archive/data.pkl    how to rebuild the value           ┐
    archive/byteorder   "little"                           │ head, a multiple of 64 bytes
    archive/version     "3"                                │
    archive/data/0      header, padded as torch pads it    ┘
                        the payload, as it lies in memory
    central directory                                      > foot

The tensor's bytes aren't known when the envelope is made, so their CRC field is 0. ``torch.load`` has never compared
it; Python's ``zipfile`` and ``unzip -t`` do, and complain about ``data/0``. All other CRCs are right.

Payloads are little-endian, like every machine torch has wheels for.

Source: PKWARE's APPNOTE 6.3; ``caffe2/serialize/inline_container.cc`` for the padding and the records that
``torch.load`` needs.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from ckptstore.format.dtypes import dtype_of
from ckptstore.format.pickling import Global, PickleWriter, dumps, integer, integers

ALIGNMENT = 64
_NAME = b"archive/"
#: Names are UTF-8; no data descriptors.
_FLAGS = 0x0800
#: 1980-01-01 00:00, the earliest a zip can say: the bytes must not depend on the clock.
_TIME, _DATE = 0, 0x21
_MAX_32 = 0xFFFFFFFF
_BYTEORDER = b"little"
_VERSION = b"3\n"


class Envelope(NamedTuple):
    """What stands before and behind a payload."""

    head: bytes
    foot: bytes


class _Entry(NamedTuple):
    """A record of the archive; ``extra`` is the local header's."""

    name: bytes
    size: int
    crc: int
    offset: int
    extra: bytes = b""

    @property
    def is_wide(self) -> bool:
        """Whether the size needs zip64 fields."""
        return self.size >= _MAX_32

    def _common(self, extra_size: int) -> tuple[int, ...]:
        size = _MAX_32 if self.is_wide else self.size
        needed = 45 if self.is_wide else 20
        return (needed, _FLAGS, 0, _TIME, _DATE, self.crc, size, size, len(self.name), extra_size)

    def local(self) -> bytes:
        """Header before the record's bytes."""
        return struct.pack("<4s5H3I2H", b"PK\x03\x04", *self._common(len(self.extra))) + self.name + self.extra

    def central(self) -> bytes:
        """Entry in the central directory."""
        extra = _zip64_sizes(self.size) if self.is_wide else b""
        fields = self._common(len(extra))
        head = struct.pack("<4sH5H3I2H3H2I", b"PK\x01\x02", fields[0], *fields, 0, 0, 0, 0, self.offset)
        return head + self.name + extra


def _zip64_sizes(size: int) -> bytes:
    return struct.pack("<HHQQ", 1, 16, size, size)


def _directory(entries: list[_Entry], offset: int) -> bytes:
    """The central directory at ``offset``, and the records that end the archive."""
    body = b"".join(entry.central() for entry in entries)
    count, size = len(entries), len(body)
    wide = b""
    if offset + size >= _MAX_32:
        record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        wide = record + struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, min(offset, _MAX_32), 0)
    return body + wide + end


def _small_records(pickle: bytes) -> tuple[bytes, list[_Entry]]:
    """The records every archive has, back to back, and their directory entries."""
    out = bytearray()
    entries = []
    for name, data in ((b"data.pkl", pickle), (b"byteorder", _BYTEORDER), (b"version", _VERSION)):
        entry = _Entry(_NAME + name, len(data), zlib.crc32(data), len(out))
        entries.append(entry)
        out += entry.local() + data
    return bytes(out), entries


def value_archive(value: Any) -> bytes:
    """``torch.save(value)`` for a value without tensors.

    Raises:
        NoPickleFormError: the value, or one inside it, is of a type without a stock form.
    """
    records, entries = _small_records(dumps(value))
    return records + _directory(entries, len(records))


@lru_cache(maxsize=4096)
def tensor_envelope(dtype: str, shape: tuple[int, ...]) -> Envelope:
    """What makes the row-major bytes of a tensor between ``head`` and ``foot`` a ``torch.save`` archive of it.

    ``len(head)`` is a multiple of 64, so that a payload aligned in the file is aligned in the archive too.

    Raises:
        FormatError: the dtype is unknown.
    """
    size = prod(shape) * dtype_of(dtype).itemsize
    records, entries = _small_records(_tensor_pickle(dtype, shape))
    wide = _zip64_sizes(size) if size >= _MAX_32 else b""
    bare = _Entry(_NAME + b"data/0", size, 0, len(records), wide)
    padding = -(len(records) + len(bare.local())) % ALIGNMENT
    if 0 < padding < 4:  # an extra field is four bytes at least
        padding += ALIGNMENT
    extra = b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4) if padding else b""
    payload = bare._replace(extra=wide + extra)
    head = records + payload.local()
    return Envelope(head, _directory([*entries, payload], len(head) + size))


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What ``torch.save`` pickles for a contiguous tensor in a storage of its own that doesn't require grad."""
    before, counts_bytes, after = _pickle_around_numbers(dtype)
    numel = prod(shape)
    size = integer(numel * dtype_of(dtype).itemsize if counts_bytes else numel)
    return before + size + b"tQK\x00" + integers(shape) + integers(_strides(shape)) + after


@lru_cache
def _pickle_around_numbers(dtype: str) -> tuple[bytes, bool, bytes]:
    """The pickle's parts before and after size, shape and strides, and whether the size is in bytes."""
    known = dtype_of(dtype)
    typed = known.stock_global.endswith("Storage")
    writer = PickleWriter()
    writer.reference(Global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
    writer.op(b"((")
    writer.text("storage")
    writer.reference(Global("torch", known.stock_global) if typed else Global("torch.storage", "UntypedStorage"))
    writer.text("0")
    writer.text("cpu")
    writer.op(b"<numbers>")
    writer.value(False)
    writer.call(Global("collections", "OrderedDict"))
    if not typed:
        writer.reference(Global("torch", known.stock_global))
    writer.op(b"tR")
    before, _, after = writer.finish().partition(b"<numbers>")
    return before, not typed, after


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements, as torch counts them for empty tensors too."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
