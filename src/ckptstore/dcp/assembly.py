"""Tensors that are made of others, put together again: the inverse of :mod:`ckptstore.dcp.composites`.

:func:`put_together` shares the memory of the parts, so these may be filled afterwards; :func:`check` says then whether
what came out is sound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nested._internal.nested_tensor import NestedTensor as Jagged

from ckptstore.dcp.composites import COMPRESSED, is_composite, take_apart
from ckptstore.errors import FormatError
from ckptstore.format.tree import Composite
from ckptstore.format.types_user import loaded_class


def put_together(key: str, stored: Composite, allowed: type | None = None) -> torch.Tensor:
    """The tensor of these parts; it shares their memory and looks at none of their values.

    Args:
        stored: a composite whose parts are tensors.
        allowed: a tensor class that may be rebuilt, because the target has one; beside it, those of
            ``torch.serialization.add_safe_globals``.

    Raises:
        FormatError: damaged, or a class that this process doesn't know or trust; names ``key``.
    """
    parts = {
        name: put_together(f"{key}.{name}", part) if isinstance(part, Composite) else part
        for name, part in stored.parts.items()
    }
    try:
        if stored.kind == "flattened":
            return _unflattened(key, parts, stored.facts, allowed)
        return _BUILD[stored.kind](parts, stored.facts)
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(
            f"{key!r} can't be put together as a {stored.kind} tensor: {type(error).__name__}: {error!s:.200}", key=key
        ) from error


def _sparse_coo(parts: dict[str, Any], facts: dict[str, Any]) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        parts["indices"],
        parts["values"],
        facts["size"],
        device=parts["values"].device,
        is_coalesced=facts["coalesced"],
        check_invariants=False,
    )


def _compressed(layout: torch.layout) -> Callable[[dict[str, Any], dict[str, Any]], torch.Tensor]:
    outer, inner = COMPRESSED[layout]

    def build(parts: dict[str, Any], facts: dict[str, Any]) -> torch.Tensor:
        return torch.sparse_compressed_tensor(
            parts[outer],
            parts[inner],
            parts["values"],
            facts["size"],
            layout=layout,
            device=parts["values"].device,
            check_invariants=False,
        )

    return build


def _nested(parts: dict[str, Any], facts: dict[str, Any]) -> torch.Tensor:
    if not facts["offsets"]:
        return torch.nested.nested_tensor([], dtype=parts["values"].dtype, device="cpu")
    noted = [torch.tensor(facts[name], dtype=torch.int64, device="cpu") for name in ("sizes", "strides", "offsets")]
    sizes, strides, offsets = noted
    sizes, strides = (t.reshape(len(facts["offsets"]), -1) for t in (sizes, strides))
    values = parts["values"]
    if bool((sizes < 0).any() or (strides < 0).any() or (offsets < 0).any()):
        raise ValueError("negative sizes")
    last = offsets + ((sizes - 1).clamp(min=0) * strides).sum(1)
    if bool(((sizes.prod(1) > 0) & (last >= values.numel())).any()):
        raise ValueError("its rows lie outside its values")
    return torch._nested_view_from_buffer(values, sizes, strides, offsets)


def _jagged(parts: dict[str, Any], facts: dict[str, Any]) -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(
        parts["values"],
        parts["offsets"],
        parts.get("lengths"),
        jagged_dim=facts["ragged"],
        min_seqlen=facts["min"],
        max_seqlen=facts["max"],
    )


def _quantized(parts: dict[str, Any], facts: dict[str, Any]) -> torch.Tensor:
    dtype, size = getattr(torch, facts["dtype"]), tuple(facts["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError("not a dtype")
    if "axis" in facts:
        empty = torch._empty_per_channel_affine_quantized(
            size, scales=parts["scales"], zero_points=parts["zero_points"], axis=facts["axis"], dtype=dtype
        )
    else:
        empty = torch._empty_affine_quantized(size, scale=facts["scale"], zero_point=facts["zero_point"], dtype=dtype)
    if empty.untyped_storage().nbytes() != parts["bytes"].numel():
        raise ValueError(f"{parts['bytes'].numel()} bytes for a shape of {list(size)}")
    typed: Any = torch.storage.TypedStorage
    storage = typed(wrap_storage=parts["bytes"].untyped_storage(), dtype=dtype, _internal=True)
    return empty.set_(storage, 0, size, empty.stride())


def _unflattened(key: str, parts: dict[str, Any], facts: dict[str, Any], allowed: type | None) -> torch.Tensor:
    name = facts["class"]
    cls: Any = loaded_class(name)
    if cls is None or not issubclass(cls, torch.Tensor):
        raise FormatError(
            f"{key!r} is a {name}, which this process doesn't know",
            hint="import the module that defines it before loading",
            key=key,
        )
    if cls is not allowed and cls not in torch.serialization.get_safe_globals():
        raise FormatError(
            f"{key!r} is a {name}, a class that nobody said may be rebuilt from a file",
            hint=f"torch.serialization.add_safe_globals([{cls.__name__}]), or load into a target that has one",
            key=key,
        )
    built: torch.Tensor = cls.__tensor_unflatten__(
        parts, facts["context"], torch.Size(facts["size"]), tuple(facts["stride"])
    )
    again = take_apart(key, built)
    if type(built) is not cls or any(_address(again.parts.get(n)) != _address(part) for n, part in parts.items()):
        raise FormatError(f"{key!r}: __tensor_unflatten__ of {name} does not wrap the tensors it is given", key=key)
    return built


def _address(part: Any) -> int | None:
    return part.data_ptr() if isinstance(part, torch.Tensor) and not is_composite(part) else None


_BUILD: dict[str, Callable[[dict[str, Any], dict[str, Any]], torch.Tensor]] = {
    "sparse_coo": _sparse_coo,
    **{str(layout).removeprefix("torch."): _compressed(layout) for layout in COMPRESSED},
    "nested": _nested,
    "jagged": _jagged,
    "quantized": _quantized,
}


def check(key: str, tensor: torch.Tensor) -> None:
    """Whether a tensor that was put together is sound, now that its parts are filled: no index points outside.

    Raises:
        FormatError: it is not; names ``key``.
    """
    try:
        if isinstance(tensor, Jagged):
            offsets: torch.Tensor = tensor._offsets
            rows = tensor._values.shape[tensor._ragged_idx - 1]
            ends = offsets[1:] if tensor._lengths is None else offsets[:-1] + tensor._lengths
            if int(offsets[0]) < 0 or bool((offsets.diff() < 0).any()) or bool((ends > rows).any()):
                raise ValueError("its offsets lie outside its values")
        elif tensor.layout is torch.sparse_coo:
            torch._validate_sparse_coo_tensor_args(
                tensor._indices(), tensor._values(), tensor.shape, tensor.is_coalesced()
            )
        elif tensor.layout in COMPRESSED:
            outer, inner = (getattr(tensor, name)() for name in COMPRESSED[tensor.layout])
            torch._validate_sparse_compressed_tensor_args(outer, inner, tensor.values(), tensor.shape, tensor.layout)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"{key!r} is damaged: {error!s:.200}", key=key) from error
