"""The integer maps lose nothing and keep small steps small, for every bit pattern."""

from __future__ import annotations

import numpy as np
import pytest
from chunks import KINDS
from chunks import words as make
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ckptstore.codec import words
from ckptstore.codec.base import BLOCK

COUNT = BLOCK + 7000


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    dtype = np.dtype(f"<u{draw(st.sampled_from([1, 2, 4, 8]))}")
    count = draw(st.integers(0, 40))
    return draw(npst.arrays(dtype, count)), draw(npst.arrays(dtype, count))


@given(pairs())
def test_rotation_is_undone_when_words_are_arbitrary(pair: tuple[np.ndarray, np.ndarray]) -> None:
    plain, _ = pair
    out, spare = np.empty_like(plain), np.empty_like(plain)
    words.rotate(plain, out, spare)
    assert np.array_equal(out & 1, plain >> (8 * plain.itemsize - 1))
    words.unrotate(out, spare)
    assert np.array_equal(out, plain)


@given(pairs())
def test_difference_is_undone_when_words_are_arbitrary(pair: tuple[np.ndarray, np.ndarray]) -> None:
    plain, base = pair
    out, spare = np.empty_like(plain), np.empty_like(plain)
    words.difference(plain, base, out, spare)
    words.undifference(out, base, spare)
    assert np.array_equal(out, plain)


@pytest.mark.parametrize("width,float_dtype", [(2, "<f2"), (4, "<f4"), (8, "<f8")])
def test_difference_counts_representable_steps_when_numbers_cross_zero(width: int, float_dtype: str) -> None:
    tiny = np.nextafter(np.zeros(1, float_dtype), np.ones(1, float_dtype))
    new = np.concatenate([tiny, -tiny, tiny, np.ones(1, float_dtype)]).astype(float_dtype).view(f"<u{width}")
    old = np.concatenate([0 * tiny, 0 * tiny, -tiny, np.nextafter(np.ones(1, float_dtype), 2 * tiny)])
    out, spare = np.empty_like(new), np.empty_like(new)
    words.difference(new, old.astype(float_dtype).view(new.dtype), out, spare)
    # zigzag: +1 -> 2, -1 -> 1; both zeros are numbers of their own, so -tiny is two below +0 and +tiny three above it.
    assert out.tolist() == [2, 3, 6, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_stops_at_the_difference_when_one_number_differs(kind: str) -> None:
    master = make(kind, 4, COUNT, 1)
    rounded, spare = np.empty(COUNT, "<u2"), np.empty(COUNT, "<u4")
    words.round_to_bfloat16(master, rounded, spare)
    assert words.equals_rounded(rounded, master)
    for at in (0, BLOCK - 1, BLOCK, COUNT - 1):
        wrong = rounded.copy()
        wrong[at] ^= 1
        assert not words.equals_rounded(wrong, master)
