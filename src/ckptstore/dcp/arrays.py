"""Large NumPy arrays as tensors: the same memory where torch can see it as such, else its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

#: What ``torch.from_numpy`` takes, in native byte order.
_SHARED = frozenset(
    np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
)  # fmt: skip


def as_tensor(array: np.ndarray[Any, Any]) -> tuple[torch.Tensor, np.dtype[Any] | None, tuple[int, ...] | None, bool]:
    """A tensor for the elements of ``array``, and what ``tree.ArrayRef`` has to say beside its name.

    Returns:
        The tensor; the dtype and the shape, if the tensor holds only bytes; whether it is the array's transpose.
    """
    is_transposed = array.flags.f_contiguous and not array.flags.c_contiguous
    rows = array.T if is_transposed else array
    if not rows.flags.writeable or any(stride < 0 for stride in rows.strides):
        rows = rows.copy()  # torch takes neither
    if rows.dtype in _SHARED and not rows.dtype.metadata and all(s % rows.itemsize == 0 for s in rows.strides):
        return torch.from_numpy(rows), None, None, is_transposed
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    return torch.from_numpy(data), rows.dtype, rows.shape, is_transposed
