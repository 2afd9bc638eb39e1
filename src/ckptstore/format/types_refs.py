"""Places in the state tree where something else goes: a tensor, a rank's own value, a node that was encoded before."""

from __future__ import annotations

from typing import Any

from ckptstore.format.types_base import (
    ArrayRef,
    Composite,
    Json,
    Opaque,
    Path,
    PerRankRef,
    TensorRef,
    add_codec,
    dotted,
    is_unicode,
    malformed,
    refuse,
    text,
)
from ckptstore.format.types_engine import Decoder, Encoder


def _add_ref(tag: str, cls: type[TensorRef] | type[PerRankRef]) -> None:
    def encode(_: Encoder, value: Any, path: Path) -> Json:
        (name,) = vars(value).values()
        if not is_unicode(name):
            refuse(path, f"the name {name!r} is not Unicode")
        return {"v": name}

    add_codec(tag, cls, "v", encode, lambda dec, node, path: dec.ref(cls(text(node.get("v"), path))))


def _typed_by_itself(*_: object) -> Any:
    raise AssertionError("an opaque value has the tag it always had")


def _encode_opaque(_: Encoder, value: Opaque, path: Path) -> Any:
    data = value.data
    if type(data) is dict and data.keys() == {"version", "tree"} and type(data["version"]) is int:
        refuse(path, "this Opaque holds a whole tree", "give it the node: encode(...)['tree']")
    return data


def _encode_array_ref(enc: Encoder, value: ArrayRef, path: Path) -> Json:
    node: Json = {"v": value.name}
    if value.dtype is not None:
        node["dtype"] = enc.key(value.dtype, path)
    if value.shape is not None:
        node["shape"] = list(value.shape)
    return {**node, "transposed": True} if value.is_transposed else node


def _decode_array_ref(dec: Decoder, node: Json, path: Path) -> Any:
    import numpy as np

    dtype = dec.value(node.get("dtype"), path)
    shape = dec.values(node["shape"], path) if "shape" in node else None
    if not (dtype is None or (isinstance(dtype, np.dtype) and not dtype.hasobject)):
        malformed(path, "the dtype of an array is none")
    if shape is not None and not all(type(n) is int and n >= 0 for n in shape):
        malformed(path, "the shape of an array is none")
    is_transposed = node.get("transposed") is True
    value = dec.ref(TensorRef(text(node.get("v"), path)))
    if isinstance(value, TensorRef):  # a walker that leaves references in place gets this one whole
        return ArrayRef(value.name, dtype, None if shape is None else tuple(shape), is_transposed)
    if not hasattr(value, "__array__"):  # it only stands for the tensor so far, and nobody is to take it for one
        stand_in = np.empty((), dtype=object)
        stand_in[()] = value
        return stand_in
    array = np.asarray(value)  # of a tensor: the same memory
    array = array if dtype is None else array.view(dtype)
    array = array if shape is None else array.reshape(shape)
    return array.T if is_transposed else array


def _encode_composite(enc: Encoder, value: Composite, path: Path) -> Json:
    return {"kind": value.kind, "parts": enc.value(value.parts, path), "facts": enc.value(value.facts, path)}


def _decode_composite(dec: Decoder, node: Json, path: Path) -> Any:
    parts, facts = dec.value(node.get("parts"), path), dec.value(node.get("facts"), path)
    if type(parts) is not dict or type(facts) is not dict:
        malformed(path, "a composite tensor has parts and facts")
    return dec.ref(Composite(text(node.get("kind"), path), parts, facts, dotted(path) if path else ""))


_add_ref("tensor", TensorRef)
_add_ref("per_rank", PerRankRef)
add_codec("array", ArrayRef, "v dtype shape transposed", _encode_array_ref, _decode_array_ref)
add_codec("composite", Composite, "kind parts facts", _encode_composite, _decode_composite)
add_codec("", Opaque, "", _encode_opaque, _typed_by_itself)
