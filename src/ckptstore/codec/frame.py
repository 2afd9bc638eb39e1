"""The frame: a header that describes itself, then the planes, then the tail; nothing after it.

::

    magic 4s | version u8 | codec u8 | word bytes u8 | planes u8 | plain size u32 | xxh3_64 of the plain bytes u64
    for each plane, least significant first:    mode u8 | word bytes it covers u8 | 0 u16 | lag u32 | stored size u32
    the planes, back to back
    the tail: plain size % word bytes, as they are

Little-endian throughout. The digest is over the plain bytes, so it catches damage in planes that are stored raw, a
wrong base and a wrong master alike.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ckptstore.codec.arrays import WORD
from ckptstore.codec.base import CODECS, MAX_CHUNK_BYTES, Buffer, CodecName
from ckptstore.errors import IntegrityError

MAGIC = b"CKPF"
VERSION = 1

_HEADER = struct.Struct("<4sBBBBIQ")
_PLANE = struct.Struct("<BBHII")
_MAX_PLANES = 8

#: How a plane is stored, see :mod:`ckptstore.codec.plane`.
RAW, ZSTD, NARROW, EVEN = 0, 1, 2, 3


@dataclass(frozen=True)
class Plane:
    """One entry of the table and its bytes.

    Attributes:
        num_bytes: word bytes the plane covers: those above the bytes of the planes before it.
        lag: each element is stored as its difference from the one ``lag`` before it; 0 = as it is.
    """

    mode: int
    num_bytes: int
    payload: Buffer
    lag: int = 0


@dataclass(frozen=True)
class Frame:
    """A parsed frame; payloads are views into its buffer."""

    codec: CodecName
    word_bytes: int
    size_bytes: int
    check: int
    planes: tuple[Plane, ...]
    tail: Buffer

    @property
    def num_words(self) -> int:
        """Whole words in the plain bytes."""
        return self.size_bytes // self.word_bytes


def damaged(reason: str) -> IntegrityError:
    """The one error of this room."""
    return IntegrityError(f"damaged frame: {reason}")


def build(
    codec: CodecName,
    *,
    word_bytes: int,
    size_bytes: int,
    check: int,
    planes: Sequence[Plane],
    tail: Buffer = b"",
    room: memoryview | None = None,
) -> Buffer:
    """The frame's bytes; copies every payload once.

    Args:
        room: memory for the whole frame, where the first plane's payload lies in its place already.
    """
    header = _HEADER.pack(MAGIC, VERSION, CODECS.index(codec), word_bytes, len(planes), size_bytes, check)
    head = b"".join([header, *(_PLANE.pack(p.mode, p.num_bytes, 0, p.lag, len(p.payload)) for p in planes)])
    if room is None:
        return b"".join([head, *(p.payload for p in planes), tail])
    room[: len(head)] = head
    end = len(head) + len(planes[0].payload)
    for part in (*(p.payload for p in planes[1:]), tail):
        start, end = end, end + len(part)
        room[start:end] = part
    return room[:end].toreadonly()


def overhead(num_planes: int) -> int:
    """Bytes of a frame that are not payload."""
    return _HEADER.size + num_planes * _PLANE.size


def parse(data: Buffer, *, size_bytes: int) -> Frame:
    """Check every field and every size; allocates nothing that the frame's own length doesn't bound.

    Raises:
        IntegrityError: not a frame of ``size_bytes`` plain bytes, or not exactly one.
    """
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    if len(view) < _HEADER.size:
        raise damaged("shorter than its header")
    magic, version, codec, word_bytes, num_planes, size, check = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise damaged("not a frame")
    if version != VERSION:
        raise damaged(f"frame version {version}; this ckptstore reads {VERSION}")
    if codec >= len(CODECS) or word_bytes not in WORD or num_planes > _MAX_PLANES:
        raise damaged("unknown codec, word width or number of planes")
    if size != size_bytes or size > MAX_CHUNK_BYTES:
        raise damaged(f"holds {size} plain bytes, expected {size_bytes}")
    position = overhead(num_planes)
    if len(view) < position:
        raise damaged("shorter than its header")
    entries = [_PLANE.unpack_from(view, overhead(i)) for i in range(num_planes)]
    tail = size % word_bytes if num_planes else 0
    if position + sum(stored for *_, stored in entries) + tail != len(view):
        raise damaged("its sizes don't add up to its length")
    planes = []
    for mode, num_bytes, zero, lag, stored in entries:
        if mode > EVEN or num_bytes not in WORD or zero or lag > size:
            raise damaged("unknown kind of plane")
        planes.append(Plane(mode, num_bytes, view[position : position + stored], lag))
        position += stored
    name = CODECS[codec]
    covered = sum(p.num_bytes for p in planes)
    if covered != (0 if name == "derived" else word_bytes) or (name in ("raw", "zstd") and word_bytes != 1):
        raise damaged("its planes don't make up its words")
    return Frame(name, word_bytes, size, check, tuple(planes), view[position:])
