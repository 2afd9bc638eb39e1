"""The two walkers of the state tree: values to nodes, and nodes to values.

They know how to go down and when to stop; what each type looks like is its codec's business.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

from ckptstore.errors import CkptError
from ckptstore.format.types_base import (
    BY_KIND,
    BY_TYPE,
    MAX_BLOB_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    SCALARS,
    TAG,
    Json,
    Key,
    Opaque,
    Path,
    Ref,
    TypeCodec,
    are_verbatim,
    encode_scalar,
    find_codec,
    is_verbatim,
    load_late,
    malformed,
    refuse,
)


class Encoder:
    """Turns one state into nodes. Not reusable."""

    def __init__(self, leaf: Callable[[Path, object], object] | None) -> None:
        self._leaf = leaf
        self._open: set[int] = set()
        self._count = 0
        self._in_key = 0

    def value(self, value: object, path: Path) -> Any:
        """The node for any value."""
        self._counted(1, path)
        scalar = type(value) in SCALARS
        if not scalar and self._leaf is not None and not self._in_key:
            value = self._leaf(path, value)
            scalar = type(value) in SCALARS
        if scalar:
            return encode_scalar(value, path)
        codec = _codec_for(value)
        if codec is None:
            refuse(path, *_why_not(value))
        if id(value) in self._open:
            refuse(path, f"it contains itself (a cycle through a {type(value).__name__})")
        if len(self._open) >= MAX_DEPTH:
            refuse(path, f"nested deeper than {MAX_DEPTH} levels")
        self._open.add(id(value))
        try:
            node = codec.encode(self, value, path)
        finally:
            self._open.discard(id(value))
        if codec.tag:
            node[TAG] = codec.tag
        return node

    def values(self, values: Sequence[object], path: Path) -> list[Any]:
        """Nodes of a sequence; fast for long runs of plain numbers."""
        if set(map(type, values)) <= SCALARS:
            self._counted(len(values), path)
            if are_verbatim(values):
                return list(values)
            return [v if is_verbatim(v) else encode_scalar(v, (*path, i)) for i, v in enumerate(values)]
        return [self.value(v, (*path, i)) for i, v in enumerate(values)]

    def pairs(self, items: Iterable[tuple[Key, object]], path: Path) -> list[Any]:
        """Keys and values in turn: ``[k, v, k, v]``."""
        flat: list[Any] = []
        for key, value in items:
            flat.append(self.key(key, path))
            flat.append(self.value(value, (*path, key)))
        return flat

    def key(self, key: object, path: Path) -> Any:
        """The node of a dict key or set element; no leaf callback is asked about these."""
        self._in_key += 1
        try:
            return self.value(key, (*path, key) if isinstance(key, Hashable) else path)
        finally:
            self._in_key -= 1

    def blob(self, data: bytes | bytearray | memoryview, path: Path) -> str:
        """Bytes as base64 text."""
        if len(data) > MAX_BLOB_BYTES:
            refuse(
                path,
                f"{len(data)} bytes are more than the {MAX_BLOB_BYTES} a single non-tensor value may have",
                "store it as a tensor, for example torch.frombuffer(...) or torch.from_numpy(...)",
            )
        return base64.b64encode(data).decode("ascii")

    def _counted(self, number: int, path: Path) -> None:
        self._count += number
        if self._count > MAX_VALUES:
            refuse(path, f"the state has more than {MAX_VALUES} values", "keep long histories in arrays or tensors")


class Decoder:
    """Turns nodes into values and trusts none of them.

    Args:
        leaf: gives the value for each reference.
        trusted: may this loaded class be rebuilt from its fields?
        unknown: what becomes of types this process doesn't know.
        registered: use types registered in this process; without, the result depends on the tree alone.
        late: leave registered types that hold references opaque: their decoders want what is referred to.
    """

    def __init__(
        self,
        leaf: Callable[[Ref], object],
        *,
        trusted: Callable[[type], bool],
        unknown: Literal["raise", "opaque"],
        registered: bool = True,
        late: bool = False,
    ) -> None:
        self._leaf = leaf
        self._leaf_error: BaseException | None = None
        self._depth = 0
        self.trusted = trusted
        self.unknown = unknown
        self.registered = registered
        self.late = late
        #: Something in what was decoded is a reference or opaque.
        self.is_marked = False

    def value(self, node: Any, path: Path) -> Any:
        """The value of any node."""
        cls = type(node)
        if cls is float and not math.isfinite(node):
            malformed(path, "a number is out of range")
        if cls in SCALARS:
            return node
        if cls is not list and cls is not dict:
            malformed(path, f"a {cls.__name__} is not JSON")
        if self._depth > MAX_DEPTH:
            malformed(path, f"nested deeper than {MAX_DEPTH} levels")
        self._depth += 1
        try:
            return self.values(node, path) if cls is list else self._typed(node, path)
        finally:
            self._depth -= 1

    def values(self, nodes: Any, path: Path) -> list[Any]:
        """The values of an array."""
        if type(nodes) is not list:
            malformed(path, "an array is missing")
        if are_verbatim(nodes):
            return list(nodes)
        return [self.value(n, (*path, i)) for i, n in enumerate(nodes)]

    def pairs(self, flat: Any, path: Path) -> list[tuple[Any, Any]]:
        """Items of ``[k, v, k, v]``, in order; every key once."""
        if type(flat) is not list or len(flat) % 2:
            malformed(path, "keys and values don't pair")
        keys = [self.value(k, (*path, "(key)")) for k in flat[::2]]
        items = [(k, self.value(v, (*path, k))) for k, v in zip(keys, flat[1::2], strict=True)]
        if len(dict(items)) != len(items):
            malformed(path, "duplicate key")
        return items

    def ref(self, ref: Ref) -> Any:
        """What the caller puts in the place of a reference; its errors pass unchanged."""
        self.is_marked = True
        try:
            return self._leaf(ref)
        except BaseException as error:
            self._leaf_error = error
            raise

    def opaque(self, name: str, node: Json, path: Path, problem: str, hint: str) -> Opaque:
        """A value of a type that can't be rebuilt here, as the caller wants it."""
        if self.unknown == "raise":
            malformed(path, problem, hint)
        self.is_marked = True
        return Opaque(name, node)

    def _typed(self, node: Json, path: Path) -> Any:
        tag = node.get(TAG)
        codec = find_codec(tag) if isinstance(tag, str) else BY_TYPE[dict]
        if codec is None:
            malformed(path, f"unknown type {tag!r:.80}")
        if codec.tag and not node.keys() <= codec.fields | {TAG}:
            malformed(path, f"unknown fields in a {tag}: {sorted(node.keys() - codec.fields - {TAG})[:3]}")
        try:
            return codec.decode(self, node, path)
        except Exception as error:
            if isinstance(error, (CkptError, RecursionError)) or error is self._leaf_error:
                raise
            malformed(path, f"damaged {codec.tag or 'dict'} ({type(error).__name__}: {error!s:.200})")


def _codec_for(value: object) -> TypeCodec | None:
    codec = BY_TYPE.get(type(value))
    if codec is None:
        load_late()
        codec = BY_TYPE.get(type(value))
    return codec or next((codec for applies, codec in BY_KIND if applies(value)), None)


def _why_not(value: object) -> tuple[str, str]:
    cls = type(value)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(value, type):
        return f"it is a class ({value.__qualname__})", "store its name and look it up after loading"
    if callable(value) and cls.__module__ in {"builtins", "functools"}:
        return f"it is code ({name})", "store a name or the arguments, and make it again after loading"
    base = next((b for b in cls.__mro__[1:-1] if b in BY_TYPE or b in SCALARS), None)
    if base is not None:
        return (
            f"{name} is a subclass of {base.__name__} that is not known",
            f"convert it to {base.__name__}, or teach ckptstore.register_type how to store {cls.__qualname__}",
        )
    return (
        f"a {name} has no stored form",
        f"leave it out, convert it, or teach ckptstore.register_type how to store {cls.__qualname__}",
    )
