"""Chunks to encode: made of integers only, so that they are the same on every machine and with every NumPy."""

from __future__ import annotations

import numpy as np

WIDTHS = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "complex64": 4,
    "float64": 8,
    "complex128": 8,
}
OPAQUE = ("int8", "uint8", "int16", "int32", "int64", "bool", "bits8", "no_such_dtype")
KINDS = ("random", "weights", "positive", "zeros", "sparse", "rows", "few", "special")


def noise(count: int, seed: int) -> np.ndarray:
    """``count`` u64 from splitmix64."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0x2545F491)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def words(kind: str, width: int, count: int, seed: int = 0) -> np.ndarray:
    """``count`` words of ``width`` bytes that look like ``kind``."""
    bits = 8 * width
    raw = noise(count, seed) >> np.uint64(64 - bits)
    top = np.uint64(bits - 1)
    sign = (raw >> top) << top
    # Exponents of trained weights: a narrow, skewed distribution below 1.
    drop = sum(((noise(count, seed + i) & np.uint64(1)) for i in range(1, 6)), np.zeros(count, np.uint64))
    if width == 1:
        weights = raw & ~np.uint64(0x60) | (drop & np.uint64(1)) << np.uint64(5)
    else:
        exponent_bits = 11 if width == 8 else 5 if width == 2 and seed % 2 else 8
        fraction_bits = np.uint64(bits - 1 - exponent_bits)
        bias = np.uint64((1 << (exponent_bits - 1)) - 6)
        fraction = raw & ((np.uint64(1) << fraction_bits) - np.uint64(1))
        weights = sign | (bias + drop) << fraction_bits | fraction
    keep = noise(count, seed + 9) % np.uint64(20)
    made = {
        "random": raw,
        "weights": weights,
        "positive": weights & ~sign,
        "zeros": np.zeros(count, np.uint64),
        "sparse": np.where(keep == 0, weights, 0).astype(np.uint64),
        "rows": weights & ~sign & ~(np.uint64(1) << np.uint64(bits - 2))
        | (np.arange(count) // 7 % 5 << (bits - 4)).astype(np.uint64),
        "few": (raw % np.uint64(3)) << np.uint64(bits - 3),
        # Infinities, NaN with payloads, both zeros, denormals, extremes.
        "special": np.array(
            [0, 1, (1 << (bits - 1)), (1 << bits) - 1, (1 << (bits - 1)) - 1, 0x7F << (bits - 8)], np.uint64
        )[(raw % np.uint64(6)).astype(np.int64)],
    }[kind]
    return made.astype(f"<u{width}")


def chunk(kind: str, width: int, count: int, seed: int = 0, tail: int = 0) -> bytes:
    """The words' bytes, and ``tail`` more."""
    return words(kind, width, count, seed).tobytes() + bytes(range(1, tail + 1))


def stepped(plain: bytes, width: int, seed: int, spread: int = 4) -> bytes:
    """The chunk after a small step of each number: integers moved by less than ``spread`` either way."""
    whole = len(plain) // width * width
    numbers = np.frombuffer(plain[:whole], f"<u{width}")
    move = (noise(len(numbers), seed) % np.uint64(2 * spread - 1)).astype(numbers.dtype) - numbers.dtype.type(
        spread - 1
    )
    return (numbers + move).astype(numbers.dtype).tobytes() + plain[whole:]


def base_of(base: str, plain: bytes, kind: str, width: int, count: int, seed: int, tail: int) -> bytes | None:
    """What a chunk may be encoded against: none, equal, near, wide, far, or of an other size."""
    if base in ("near", "wide"):
        return stepped(plain, width, seed) if base == "near" else stepped(plain, width, seed, 60)
    others = {"none": None, "equal": plain, "other size": plain + b"x"}
    return others[base] if base in others else chunk("random", width, count, seed + 1, tail)
