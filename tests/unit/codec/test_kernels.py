"""With the C kernels and without, equal chunks make equal frames, and equal frames make equal chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from chunks import KINDS, OPAQUE, WIDTHS, base_of, chunk, noise, stepped, words
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore import native
from ckptstore.codec import decode, encode, plane, planes, sample
from ckptstore.codec import words as maps
from ckptstore.codec.frame import EVEN, RAW, Plane
from ckptstore.errors import IntegrityError

#: Around what the kernels treat at once, and what they pack together.
EDGES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097, 65_537)
COUNTS = st.one_of(st.integers(0, 300), st.sampled_from(EDGES))
OFFSETS = st.sampled_from([0, 1, 3, 7])
SEEDS = st.integers(0, 50)


@pytest.fixture(scope="module", autouse=True)
def way() -> str:
    """Both, in each test."""
    return "both"


@contextmanager
def _numpy() -> Iterator[None]:
    kept, native._kernels = native._kernels, None
    try:
        yield
    finally:
        native._kernels = kept


def _both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What it gives with kernels and without, or the error that it raises."""

    def run() -> Any:
        try:
            return work()
        except IntegrityError as error:
            return str(error)

    assert native.is_available()
    with_kernels = run()
    with _numpy():
        return with_kernels, run()


def _at(data: bytes, offset: int) -> memoryview:
    """Writable, at an odd address, and not a byte longer."""
    memory = memoryview(bytearray(offset + len(data)))[offset:]
    memory[:] = data
    return memory


def _unaligned(array: np.ndarray, offset: int) -> np.ndarray:
    return np.frombuffer(_at(array.tobytes(), offset), array.dtype)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from((*WIDTHS, *OPAQUE)),
    kind=st.sampled_from(KINDS),
    count=COUNTS,
    tail=st.integers(0, 7),
    seed=SEEDS,
    base=st.sampled_from(["none", "equal", "near", "wide", "far"]),
    row=st.sampled_from([0, 1, 7, 64, 100_000]),
    offsets=st.tuples(OFFSETS, OFFSETS, OFFSETS),
)
def test_frames_and_chunks_are_the_same(
    dtype: str, kind: str, count: int, tail: int, seed: int, base: str, row: int, offsets: tuple[int, int, int]
) -> None:
    width = WIDTHS.get(dtype, 4)
    plain = chunk(kind, width, count, seed, tail)
    old = base_of(base, plain, kind, width, count, seed, tail)
    chunk_at, old_at = _at(plain, offsets[0]), None if old is None else _at(old, offsets[1])
    one, other = _both(lambda: encode(chunk_at, dtype=dtype, base=old_at, row=row))
    assert one == other
    frame = _at(one.frame, offsets[2])
    for got in _both(lambda: bytes(decode(frame, size_bytes=len(plain), base=old_at))):
        assert got == plain
    if old is not None:
        for memory in _both(lambda: decode(frame, size_bytes=len(plain), base=(m := _at(old, offsets[1])), out=m)):
            assert bytes(memory) == plain


@settings(max_examples=100, deadline=None)
@given(count=COUNTS, seed=SEEDS, offset=OFFSETS, wrong=st.one_of(st.none(), st.integers(0, 1 << 17)))
def test_rounding_is_the_same(count: int, seed: int, offset: int, wrong: int | None) -> None:
    master = _unaligned(words("random", 4, count, seed), offset)

    def rounded() -> np.ndarray:
        out = np.empty(count, "<u2")
        maps.round_to_bfloat16(master, out, np.empty_like(master))
        return out

    one, other = _both(rounded)
    assert np.array_equal(one, other)
    if wrong is not None and count:
        one[wrong % count] ^= 1
    expected = wrong is None or not count
    assert _both(lambda: maps.equals_rounded(one, master)) == (expected, expected)


def _groupings(size: int) -> list[tuple[int, ...]]:
    """The ways to cover so many bytes with planes."""
    return [()] if not size else [(n, *rest) for n in (1, 2, 4) if n <= size for rest in _groupings(size - n)]


LAYOUTS = [(1, (1,))] + [
    (width, rest + head)
    for width in (2, 4, 8)
    for rest, head in itertools.product(_groupings(width - 2), _groupings(2))
]


def _joined(parts: list[np.ndarray], old: np.ndarray | None, rotated: bool, *, in_place: bool = False) -> bytes:
    width = sum(p.itemsize for p in parts)
    memory = _at(bytes(width * len(parts[0])) if old is None else old.tobytes(), 3)
    out = np.frombuffer(memory, f"<u{width}")
    planes.join(parts, out if in_place else old, rotated=rotated, out=out)
    return out.tobytes()


@pytest.mark.parametrize("width,sizes", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 7, 31, 65, 2049, 5000])
def test_planes_are_the_same_in_every_layout(width: int, sizes: tuple[int, ...], count: int) -> None:
    numbers = _unaligned(words("random", width, count, 1), 1)
    near = _unaligned(np.frombuffer(stepped(numbers.tobytes(), width, 3, 900 if width > 1 else 4), f"<u{width}"), 3)
    expected = (numbers.tobytes(), numbers.tobytes())
    for old in (None, near, numbers):
        one, other = _both(lambda old=old: [p.tobytes() for p in planes.split(numbers, old, list(sizes))])
        assert one == other
        parts = [_unaligned(np.frombuffer(p, f"<u{s}"), 1) for p, s in zip(one, sizes, strict=True)]
        assert _both(lambda p=parts, o=old: _joined(p, o, o is None)) == expected
        if old is not None:
            assert _both(lambda p=parts, o=old: _joined(p, o, False, in_place=True)) == expected
        else:  # a frame may ask for neither map
            one, other = _both(lambda p=parts: _joined(p, None, False))
            assert one == other


@settings(max_examples=200, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 4]),
    bias=st.integers(0, 255),
    count=COUNTS,
    share=st.sampled_from([0, 1, 20, 500, 1000]),
    seed=SEEDS,
    offset=OFFSETS,
    num_misfits=st.one_of(st.none(), st.integers(0, 400)),
)
def test_narrow_planes_are_the_same(
    bits: int, bias: int, count: int, share: int, seed: int, offset: int, num_misfits: int | None
) -> None:
    fit = (noise(count, seed) % np.uint64((1 << bits) - 1)).astype(np.uint8)
    any_ = (noise(count, seed + 1) >> np.uint64(56)).astype(np.uint8)
    octets = np.where(noise(count, seed + 2) % np.uint64(1000) < share, any_, fit + np.uint8(bias)).astype(np.uint8)
    octets = _unaligned(octets, offset)
    one, other = _both(lambda: plane._narrow(octets, bits, bias))
    assert one == other
    payload = _at(one, offset)
    for got in _both(lambda: plane._widen(payload, count, "test").tobytes()):
        assert got == octets.tobytes()
    # Whatever a frame says: as many elements of any kind, and any number of misfits.
    groups, misfits = -(-count * bits // 8), num_misfits or 0
    packed, rest = (noise(n, seed + 3).astype(np.uint8).tobytes() for n in (groups, misfits))
    lie = plane._NARROW.pack(bits, RAW, RAW, bias, groups, misfits) + packed + rest
    one, other = _both(lambda: plane._widen(lie, count, "test").tobytes())
    assert one == other


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 127, 129, 2049, 70_001])
def test_even_planes_are_the_same(width: int, count: int) -> None:
    even = _unaligned(words("random", width, count, 2) & ~np.array(1, f"<u{width}"), 1)
    one, other = _both(lambda: plane._halve(even, "test").tobytes())
    assert one == other
    kept = Plane(EVEN, width, _at(one, 1))
    assert _both(lambda: plane.fetch(kept, count, "test").tobytes()) == (even.tobytes(), even.tobytes())
    for at in {0, count // 2, count - count // (8 * width), count - 1} if count else ():
        odd = even.copy()
        odd[min(at, count - 1)] |= 1
        assert _both(lambda odd=odd: plane._halve(odd, "test")) == (None, None)
    wrong = Plane(EVEN, width, _at(noise(len(one), 1).astype(np.uint8).tobytes(), 1))
    one, other = _both(lambda: plane.fetch(wrong, count, "test").tobytes())
    assert one == other


@settings(max_examples=150, deadline=None)
@given(count=COUNTS, lag=st.one_of(st.integers(1, 40), st.integers(1, 70_000)), seed=SEEDS, offset=OFFSETS)
def test_lags_are_the_same(count: int, lag: int, seed: int, offset: int) -> None:
    octets = _unaligned(noise(count, seed).astype(np.uint8), offset)
    one, other = _both(lambda: plane._accumulate(octets, lag).tobytes())
    assert one == other
    assert lag >= count or plane._accumulate(plane._difference(octets, lag), lag).tobytes() == octets.tobytes()


@settings(max_examples=100, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    kind=st.sampled_from(KINDS),
    count=COUNTS,
    lag=st.integers(1, 5000),
    has_base=st.booleans(),
    seed=SEEDS,
    offset=OFFSETS,
)
def test_samples_are_the_same(
    width: int, kind: str, count: int, lag: int, has_base: bool, seed: int, offset: int
) -> None:
    numbers = _unaligned(words(kind, width, count, seed), offset)
    old = _unaligned(words(kind, width, count, seed + 1), offset) if has_base else None
    at = sample.places(count)
    one, other = _both(lambda: sample.histograms(numbers, old, at))
    assert np.array_equal(one, other)
    assert one.sum() == width * len(at)
    later = at[np.searchsorted(at, lag) :]
    one, other = _both(lambda: sample.steps(numbers, old, later, lag))
    assert np.array_equal(one, other)
    assert one.sum() == len(later)
