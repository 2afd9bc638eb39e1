"""Loops over every byte of a checkpoint, in C, where a compiler was there when the package was built.

Owns: the compiled kernels, how they are found and called.
Must not know: what the bytes are for. Whoever calls has a slower way that gives the same bytes, for hosts without.

Every function here needs :func:`is_available`, runs without the GIL, and trusts its caller for sizes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.unsignedinteger[Any]]
    Integers = npt.NDArray[np.int64]

__all__ = [
    "ENVIRONMENT", "accumulate", "copy", "halve", "histograms", "is_available", "is_rounded", "join", "narrow",
    "round_to_bfloat16", "split", "steps", "unhalve", "widen",
]  # fmt: skip

#: ``0`` leaves the kernels alone.
ENVIRONMENT = "CKPTSTORE_NATIVE"
LIBRARY = Path(__file__).with_name("kernels.so")

#: Of the kernels these functions call; an old build left in a source tree has another.
_ABI = 2

_size, _int, _pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "copy": (None, (_size, _pointer, _pointer, _pointer)),
    "split": (None, (_pointer, _pointer, _size, _int, _size, _pointer, _pointer)),
    "join": (None, (_pointer, _pointer, _int, _size, _int, _size, _pointer, _pointer)),
    "histograms": (None, (_pointer, _pointer, _int, _pointer, _size, _pointer)),
    "steps": (None, (_pointer, _pointer, _int, _pointer, _size, _size, _pointer)),
    "narrow": (_size, (_pointer, _size, _int, _int, _pointer, _pointer)),
    "widen": (_size, (_pointer, _size, _int, _int, _pointer, _size, _pointer)),
    "halve": (_int, (_pointer, _size, _int, _pointer)),
    "unhalve": (None, (_pointer, _size, _int, _pointer)),
    "accumulate": (None, (_pointer, _size, _size, _pointer)),
    "round": (None, (_pointer, _size, _pointer)),
    "is_rounded": (_int, (_pointer, _pointer, _size)),
}


def _load(path: Path) -> dict[str, Any] | None:
    """The kernels by name, or None: not built, of another version, for another machine, or not wanted."""
    if os.environ.get(ENVIRONMENT) == "0":
        return None
    try:
        library = ctypes.CDLL(str(path))
        if library.ckptstore_abi() != _ABI:
            return None
        kernels = {}
        for name, (result, arguments) in _SIGNATURES.items():
            kernel = library[f"ckptstore_{name}"]
            kernel.restype, kernel.argtypes = result, arguments
            kernels[name] = kernel
    except (OSError, AttributeError):
        return None
    return kernels


_kernels: dict[str, Any] | None = _load(LIBRARY)


def is_available() -> bool:
    """Whether the kernels are there and may be used."""
    return _kernels is not None


def _kernel(name: str) -> Any:
    if _kernels is None:
        raise RuntimeError("the C kernels are not available here")
    return _kernels[name]


def copy(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
    """Copy ``sizes[i]`` bytes from address ``sources[i]`` to address ``targets[i]``; nothing may overlap.

    Long copies go past the caches: faster than a memcpy, whose writes read every line of the target first.
    """
    many = _size * len(sizes)
    _kernel("copy")(len(sizes), many(*targets), many(*sources), many(*sizes))


def split(numbers: Array, old: Array | None, planes: Sequence[Array]) -> None:
    """Fill ``planes``, least significant first, with ``numbers``, mapped against ``old`` or rotated."""
    sizes = bytes(plane.itemsize for plane in planes)
    addresses = (_pointer * len(planes))(*map(_at, planes))
    _kernel("split")(_at(numbers), _at(old), len(numbers), numbers.itemsize, len(planes), sizes, addresses)


def join(planes: Sequence[Array], old: Array | None, *, rotated: bool, out: Array) -> None:
    """Undo :func:`split`; ``old`` may be what ``out`` holds."""
    sizes = bytes(plane.itemsize for plane in planes)
    addresses = (_pointer * len(planes))(*map(_at, planes))
    _kernel("join")(_at(out), _at(old), rotated, len(out), out.itemsize, len(planes), sizes, addresses)


def histograms(numbers: Array, old: Array | None, at: Integers, counts: Integers) -> None:
    """Add to ``counts[p, v]`` how many of the mapped words at these places have the value v as byte p."""
    _kernel("histograms")(_at(numbers), _at(old), numbers.itemsize, _at(at), len(at), _at(counts))


def steps(numbers: Array, old: Array | None, at: Integers, lag: int, counts: Integers) -> None:
    """Add to ``counts[v]`` how many of the mapped words there have a top byte v above that of ``lag`` words before."""
    _kernel("steps")(_at(numbers), _at(old), numbers.itemsize, _at(at), len(at), lag, _at(counts))


def narrow(octets: Array, bits: int, bias: int, packed: Array, misfits: Array) -> int:
    """Cut and pack bytes, those that don't fit apart; ``misfits`` has room for all. Returns how many those are."""
    return int(_kernel("narrow")(_at(octets), len(octets), bits, bias, _at(packed), _at(misfits)))


def widen(packed: Array, bits: int, bias: int, misfits: Array, octets: Array) -> int:
    """Undo :func:`narrow`; returns how many ``misfits`` there should have been."""
    return int(_kernel("widen")(_at(packed), len(octets), bits, bias, _at(misfits), len(misfits), _at(octets)))


def halve(words: Array, packed: Array) -> bool:
    """Fill ``packed`` with even words, the last segment of them in the lowest bits of the others.

    Returns whether they are even; if not, ``packed`` holds nothing.
    """
    return bool(_kernel("halve")(_at(words), len(words), words.itemsize, _at(packed)))


def unhalve(packed: Array, words: Array) -> None:
    """Undo :func:`halve`."""
    _kernel("unhalve")(_at(packed), len(words), words.itemsize, _at(words))


def accumulate(octets: Array, lag: int, out: Array) -> None:
    """``out[i]`` = ``octets[i]`` + ``out[i - lag]``, modulo 256."""
    _kernel("accumulate")(_at(octets), len(octets), lag, _at(out))


def round_to_bfloat16(master: Array, out: Array) -> None:
    """``out`` (u16) = the bf16 numbers nearest to the fp32 ``master`` (u32), ties to even."""
    _kernel("round")(_at(master), len(master), _at(out))


def is_rounded(words: Array, master: Array) -> bool:
    """Whether each bf16 number is its master rounded."""
    return bool(_kernel("is_rounded")(_at(words), _at(master), len(words)))


def _at(array: Array | Integers | None) -> int | None:
    """Address of a contiguous array."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("kernels take contiguous arrays")
    return int(array.ctypes.data)
