"""What one rank holds of a tensor: a box of the global tensor, backed by local memory.

:func:`box_of` is the only place that knows tensor classes. Everything behind it works with plain strided tensors and
their place in the global one. What it can't place exactly it refuses, by key.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.nn.parameter import is_lazy

from ckptstore.dcp.fsdp1 import local_shard
from ckptstore.errors import StateError

Shape = tuple[int, ...]

_PLAIN = frozenset({torch.Tensor, nn.Parameter})
_TORCH_DISPATCH = torch.Tensor.__torch_dispatch__
_DTYPE_NAMES: dict[torch.dtype, str] = {}
_HINT = "leave it out of the state, or turn it into a plain tensor first"


#: Sub-byte integers and bit fields: torch stores a byte for each and has no kernel that copies them.
_BYTE_LIKE = frozenset(
    getattr(torch, name)
    for name in (
        *(f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)),
        "bits8",
        "bits1x8",
        "bits2x4",
        "bits4x2",
    )
    if hasattr(torch, name)
)


class Box(NamedTuple):
    """A rank's part of a global tensor. ``local`` is the live memory, possibly strided, shaped like ``shape``."""

    local: torch.Tensor
    global_shape: Shape
    offsets: Shape
    shape: Shape

    @property
    def is_whole(self) -> bool:
        return self.shape == self.global_shape


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's own name without ``torch.``, as manifests say it."""
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        name = _DTYPE_NAMES[dtype] = str(dtype).removeprefix("torch.")
    return name


def dtype_of(name: str) -> torch.dtype:
    """Inverse of :func:`dtype_name`.

    Raises:
        StateError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StateError(f"this torch ({torch.__version__}) has no dtype {name!r}", hint="upgrade torch", key=name)
    return dtype


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or the same memory as bytes where torch can't copy its dtype."""
    return tensor.view(torch.uint8) if tensor.dtype in _BYTE_LIKE else tensor


def box_of(key: str, tensor: torch.Tensor) -> Box:
    """Where ``tensor`` lies in its global tensor, and the local memory behind it. No copy.

    Raises:
        StateError: sparse, nested, quantized, meta, uninitialised, a subclass without memory of its own, or a sharded
            tensor whose local part is not one box; names ``key``.
    """
    if isinstance(tensor, DTensor):
        return _box_of_dtensor(key, tensor)
    shard = local_shard(tensor)
    if shard is not None:
        local, global_shape, offsets = shard
        shape = tuple(local.shape) if local.numel() else (0,) * len(global_shape)
        return Box(plain(key, local), global_shape, offsets, shape)
    local = plain(key, tensor)
    shape = tuple(local.shape)
    return Box(local, shape, (0,) * len(shape), shape)


def plain(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, checked to be ordinary strided memory.

    Raises:
        StateError: it is not; names ``key``.
    """
    cls = type(tensor)
    if cls not in _PLAIN:
        if is_lazy(tensor):
            raise _refusal(key, "an uninitialised (lazy) parameter", "run one forward pass first")
        if cls.__name__ == "AsyncCollectiveTensor":
            return tensor.wait()  # type: ignore[attr-defined,no-any-return]
        if cls.__torch_dispatch__ is not _TORCH_DISPATCH:
            raise _refusal(key, f"a {cls.__module__}.{cls.__qualname__}, a tensor class with no memory of its own")
    if tensor.layout is not torch.strided:
        raise _refusal(key, f"a tensor with layout {str(tensor.layout).removeprefix('torch.')}")
    if tensor.is_nested:
        raise _refusal(key, "a nested tensor")
    if tensor.is_quantized:
        raise _refusal(
            key, f"a quantized tensor ({dtype_name(tensor.dtype)})", "store its int_repr(), scale and zero point"
        )
    if tensor.is_meta:
        raise _refusal(key, "a tensor on the meta device, which has no values")
    if cls not in _PLAIN:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(torch.Tensor)
    return tensor


def check_memory(key: str, tensor: torch.Tensor) -> None:
    """Whether a plain tensor has all the memory that it shows: a storage may have been given back, and a copy would
    then read, or write, what isn't there.

    Raises:
        StateError: it has not; names ``key``.
    """
    if not tensor.numel():
        return
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.untyped_storage().nbytes() < (last + 1) * tensor.itemsize:
        raise _refusal(key, "a tensor whose memory was given back (its storage was resized)")


def _refusal(key: str, what: str, hint: str = _HINT) -> StateError:
    return StateError(f"{key!r} is {what}; it can't be stored", hint=hint, key=key)


def _box_of_dtensor(key: str, tensor: DTensor) -> Box:
    spec: Any = tensor._spec
    local = plain(key, tensor._local_tensor)
    global_shape = tuple(spec.shape)
    if spec.mesh.get_coordinate() is None:  # this rank has no part in the mesh
        nothing = (0,) * len(global_shape)
        return Box(local.new_empty(0), global_shape, nothing, nothing)
    shape, offsets = _place(key, global_shape, spec.mesh, tuple(spec.placements))
    if tuple(local.shape) != shape:
        if local.numel() == 0 and 0 in shape:
            return Box(local.new_empty(shape), global_shape, offsets, shape)
        raise _refusal(key, f"a DTensor whose local part is {tuple(local.shape)} where its placement says {shape}")
    return Box(local, global_shape, offsets, shape)


def _place(key: str, global_shape: Shape, mesh: Any, placements: tuple[Any, ...]) -> tuple[Shape, Shape]:
    for placement in placements:
        if isinstance(placement, Partial):
            raise _refusal(
                key, "a DTensor with a pending reduction (Partial)", "redistribute it to Replicate or Shard first"
            )
    if not all(p.is_replicate() or type(p) is Shard or _is_strided(p) for p in placements):
        raise _refusal(key, f"a DTensor with placements {placements}")
    for d, p in enumerate(placements):
        if _is_strided(p) and p.split_factor != prod(
            mesh.shape[right]
            for right in range(d + 1, len(placements))
            if getattr(placements[right], "dim", None) == p.dim
        ):
            raise _refusal(key, f"a DTensor whose local part is not one box (placements {placements})")
    return _computed_place(global_shape, mesh, placements)


def _is_strided(placement: Any) -> bool:
    """FSDP2 over another way of sharding the same dimension: it cuts what that has left."""
    return type(placement).__name__ == "_StridedShard"


@lru_cache(maxsize=4096)
def _computed_place(global_shape: Shape, mesh: Any, placements: tuple[Any, ...]) -> tuple[Shape, Shape]:
    """By arithmetic: torch's own is off where FSDP2 cuts uneven parts, and takes 0.1 ms for each."""
    shape, offsets, where = list(global_shape), [0] * len(global_shape), mesh.get_coordinate()
    cuts = [d for d, p in enumerate(placements) if not p.is_replicate()]
    plain_ones = [d for d in cuts if not _is_strided(placements[d])]
    for d in (*plain_ones, *(d for d in reversed(cuts) if _is_strided(placements[d]))):
        dim = placements[d].dim
        size = -(-shape[dim] // mesh.shape[d])
        start = min(size * where[d], shape[dim])
        offsets[dim] += start
        shape[dim] = min(size, shape[dim] - start)
    return tuple(shape), (0,) * len(shape) if 0 in shape else tuple(offsets)
