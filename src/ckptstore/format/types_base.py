"""What a node of the state tree is, and the table of codecs, one per type.

A *node* is JSON. ``None``, bools, ints up to 2**53, finite floats and strings stand for themselves, an array is a list,
an object is a dict with string keys (see :mod:`ckptstore.format.types_plain`), and everything else is an object whose
``"~"`` names the type: ``{"~": "tuple", "v": [1, 2]}``. Each Python level takes at most two JSON levels.

A codec belongs to exactly one class: a subclass nobody knows is refused, never stored as its base.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from ckptstore.errors import FormatError, StateError

if TYPE_CHECKING:
    from ckptstore.format.types_engine import Decoder, Encoder

Json = dict[str, Any]
#: A dict key, a list index or a field name.
Key = Hashable
Path = tuple[Key, ...]

#: Marks an object as a typed node (a string) or carries the order of a plain dict (an array).
TAG = "~"

#: Nesting of Python values. Twice that many JSON levels stay below what pydantic serialises (255).
MAX_DEPTH = 100
#: Values in one tree; more belong into arrays or tensors.
MAX_VALUES = 5_000_000
#: Bytes of one ``bytes`` or array value; more belong into a tensor, which is chunked, compressed and deduplicated.
MAX_BLOB_BYTES = 32 * 1024 * 1024
#: Longer ints are quadratic work for whoever calculates with them.
MAX_INT_BITS = 1 << 20

#: Beyond this a JSON reader may round to a double.
SAFE_INT = 1 << 53
_PLAIN_NAN = struct.pack(">d", math.nan)
#: What stands for itself, but for a few values.
SCALARS: frozenset[type] = frozenset({float, int, str, bool, type(None)})


@dataclass(frozen=True)
class TensorRef:
    """Stands for a tensor that is stored under ``name``."""

    name: str


@dataclass(frozen=True)
class PerRankRef:
    """Stands for a value that each rank keeps for itself, under ``key`` of its own tree."""

    key: str


@dataclass(frozen=True)
class ArrayRef:
    """Stands for a NumPy array whose elements are stored as the tensor ``name``.

    Attributes:
        dtype: of the array, when the tensor holds only its bytes, because torch has no such elements; else None.
        shape: of the array, when it is not the tensor's.
        is_transposed: the tensor is the array's transpose: memory in Fortran order.
    """

    name: str
    dtype: Any = None
    shape: tuple[int, ...] | None = None
    is_transposed: bool = False


@dataclass
class Composite:
    """Stands for a tensor that is made of others: sparse, nested, quantized, or of a class that can be taken apart.

    Attributes:
        kind: how it is put together.
        parts: its tensors by name; references, or whatever stands for tensors where it is used. They may be composite.
        facts: what else it takes: sizes, scales, a class. Values the tree can hold.
        at: dotted place in the tree it was decoded from; for messages.
    """

    kind: str
    parts: dict[str, Any]
    facts: dict[str, Any]
    at: str = field(default="", compare=False)


Ref = TensorRef | PerRankRef | Composite


@dataclass(frozen=True)
class Opaque:
    """A value kept as it is stored, because this process doesn't know its type; encoding it gives the same node again.

    Attributes:
        name: the registered name of the type, or ``module:qualname`` of its class.
        data: the stored node.
    """

    name: str
    data: Any

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class TypeCodec:
    """How values of exactly one type become the fields of a node, and back."""

    tag: str
    fields: frozenset[str]
    encode: Callable[[Encoder, Any, Path], Any]
    decode: Callable[[Decoder, Json, Path], Any]


BY_TYPE: dict[type, TypeCodec] = {}
BY_TAG: dict[str, TypeCodec] = {}
#: Consulted for values without a codec of their own, in order: (does it apply?, codec). For Enum, dataclass, ...
BY_KIND: list[tuple[Callable[[Any], bool], TypeCodec]] = []
#: How a list is encoded all of whose elements are of this type, when there are many.
RUNS: dict[type, Callable[[Encoder, list[Any], Path], Any]] = {}
#: Codecs that are imported on first need: prefix of their tags, the library they need, the module.
LATE = (
    ("np.", "numpy", "ckptstore.format.types_numpy"),
    ("np.", "numpy", "ckptstore.format.types_numpy_random"),
)


def add_codec(tag: str, cls: type | None, fields: str, encode: Callable[..., Any], decode: Callable[..., Any]) -> None:
    """Make ``tag`` part of the format; ``fields`` are the names a node may have beside the tag, space-separated."""
    codec = TypeCodec(tag, frozenset(fields.split()), encode, decode)
    if tag:
        BY_TAG[tag] = codec
    if cls is not None:
        BY_TYPE[cls] = codec


def dotted(path: Path) -> str:
    """The path as people write it in messages."""
    return ".".join(map(key_text, path)) if path else "the state itself"


def key_text(key: object) -> str:
    """``str(key)``, except that Python refuses to spell out ints of more than 4300 digits."""
    try:
        return str(key)
    except ValueError:
        return hex(key) if isinstance(key, int) else f"<{type(key).__name__}>"


def type_name(cls: type) -> str:
    """``module:qualname``; what multiprocessing calls ``__mp_main__`` is the program, ``__main__``."""
    module = "__main__" if cls.__module__ == "__mp_main__" else cls.__module__
    return f"{module}:{cls.__qualname__}"


def refuse(path: Path, problem: str, hint: str | None = None) -> NoReturn:
    """Raise StateError for the value at ``path``."""
    raise StateError(f"can't store {dotted(path)}: {problem}", hint=hint, key=dotted(path))


def malformed(path: Path, problem: str, hint: str | None = None) -> NoReturn:
    """Raise FormatError for the node at ``path``."""
    raise FormatError(f"state tree, {dotted(path)}: {problem}", hint=hint, key=dotted(path))


def find_codec(tag: str) -> TypeCodec | None:
    """The codec of a tag; the modules asked for are ours, whatever the tag says."""
    if tag and tag not in BY_TAG:
        for prefix, _, module in LATE:
            if tag.startswith(prefix):
                import_module(module)
    return BY_TAG.get(tag) if tag else None


def load_late() -> None:
    """Make the codecs of every library that this process has loaded available."""
    for _, library, module in LATE:
        if library in sys.modules:
            import_module(module)


def text(node: Any, path: Path, what: str = "text") -> str:
    """The node itself, if it is a string."""
    if type(node) is not str:
        malformed(path, f"{what} is missing")
    return node


def integer(node: Any, path: Path, *, low: int, high: int) -> int:
    """The node itself, if it is an int in ``low..high``."""
    if type(node) is not int or not low <= node <= high:
        malformed(path, f"expected a number in {low}..{high}")
    return node


def blob(node: Any, path: Path) -> bytes:
    """The bytes of base64 text."""
    try:
        return base64.b64decode(text(node, path, "base64 text").encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        malformed(path, "damaged base64 text")


def is_unicode(value: str) -> bool:
    """No lone surrogates: it can be written as UTF-8."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def are_verbatim(values: Sequence[Any]) -> bool:
    """Every value is a scalar that stands for itself; decided without a Python loop for runs of numbers."""
    kinds = set(map(type, values))
    if not kinds <= SCALARS:
        return False
    if len(kinds) == 1:
        (kind,) = kinds
        if kind is float:
            return all(map(math.isfinite, values))
        if kind is int:
            return bool(min(values) >= -SAFE_INT and max(values) <= SAFE_INT)
    return all(map(is_verbatim, values))


def is_verbatim(value: Any) -> bool:
    """This scalar stands for itself."""
    cls = type(value)
    if cls is float:
        return math.isfinite(value)
    if cls is int:
        return bool(-SAFE_INT <= value <= SAFE_INT)
    return cls is not str or is_unicode(value)


def encode_scalar(value: Any, path: Path) -> Any:
    """The node of a scalar: itself, or text that keeps every bit of it."""
    if is_verbatim(value):
        return value
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            refuse(path, f"an int of {value.bit_length()} bits, more than {MAX_INT_BITS}", "store it as bytes")
        return {TAG: "int", "v": hex(value)}
    if type(value) is float:
        bits = struct.pack(">d", value)
        return {TAG: "float", "v": str(value) if math.isinf(value) or bits == _PLAIN_NAN else bits.hex()}
    return {TAG: "str", "v": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode("ascii")}
