"""Chunks as NumPy sees them. Apart from the promises in `base`, so that reading those needs no NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

#: Unsigned words: a chunk seen as integers as wide as its numbers. Always little-endian, whatever the host is.
Words = npt.NDArray[np.unsignedinteger[Any]]
Bytes = npt.NDArray[np.uint8]

WORD: dict[int, np.dtype[np.unsignedinteger[Any]]] = {w: np.dtype(f"<u{w}") for w in (1, 2, 4, 8)}
