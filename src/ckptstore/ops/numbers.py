"""Between floating-point types without torch, rounding as torch does (to nearest, ties to even)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ckptstore.errors import ConfigError

#: Types a file may be converted to, and those that are converted.
FLOATS = ("float64", "float32", "float16", "bfloat16")

Bytes = npt.NDArray[np.uint8]


def check_dtype(dtype: str) -> str:
    """The dtype itself, if numbers can be converted to it."""
    if dtype not in FLOATS:
        raise ConfigError(f"can't convert to {dtype!r}", hint=f"one of {', '.join(FLOATS)}")
    return dtype


def convert(data: Bytes, source: str, target: str) -> Bytes:
    """The same numbers in another type; both are floating-point."""
    if source == target:
        return data
    values: npt.NDArray[np.floating]
    if source == "bfloat16":
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view(source)
    if target == "float16":
        values = _to_float32(values)  # torch rounds twice, too
    if target != "bfloat16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(target).view(np.uint8)
    bits = _to_float32(values).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16).view(np.uint8)


def _to_float32(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32)
