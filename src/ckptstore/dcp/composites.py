"""Tensors that are made of others: sparse, nested, quantized, and of classes with the flatten protocol.

:func:`take_apart` gives their plain parts, which are views of the tensor's own memory wherever it has any, so parts are
staged, tied and filled like all other tensors. :mod:`ckptstore.dcp.assembly` is the way back.

=============  ==================================================  ======================================
kind           parts                                               facts
=============  ==================================================  ======================================
sparse_coo     indices, values                                     size, dtype, coalesced
sparse_csr...  crow_indices, col_indices, values (or ccol, row)    size, dtype
nested         values                                              dtype, sizes, strides, offsets
jagged         values, offsets, lengths if it has holes            dtype, ragged, min, max
quantized      bytes; scales, zero_points if per channel           size, dtype, and scale, zero_point or axis
flattened      what ``__tensor_flatten__`` names                   class, context, size, stride, dtype
               (of a DTensor around such a class: of the global
               tensor, each part cut as that is)
=============  ==================================================  ======================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nested._internal.nested_tensor import NestedTensor as Jagged
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptstore.dcp.boxes import dtype_name
from ckptstore.errors import StateError
from ckptstore.format.tree import Composite
from ckptstore.format.types_base import type_name
from ckptstore.format.types_user import loaded_class

_PLAIN = frozenset({torch.Tensor, nn.Parameter, nn.Buffer})
_BY_COLUMN = ("ccol_indices", "row_indices")
_BY_ROW = ("crow_indices", "col_indices")
#: Layout -> the names of its two index tensors.
COMPRESSED = {
    torch.sparse_csr: _BY_ROW,
    torch.sparse_bsr: _BY_ROW,
    torch.sparse_csc: _BY_COLUMN,
    torch.sparse_bsc: _BY_COLUMN,
}
#: Facts that two tensors must share for one to take the place of the other.
_OUTLINE = ("size", "dtype", "class")


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` has to be taken apart to be stored. False, too, for what can't be stored at all."""
    cls = type(tensor)
    if cls in _PLAIN:
        return (
            tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized
        ) and not tensor.is_meta  # a meta tensor has no parts
    if cls is DTensor:
        local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        return type(local) not in _PLAIN and is_composite(local)
    if cls.__name__ == "AsyncCollectiveTensor":
        return False
    return bool(is_traceable_wrapper_subclass(tensor))


def take_apart(key: str, tensor: torch.Tensor) -> Composite:
    """The parts of a composite tensor.

    Raises:
        StateError: it has no form that could be stored; names ``key``.
    """
    cls = type(tensor)
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return _sharded_parts(key, tensor)
    if isinstance(tensor, Jagged):
        return _jagged_parts(tensor)
    if cls not in _PLAIN:
        return _flattened_parts(key, tensor)
    if tensor.layout is torch.sparse_coo:
        facts = {"size": list(tensor.shape), "dtype": dtype_name(tensor.dtype), "coalesced": tensor.is_coalesced()}
        return Composite("sparse_coo", {"indices": tensor._indices(), "values": tensor._values()}, facts)
    if tensor.layout in COMPRESSED:
        parts = {name: getattr(tensor, name)() for name in (*COMPRESSED[tensor.layout], "values")}
        kind = str(tensor.layout).removeprefix("torch.")
        return Composite(kind, parts, {"size": list(tensor.shape), "dtype": dtype_name(tensor.dtype)})
    if tensor.is_nested:
        return _nested_parts(tensor)
    if tensor.is_quantized:
        return _quantized_parts(key, tensor)
    raise StateError(
        f"{key!r} is a tensor with layout {str(tensor.layout).removeprefix('torch.')}; it can't be stored",
        hint="leave it out of the state, or turn it into a plain tensor first",
        key=key,
    )


def _nested_parts(tensor: torch.Tensor) -> Composite:
    whole: Any = tensor if tensor.is_contiguous() else tensor.contiguous()
    facts = {
        "dtype": dtype_name(tensor.dtype),
        "sizes": whole._nested_tensor_size().tolist(),
        "strides": whole._nested_tensor_strides().tolist(),
        "offsets": whole._nested_tensor_storage_offsets().tolist(),
    }
    return Composite("nested", {"values": whole.values()}, facts)


def _jagged_parts(tensor: Any) -> Composite:
    parts = {"values": tensor._values, "offsets": tensor._offsets}
    if tensor._lengths is not None:
        parts["lengths"] = tensor._lengths
    facts = {
        "dtype": dtype_name(tensor.dtype),
        "ragged": int(tensor._ragged_idx),
        "min": tensor._maybe_min_seqlen,
        "max": tensor._maybe_max_seqlen,
    }
    return Composite("jagged", parts, facts)


def _quantized_parts(key: str, tensor: torch.Tensor) -> Composite:
    whole = tensor if tensor.is_contiguous() and tensor.storage_offset() == 0 else _compact(tensor)
    facts: dict[str, Any] = {"size": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    raw = torch.empty(0, dtype=torch.uint8, device=whole.device).set_(whole.untyped_storage())
    used = _bytes_of(tuple(whole.shape), whole.dtype)
    parts = {"bytes": raw if used is None else raw[:used]}
    scheme = tensor.qscheme()
    if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        facts |= {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    elif scheme in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        facts["axis"] = tensor.q_per_channel_axis()
        parts |= {"scales": tensor.q_per_channel_scales(), "zero_points": tensor.q_per_channel_zero_points()}
    else:
        raise StateError(f"{key!r} is quantized by {scheme}; it can't be stored", hint="dequantize it first", key=key)
    return Composite("quantized", parts, facts)


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Bytes of the elements in memory; None for packed ones, which take the whole storage."""
    if dtype in (torch.quint4x2, torch.quint2x4):
        return None
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.contiguous()
    return copy if copy.storage_offset() == 0 else copy.clone()


def _flattened_parts(key: str, tensor: Any) -> Composite:
    cls = type(tensor)
    names, context = tensor.__tensor_flatten__()
    facts = {
        "class": type_name(cls),
        "context": context,
        "size": [int(n) for n in tensor.shape],
        "stride": [int(n) for n in tensor.stride()],
        "dtype": dtype_name(tensor.dtype),
    }
    if loaded_class(facts["class"]) is not cls:
        raise StateError(
            f"{key!r} is a {type_name(cls)}, a class that can't be found by that name",
            hint="define the class at the top level of a module",
            key=key,
        )
    return Composite("flattened", {name: getattr(tensor, name) for name in names}, facts)


def _sharded_parts(key: str, tensor: DTensor) -> Composite:
    """The parts of a DTensor around a wrapper: each a DTensor, so what is stored are parts of the global tensor.

    A part is cut where the wrapper is. One element alone (a scale for all) is the same for all ranks.
    """
    inner: Any = tensor._local_tensor
    if isinstance(inner, Jagged) or type(inner) in _PLAIN:
        raise StateError(
            f"{key!r} is a DTensor around a {described(take_apart(key, inner))} tensor; it can't be stored",
            hint="leave it out of the state, or turn it into a plain tensor first",
            key=key,
        )
    apart = _flattened_parts(key, inner)
    cut = {p.dim for p in tensor.placements if not p.is_replicate()}  # type: ignore[attr-defined]
    parts: dict[str, Any] = {}
    for name, part in apart.parts.items():
        is_cut = all(d < part.dim() and part.shape[d] == inner.shape[d] for d in cut)
        if not is_cut and part.numel() != 1:
            raise StateError(
                f"{name!r} of {key!r}, of shape {list(part.shape)}, is not cut as the DTensor around it, whose local "
                f"shape is {list(inner.shape)}: its place in the global tensor is unknown",
                hint="save full_tensor(), or keep each rank's own with per_rank(tensor.to_local())",
                key=key,
            )
        shape = [tensor.shape[d] if is_cut and d in cut else n for d, n in enumerate(part.shape)]
        placements = tensor.placements if is_cut else [Replicate()] * len(tensor.placements)
        stride = torch.empty(shape, device="meta").stride()
        parts[name] = DTensor.from_local(
            part, tensor.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
    whole = {"size": [int(n) for n in tensor.shape], "stride": [int(n) for n in tensor.stride()]}
    return Composite("flattened", parts, {**apart.facts, **whole})


def can_replace(target: Composite, stored: Composite) -> bool:
    """Whether ``stored`` may take the place of ``target``: the same kind, and from outside the same shape and dtype."""
    return target.kind == stored.kind and all(target.facts.get(n) == stored.facts.get(n) for n in _OUTLINE)


def described(composite: Composite) -> str:
    """Its kind and what shows of it from outside, for messages."""
    seen = [str(composite.facts[name]) for name in reversed(_OUTLINE) if name in composite.facts]
    return f"{composite.kind} ({', '.join(seen)})"


def is_live(tensor: torch.Tensor) -> bool:
    """Whether the parts :func:`take_apart` gives are its memory, so that filling them fills the tensor."""
    if isinstance(tensor, Jagged):
        return False  # its shape is bound to the offsets it was made with
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        return True
    if tensor.is_quantized and tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return False
    return tensor.is_contiguous() and (tensor.is_nested or tensor.storage_offset() == 0)


def overwrite(target: torch.Tensor, new: torch.Tensor) -> None:
    """Make ``target``, which others hold, be ``new``. What was its memory is let go of."""
    if type(target) in _PLAIN and not target.is_nested:
        target.data = new.to(target.device)
        return
    fresh = new.to(target.device).requires_grad_(target.requires_grad)
    torch.utils.swap_tensors(target, nn.Parameter(fresh, target.requires_grad) if is_parameter(target) else fresh)  # type: ignore[no-untyped-call]


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether modules register this tensor as a parameter."""
    return isinstance(tensor, nn.Parameter)
