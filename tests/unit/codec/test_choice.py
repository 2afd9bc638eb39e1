"""The chain taken is the one that pays on this chunk."""

from __future__ import annotations

import numpy as np
import pytest
from chunks import WIDTHS, chunk, noise, stepped, words

from ckptstore.codec import decode, encode

BIG = 200_000


def _ratio(plain: bytes, dtype: str, **kwargs: object) -> tuple[str, float]:
    encoded = encode(plain, dtype=dtype, **kwargs)  # type: ignore[arg-type]
    return encoded.codec, len(encoded.frame) / len(plain)


@pytest.mark.parametrize("dtype,most", [("bfloat16", 0.70), ("float32", 0.84), ("complex64", 0.84), ("float64", 0.92)])
def test_planes_are_taken_when_exponents_are_dull(dtype: str, most: float) -> None:
    codec, ratio = _ratio(chunk("weights", WIDTHS[dtype], BIG), dtype)
    assert codec == "planes"
    assert ratio < most


@pytest.mark.parametrize("dtype", [*WIDTHS, "int32", "uint8"])
def test_nothing_is_spent_when_bytes_are_random(dtype: str) -> None:
    codec, ratio = _ratio(noise(BIG, 1).tobytes(), dtype)
    assert codec == "raw"
    assert ratio < 1.0001


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8", "no_such_dtype"])
def test_zstd_is_taken_when_opaque_bytes_repeat(dtype: str) -> None:
    codec, ratio = _ratio(np.arange(50_000, dtype="<i8").tobytes(), dtype)
    assert codec == "zstd"
    assert ratio < 0.5


def test_zstd_is_taken_when_floats_repeat_as_words() -> None:
    table = words("random", 4, 500, 1)
    codec, ratio = _ratio(np.tile(np.repeat(table, 3), 100).tobytes(), "float32")
    assert codec == "zstd"
    assert ratio < 0.05


@pytest.mark.parametrize("spread,most", [(2, 0.16), (8, 0.30)])
def test_delta_is_taken_when_steps_are_small(spread: int, most: float) -> None:
    plain = chunk("weights", 2, BIG)
    codec, ratio = _ratio(plain, "bfloat16", base=stepped(plain, 2, 5, spread))
    assert codec == "delta"
    assert ratio < most


def test_delta_spends_far_less_than_a_bit_each_when_few_numbers_moved() -> None:
    plain = chunk("weights", 2, BIG)
    numbers = np.frombuffer(plain, "<u2").copy()
    moved = noise(BIG, 3) % np.uint64(25) == 0
    numbers[moved] += 1
    codec, ratio = _ratio(numbers.tobytes(), "bfloat16", base=plain)
    assert codec == "delta"
    # The entropy is 0.28 of 16 bits; a Huffman code alone, one bit at least for each byte, ends above 0.06.
    assert ratio < 0.025


def test_delta_is_not_taken_when_it_does_not_pay() -> None:
    plain = chunk("weights", 4, BIG, 1)
    alone = encode(plain, dtype="float32")
    assert encode(plain, dtype="float32", base=chunk("weights", 4, BIG, 77)) == alone
    assert alone.codec == "planes"


def test_base_is_ignored_when_its_size_differs() -> None:
    plain = chunk("weights", 4, 1000)
    assert encode(plain, dtype="float32", base=plain[:-4]).codec == "planes"


def test_raw_is_taken_when_compression_is_off() -> None:
    plain = chunk("zeros", 4, 1000)
    encoded = encode(plain, dtype="float32", base=plain, compress=False)
    assert encoded.codec == "raw"
    assert bytes(decode(encoded.frame, size_bytes=len(plain))) == plain


def test_a_bit_is_saved_when_no_number_is_negative() -> None:
    count = 1 << 18
    _, signed = _ratio(chunk("weights", 4, count, 1), "float32")
    _, positive = _ratio(chunk("positive", 4, count, 1), "float32")
    assert signed - positive == pytest.approx(1 / 32, abs=0.003)


def test_low_planes_are_stored_small_when_fp32_holds_widened_bf16() -> None:
    widened = (words("weights", 2, BIG, 2).astype("<u4") << 16).tobytes()
    codec, ratio = _ratio(widened, "float32")
    assert codec == "planes"
    assert ratio < 0.36


def test_rows_help_when_numbers_follow_those_above_them() -> None:
    row, rows = 512, 400
    scale = (noise(row, 1) % np.uint64(40)).astype("<u4")
    wobble = (noise(row * rows, 2) % np.uint64(2)).astype("<u4").reshape(rows, row)
    fraction = (noise(row * rows, 3) >> np.uint64(41)).astype("<u4").reshape(rows, row)
    plain = ((80 + scale + wobble) << 23 | fraction).astype("<u4").tobytes()
    _, without = _ratio(plain, "float32")
    codec, ratio = _ratio(plain, "float32", row=row)
    assert codec == "planes"
    assert ratio < without - 0.05
    assert bytes(decode(encode(plain, dtype="float32", row=row).frame, size_bytes=len(plain))) == plain


@pytest.mark.parametrize("size", [0, 1, 4, 100, 255])
def test_tiny_chunks_are_stored_raw_when_headers_would_eat_the_gain(size: int) -> None:
    encoded = encode(bytes(size), dtype="float32")
    assert encoded.codec == "raw"
    assert len(encoded.frame) <= size + 32
