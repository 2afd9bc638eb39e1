"""Reversible maps between a chunk's numbers and integers whose high bytes are dull.

Two maps, both for any bit pattern (NaN payloads and negative zero included):

* rotation: the sign bit goes to the low end, so that the top byte is exponent only;
* difference: numbers become integers in the order of their values, the base's is subtracted, and zigzag puts the
  difference's sign into the lowest bit, so that small steps either way have zeros above.

All arithmetic is modulo the word. Integer differences beat XOR: a step over a power of two flips many bits but moves
the integer by little.
"""

from __future__ import annotations

import numpy as np

from ckptstore import native
from ckptstore.codec.arrays import Words
from ckptstore.codec.base import BLOCK
from ckptstore.codec.scratch import SCRATCH

#: Looked at before all of them are: most tensors have a negative number among so few.
_FEW = 64


def head_bytes(width: int) -> int:
    """Bytes of the head in words of ``width`` bytes."""
    return min(width, 2)


def rotate(words: Words, out: Words, spare: Words) -> None:
    """``out`` = ``words`` with the sign bit moved to the low end. ``out`` and ``spare`` are as long as ``words``."""
    np.left_shift(words, 1, out=out)
    np.right_shift(words, _top(words), out=spare)
    np.bitwise_or(out, spare, out=out)


def unrotate(words: Words, spare: Words) -> None:
    """Undo :func:`rotate`, in place."""
    np.left_shift(words, _top(words), out=spare)
    np.right_shift(words, 1, out=words)
    np.bitwise_or(words, spare, out=words)


def difference(words: Words, base: Words, out: Words, spare: Words) -> None:
    """``out`` = zigzag of (``words`` - ``base``) in the order of their values."""
    np.subtract(_ordered(words, out), _ordered(base, spare), out=out)
    np.right_shift(_signed(out), _top(words), out=_signed(spare))
    np.left_shift(out, 1, out=out)
    np.bitwise_xor(out, spare, out=out)


def undifference(words: Words, base: Words, spare: Words) -> None:
    """Undo :func:`difference`, in place."""
    np.bitwise_and(words, 1, out=spare)
    np.negative(_signed(spare), out=_signed(spare))
    np.right_shift(words, 1, out=words)
    np.bitwise_xor(words, spare, out=words)
    np.add(words, _ordered(base, spare), out=words)
    if not _is_never_negative(words):
        np.right_shift(_signed(words), _top(words), out=_signed(spare))
        np.right_shift(spare, 1, out=spare)
        np.bitwise_xor(words, spare, out=words)


def round_to_bfloat16(master: Words, out: Words, spare: Words) -> None:
    """``out`` (u16) = the bf16 numbers nearest to the fp32 ``master`` (u32), ties to even; ``spare`` is u32.

    As a pure integer function it is defined for NaN too, though not always as a trainer's hardware rounds it:
    whoever uses it compares.
    """
    if native.is_available():
        native.round_to_bfloat16(master, out)
        return
    np.right_shift(master, 16, out=spare)
    np.bitwise_and(spare, 1, out=spare)
    np.add(spare, 0x7FFF, out=spare)
    np.add(spare, master, out=spare)
    np.right_shift(spare, 16, out=out, casting="unsafe")


def equals_rounded(words: Words, master: Words) -> bool:
    """Whether each bf16 number is its master rounded; stops at the first block that isn't."""
    if native.is_available():
        return native.is_rounded(words, master)
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        out, spare = SCRATCH.words("rounded", len(block), 2), SCRATCH.words("spare", len(block), 4)
        round_to_bfloat16(master[start : start + BLOCK], out, spare)
        if not np.array_equal(block, out):
            return False
    return True


def _ordered(words: Words, out: Words) -> Words:
    """Integers in the order of the numbers, up to a constant that cancels in differences; an involution.

    In ``out``, or ``words`` themselves where no number is negative (second moments): they are in order as they are.
    """
    if _is_never_negative(words):
        return words
    np.right_shift(_signed(words), _top(words), out=_signed(out))
    np.right_shift(out, 1, out=out)
    np.bitwise_xor(out, words, out=out)
    return out


def _is_never_negative(words: Words) -> bool:
    signed = _signed(words)
    return bool(len(words)) and bool(signed[:_FEW].min() >= 0) and bool(signed.min() >= 0)


def _signed(words: Words) -> Words:
    """The same memory as signed words, so that a right shift repeats the sign."""
    return words.view(f"<i{words.itemsize}")


def _top(words: Words) -> int:
    return 8 * words.itemsize - 1
