"""One plane as a frame keeps it, and back.

======  ==============================================================================================================
RAW     as it is
ZSTD    one zstd frame with checksum and content size, tuned as a Huffman coder
NARROW  mostly a few successive values: each byte, less a bias, cut to 4, 2 or 1 bits, packed, and coded; the bytes that
        don't fit follow in a list. A Huffman code spends at least one bit and equal time on each symbol, so that it is
        smaller and faster when several elements share one
EVEN    every element even (the rotated sign bit of numbers that are never negative): the plane in as many segments as
        an element has bits, and the last segment's bits in the free low bits of the others
======  ==============================================================================================================
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import zstandard

from ckptstore import native
from ckptstore.codec.arrays import WORD, Bytes, Words
from ckptstore.codec.base import Buffer
from ckptstore.codec.frame import EVEN, NARROW, RAW, ZSTD, Plane, damaged
from ckptstore.codec.measure import Trait
from ckptstore.codec.scratch import SCRATCH

#: A plane that shrinks by less is stored raw, which decodes faster.
_WORTH = 0.98

#: bits an element is cut to | mode of the packed bytes | mode of the list | bias | packed size | elements in the list
_NARROW = struct.Struct("<BBBBII")


def store(words: Words, trait: Trait, slot: str) -> Plane:
    """The plane as it goes into the frame, in the way its measured ``trait`` suggests and its bytes allow.

    The payload may be a view of ``words`` or of scratch memory named ``slot``.
    """
    if trait.is_even and len(words) >= 8 * words.itemsize and (halved := _halve(words, slot)) is not None:
        return Plane(EVEN, words.itemsize, halved)
    if words.itemsize > 1 or trait.is_dense:
        return Plane(RAW, words.itemsize, _view(words))
    lagged = _difference(words, trait.lag) if trait.lag else words
    if trait.narrow_bits:
        payload = _narrow(lagged, trait.narrow_bits, trait.bias)
        if len(payload) < _WORTH * len(words):
            return Plane(NARROW, 1, payload, trait.lag)
    mode, packed = _deflate(lagged)
    if mode == RAW:
        return Plane(RAW, 1, _view(words))
    return Plane(mode, 1, packed, trait.lag)


def fetch(plane: Plane, count: int, slot: str) -> Words:
    """The plane's ``count`` words, in scratch memory named ``slot`` or as a view of the payload.

    Raises:
        IntegrityError: it doesn't hold exactly that many.
    """
    if plane.mode == EVEN:
        if plane.lag:
            raise damaged("a plane of even words has no lag")
        return _unhalve(plane, count, slot)
    if plane.mode == RAW:
        if plane.lag:
            raise damaged("a raw plane has no lag")
        return np.frombuffer(_exactly(plane.payload, count * plane.num_bytes), WORD[plane.num_bytes])
    if plane.num_bytes != 1:
        raise damaged("a coded plane is one byte wide")
    if plane.mode == NARROW:
        octets = _widen(plane.payload, count, slot)
    else:
        octets = np.frombuffer(_inflate(plane.payload, count), np.uint8)
    return _accumulate(octets, plane.lag) if plane.lag else octets


def deflate_matching(data: Bytes) -> Buffer:
    """zstd for bytes that may repeat: the whole chunk, not a plane."""
    return SCRATCH.match.compress(_view(data))


# --- zstd


def _deflate(octets: Bytes) -> tuple[int, Buffer]:
    packed = SCRATCH.entropy.compress(_view(octets))
    return (ZSTD, packed) if len(packed) < _WORTH * len(octets) else (RAW, _view(octets))


def _inflate(payload: Buffer, size: int) -> bytes:
    """Decompress exactly one zstd frame of exactly ``size`` plain bytes.

    The frame's own idea of its size is checked first: the library allocates what the header says.
    """
    try:
        parameters = zstandard.get_frame_parameters(payload)
        if parameters.content_size != size or parameters.dict_id or not parameters.has_checksum:
            raise damaged("a plane has the wrong size")
        plain = SCRATCH.decompressor.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise damaged(f"zstd: {error}") from None
    if len(plain) != size:
        raise damaged("a plane has the wrong size")
    return plain


def _exactly(payload: Buffer, size: int) -> Buffer:
    if len(payload) != size:
        raise damaged("a plane has the wrong size")
    return payload


def _unpack(mode: int, payload: Buffer, size: int) -> Bytes:
    if mode == ZSTD:
        return np.frombuffer(_inflate(payload, size), np.uint8)
    if mode == RAW:
        return np.frombuffer(_exactly(payload, size), np.uint8)
    raise damaged("unknown kind of plane")


def _view(words: Words) -> memoryview:
    return words.view(np.uint8).data


# --- narrow


def _narrow(octets: Bytes, bits: int, bias: int) -> bytes:
    share = 8 // bits
    groups = -(-len(octets) // share)
    packed, cut = SCRATCH.words("packed", groups, 1), SCRATCH.words("narrow", groups * share, 1)
    if native.is_available():
        misfits = cut[: native.narrow(octets, bits, bias, packed, cut)]
    else:
        misfits = _cut_and_pack(octets, bits, bias, packed, cut)
    mode, head = _deflate(packed)
    misfit_mode, rest = _deflate(misfits) if len(misfits) else (RAW, b"")
    return b"".join([_NARROW.pack(bits, mode, misfit_mode, bias, len(head), len(misfits)), head, rest])


def _cut_and_pack(octets: Bytes, bits: int, bias: int, packed: Bytes, cut: Bytes) -> Bytes:
    """Fill ``packed``, with ``cut`` for whole groups in between; returns what the misfits exceed it by."""
    count, share, escape = len(octets), 8 // bits, (1 << bits) - 1
    np.subtract(octets, np.uint8(bias), out=cut[:count])
    cut[count:] = 0
    where = np.flatnonzero(cut >= escape)
    misfits: Bytes = cut[where] - np.uint8(escape)
    cut[where] = escape
    wide, spare = cut.view(WORD[share]), SCRATCH.words("spread", len(packed), share)
    steps = _SPREAD[bits]
    for i in reversed(range(len(steps))):
        np.right_shift(wide, steps[i][0], out=spare)
        np.bitwise_or(wide, spare, out=wide)
        if i:
            np.bitwise_and(wide, steps[i - 1][1], out=wide)
    np.copyto(packed, wide, casting="unsafe")
    return misfits


def _widen(payload: Buffer, count: int, slot: str) -> Bytes:
    if len(payload) < _NARROW.size:
        raise damaged("a plane has the wrong size")
    bits, mode, misfit_mode, bias, packed_size, num_misfits = _NARROW.unpack_from(payload)
    if bits not in _SPREAD or num_misfits > count or packed_size > len(payload) - _NARROW.size:
        raise damaged("a narrow plane has the wrong size")
    share = 8 // bits
    groups = -(-count // share)
    body = memoryview(payload)[_NARROW.size :]
    packed = _unpack(mode, body[:packed_size], groups)
    misfits = _unpack(misfit_mode, body[packed_size:], num_misfits)
    room = SCRATCH.words(slot, groups * share, 1)
    octets = room[:count]
    if native.is_available():
        found = native.widen(packed, bits, bias, misfits, octets)
    else:
        found = _unpack_and_fill(packed, bits, bias, misfits, room, count)
    if found != num_misfits:
        raise damaged("a narrow plane has the wrong number of misfits")
    return octets


def _unpack_and_fill(packed: Bytes, bits: int, bias: int, misfits: Bytes, room: Bytes, count: int) -> int:
    """Fill the first ``count`` bytes of ``room``, which is for whole groups; returns how many misfits that takes."""
    escape = (1 << bits) - 1
    wide = room.view(WORD[8 // bits])
    spare = SCRATCH.words("spread", len(wide), wide.itemsize)
    np.copyto(wide, packed)
    for shift, mask in _SPREAD[bits]:
        np.left_shift(wide, shift, out=spare)
        np.bitwise_or(wide, spare, out=wide)
        np.bitwise_and(wide, mask, out=wide)
    octets = room[:count]
    where = np.flatnonzero(octets == escape)
    if len(where) == len(misfits):
        octets[where] = misfits + np.uint8(escape)  # what is there is the escape
        np.add(octets, np.uint8(bias), out=octets)
    return len(where)


def _spread_steps(bits: int) -> list[tuple[int, np.unsignedinteger[Any]]]:
    """(shift, mask) of the steps that move the fields of a packed byte to the bytes of a word, half of them a step."""
    share = 8 // bits
    steps, half = [], share // 2
    while half:
        field = (1 << (bits * half)) - 1
        mask = sum(field << (8 * half * i) for i in range(share // half))
        steps.append((half * (8 - bits), WORD[share].type(mask)))
        half //= 2
    return steps


_SPREAD = {bits: _spread_steps(bits) for bits in (1, 2, 4)}


# --- even


def _segments(words: Words) -> tuple[list[Words], Words, Words]:
    """Equal segments, one per bit of an element but the last; the last one; and what is left over."""
    width = 8 * words.itemsize
    length = len(words) // width
    parts = [words[i * length : (i + 1) * length] for i in range(width)]
    return parts[:-1], parts[-1], words[width * length :]


def _halve(words: Words, slot: str) -> memoryview | None:
    """The packed words, or None if they aren't all even."""
    kept, dropped, rest = _segments(words)
    packed = SCRATCH.words(slot, len(words) - len(dropped), words.itemsize)
    if native.is_available():
        return _view(packed) if native.halve(words, packed) else None
    if np.bitwise_or.reduce(words) & 1:
        return None
    spare = SCRATCH.words("spread", len(dropped), words.itemsize)
    for i, segment in enumerate(kept):
        np.right_shift(dropped, i + 1, out=spare)
        np.bitwise_and(spare, 1, out=spare)
        np.bitwise_or(segment, spare, out=packed[i * len(spare) : (i + 1) * len(spare)])
    packed[len(kept) * len(dropped) :] = rest
    return _view(packed)


def _unhalve(plane: Plane, count: int, slot: str) -> Words:
    words = SCRATCH.words(slot, count, plane.num_bytes)
    kept, dropped, rest = _segments(words)
    stored = (count - len(dropped)) * plane.num_bytes
    packed = np.frombuffer(_exactly(plane.payload, stored), words.dtype)
    if native.is_available():
        native.unhalve(packed, words)
        return words
    dropped[:] = 0
    spare = SCRATCH.words("spread", len(dropped), plane.num_bytes)
    for i, segment in enumerate(kept):
        source = packed[i * len(spare) : (i + 1) * len(spare)]
        np.bitwise_and(source, 1, out=spare)
        np.left_shift(spare, i + 1, out=spare)
        np.bitwise_or(dropped, spare, out=dropped)
        np.bitwise_xor(source, np.bitwise_and(source, 1, out=spare), out=segment)
    rest[:] = packed[len(kept) * len(dropped) :]
    return words


# --- lag


def _difference(octets: Bytes, lag: int) -> Bytes:
    out = SCRATCH.words("lagged", len(octets), 1)
    out[:lag] = octets[:lag]
    np.subtract(octets[lag:], octets[:-lag], out=out[lag:])
    return out


def _accumulate(octets: Bytes, lag: int) -> Bytes:
    """Undo :func:`_difference`; in NumPy by doubling strides: each pass is one vector addition, and there are few."""
    if native.is_available():
        native.accumulate(octets, lag, out := SCRATCH.words("sum0", len(octets), 1))
        return out
    source, other = octets, (SCRATCH.words("sum0", len(octets), 1), SCRATCH.words("sum1", len(octets), 1))
    turn = 0
    while lag < len(octets):
        target = other[turn]
        target[:lag] = source[:lag]
        np.add(source[lag:], source[:-lag], out=target[lag:])
        source, turn, lag = target, 1 - turn, 2 * lag
    return source
