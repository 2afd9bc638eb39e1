"""encode and decode: measure the chunk, take the chain that pays, and undo whichever chain a frame names."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import xxhash

from ckptstore.codec import measure, plane, planes, sample, words
from ckptstore.codec.arrays import WORD, Bytes, Words
from ckptstore.codec.base import BLOCK, FLOAT_BYTES, MAX_CHUNK_BYTES, Buffer, CodecName, Encoded
from ckptstore.codec.frame import RAW, ZSTD, Frame, Plane, build, damaged, overhead, parse
from ckptstore.codec.scratch import SCRATCH

#: Fewer plain bytes than this are stored raw: headers would eat the gain.
_SMALL_BYTES = 256

#: From so many bytes on xxh3_64 is the lower half of xxh3_128. Source: XXH3_hashLong_128b_internal in xxhash.h.
_HALF_BYTES = 241

#: A delta ties the chunk to its base and makes a restore read two frames: it must save this share of plain size.
_DELTA_MARGIN = 0.04

#: Numbers may repeat as whole words (masks, tables, tiled rows), which planes hide: zstd is tried too when planes
#: would store less than this, or when fewer of the sampled words than that are distinct.
_REDUNDANT = 0.5
_DISTINCT = 0.9


def encode(
    plain: Buffer,
    *,
    dtype: str,
    base: Buffer | None = None,
    master: Buffer | None = None,
    row: int = 0,
    digest: str | None = None,
    compress: bool = True,
) -> Encoded:
    """Encode one chunk with the chain that stores it smallest at acceptable speed. Equal input, equal frame.

    Args:
        plain: at most ``MAX_CHUNK_BYTES`` contiguous bytes.
        dtype: torch's name without ``torch.``; decides how the bytes are read as numbers. Unknown names are opaque.
        base: the same chunk of an earlier save, whole; a delta against it is made where that pays.
        master: for a bf16 chunk, the fp32 chunk it may be the rounding of.
        row: elements of the tensor's last dimension, 0 if unknown: some tensors repeat from row to row.
        digest: xxh3_128 of the plain bytes as hex digits, if it is known: the frame's comes with it.
        compress: False stores the bytes as they are.

    Returns:
        When ``codec`` is ``delta`` or ``derived``, :func:`decode` needs ``base`` or ``master`` again, as its ``base``.

    Thread-safe; releases the GIL in its long loops.
    """
    data = _bytes(plain)
    if len(data) > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk has at most {MAX_CHUNK_BYTES} bytes, not {len(data)}")
    check = _check(data, digest)
    if not compress or not len(data):
        return _raw(data, check)
    if dtype == "bfloat16" and master is not None and (derived := _derived(data, _bytes(master), check)) is not None:
        return derived
    if len(data) < _SMALL_BYTES:
        return _raw(data, check)
    width = FLOAT_BYTES.get(dtype)
    if width is None:
        return _opaque(data, check)
    count = len(data) // width
    numbers = data[: count * width].view(WORD[width])
    old = None
    if base is not None and len(_bytes(base)) == len(data):
        old = _bytes(base)[: count * width].view(WORD[width])
    pair = 2 if dtype.startswith("complex") else 1
    old, traits = _measure(numbers, old, (pair, pair * row))
    best = _as_planes(data, check, numbers, old, traits)
    if old is None and _may_repeat(numbers, traits):
        return min(best, _opaque(data, check), key=lambda e: len(e.frame))
    return best


def derive(plain: Buffer, master: Buffer, *, digest: str | None = None) -> Encoded | None:
    """The frame of a bf16 chunk that is its fp32 ``master`` rounded, bit for bit; None if it isn't."""
    data = _bytes(plain)
    return _derived(data, _bytes(master), _check(data, digest))


def rounded(master: Buffer) -> bytes:
    """The bf16 numbers that a derived frame gives back for this fp32 ``master``."""
    out = np.empty(len(_bytes(master)) // 2, np.uint8)
    _round(out, master)
    return out.tobytes()


def decode(
    frame: Buffer,
    *,
    size_bytes: int,
    base: Buffer | None = None,
    out: memoryview | None = None,
    is_checked_by_caller: bool = False,
) -> memoryview:
    """The chunk's plain bytes, bit for bit.

    Args:
        frame: exactly one frame.
        size_bytes: the plain size, from the manifest; a frame that says otherwise is refused before allocating.
        base: what ``delta`` (base) or ``derived`` (master) was encoded against; ignored for other codecs.
        out: writable contiguous bytes to decode into; its content is undefined after an error.
        is_checked_by_caller: the caller compares the plain bytes with a digest of its own, so the frame's is left out.

    Returns:
        ``out``, or fresh memory.

    Raises:
        IntegrityError: damaged, truncated or trailing bytes, or not the right base.
    """
    parsed = parse(frame, size_bytes=size_bytes)
    if out is None:
        out = np.empty(size_bytes, np.uint8).data
    elif out.readonly or out.nbytes != size_bytes or not out.c_contiguous:
        raise ValueError(f"out must be {size_bytes} writable, contiguous bytes")
    target = _bytes(out)
    if parsed.codec == "derived":
        _round(target, base)
    else:
        _join(parsed, target, base)
    if not is_checked_by_caller and xxhash.xxh3_64_intdigest(target.data) != parsed.check:
        raise damaged("the plain bytes differ from their digest (damage, or not the right base)")
    return out


def _bytes(buffer: Buffer) -> Bytes:
    return np.frombuffer(buffer, np.uint8)


def _check(data: Bytes, digest: str | None) -> int:
    """xxh3_64 of the bytes; ``digest`` is their xxh3_128."""
    if digest is not None and len(data) >= _HALF_BYTES:
        return int(digest[-16:], 16)
    return xxhash.xxh3_64_intdigest(data.data)


def _raw(data: Bytes, check: int) -> Encoded:
    kept = Plane(RAW, 1, data.data)
    return Encoded("raw", build("raw", word_bytes=1, size_bytes=len(data), check=check, planes=[kept]))


def _opaque(data: Bytes, check: int) -> Encoded:
    packed = plane.deflate_matching(data)
    if len(packed) >= 0.98 * len(data):
        return _raw(data, check)
    kept = Plane(ZSTD, 1, packed)
    return Encoded("zstd", build("zstd", word_bytes=1, size_bytes=len(data), check=check, planes=[kept]))


# --- encode


def _as_planes(data: Bytes, check: int, numbers: Words, old: Words | None, traits: list[measure.Trait]) -> Encoded:
    if all(t.is_dense and not t.is_even for t in traits):
        return _raw(data, check)
    groups = planes.group(traits)
    room, first = None, None
    if traits[0].is_dense and not traits[0].is_even:
        # It stays as it is and can go to its place at once: most bytes of a chunk are like that.
        room = np.empty(len(data) - 1, np.uint8)  # a longer frame is not kept
        first = room[overhead(len(groups)) :][: groups[0] * len(numbers)].view(WORD[groups[0]])
    parts = planes.split(numbers, old, groups, first)
    firsts = accumulate(groups[:-1], initial=0)
    stored = [plane.store(part, traits[i], f"stored{i}") for part, i in zip(parts, firsts, strict=True)]
    tail = data[numbers.nbytes :].data
    if overhead(len(stored)) + sum(len(p.payload) for p in stored) + len(tail) >= len(data):
        return _raw(data, check)
    codec: CodecName = "planes" if old is None else "delta"
    frame = build(
        codec,
        word_bytes=numbers.itemsize,
        size_bytes=len(data),
        check=check,
        planes=stored,
        tail=tail,
        room=None if room is None else room.data,
    )
    return Encoded(codec, frame)


def _may_repeat(numbers: Words, traits: list[measure.Trait]) -> bool:
    if measure.cost(traits) < _REDUNDANT:
        return True
    return numbers.itemsize >= 4 and sample.distinct(numbers, sample.places(len(numbers))) < _DISTINCT


def _derived(data: Bytes, master: Bytes, check: int) -> Encoded | None:
    fits = len(data) and len(data) % 2 == 0 and len(master) == 2 * len(data)
    if not fits or not words.equals_rounded(data.view("<u2"), master.view("<u4")):
        return None
    return Encoded("derived", build("derived", word_bytes=2, size_bytes=len(data), check=check, planes=()))


def _measure(numbers: Words, old: Words | None, lags: tuple[int, ...]) -> tuple[Words | None, list[measure.Trait]]:
    """The base, if a delta pays, and how each byte plane is best kept."""
    at = sample.places(len(numbers))
    traits = measure.traits(sample.histograms(numbers, None, at))
    if old is not None:
        delta_traits = measure.traits(sample.histograms(numbers, old, at))
        if measure.cost(delta_traits) < measure.cost(traits) - _DELTA_MARGIN:
            traits = delta_traits
        else:
            old = None
    for lag in lags if traits[-1].may_lag else ():
        first = int(np.searchsorted(at, lag))
        if lag > 0 and first < len(at) // 2:
            traits[-1] = measure.with_lag(traits[-1], lag, sample.steps(numbers, old, at[first:], lag))
    return old, traits


# --- decode


def _round(target: Bytes, base: Buffer | None) -> None:
    if base is None:
        raise damaged("a derived chunk needs its fp32 master")
    source = _bytes(base)
    if len(target) % 2 or len(source) != 2 * len(target):
        raise damaged("the fp32 master has the wrong size")
    numbers, master = target.view("<u2"), source.view("<u4")
    spare = SCRATCH.words("spare", min(BLOCK, len(numbers)), 4)
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK]
        words.round_to_bfloat16(master[start : start + BLOCK], block, spare[: len(block)])


def _join(frame: Frame, target: Bytes, base: Buffer | None) -> None:
    count, width = frame.num_words, frame.word_bytes
    numbers, tail = target[: count * width].view(WORD[width]), target[count * width :]
    old: Words | None = None
    if frame.codec == "delta":
        if base is None:
            raise damaged("a delta needs its base")
        whole = _bytes(base)
        if len(whole) != len(target):
            raise damaged("the base has the wrong size")
        old = whole[: count * width].view(WORD[width])
    tail[:] = _bytes(frame.tail)
    parts = [plane.fetch(p, count, f"plane{i}") for i, p in enumerate(frame.planes)]
    planes.join(parts, old, rotated=frame.codec == "planes", out=numbers)
