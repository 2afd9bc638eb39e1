"""Places in the state tree where something else goes: a tensor, a rank's own value, a node that was encoded before."""

from __future__ import annotations

from typing import Any

from ckptstore.format.types_base import (
    ArrayRef,
    Json,
    Opaque,
    Path,
    PerRankRef,
    TensorRef,
    add_codec,
    is_unicode,
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


def _decode_array_ref(dec: Decoder, node: Json, path: Path) -> Any:
    import numpy as np

    value = dec.ref(TensorRef(text(node.get("v"), path)))
    # A walker that leaves references in place gets this one whole.
    return ArrayRef(value.name) if isinstance(value, TensorRef) else np.asarray(value)


_add_ref("tensor", TensorRef)
_add_ref("per_rank", PerRankRef)
add_codec("array", ArrayRef, "v", lambda _, value, path: {"v": value.name}, _decode_array_ref)
add_codec("", Opaque, "", _encode_opaque, _typed_by_itself)
