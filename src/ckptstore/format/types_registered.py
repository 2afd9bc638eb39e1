"""Types that a program teaches the store: a class, a name for it in files, and a function for either direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptstore.errors import CkptError, ConfigError
from ckptstore.format.types_base import (
    BY_TAG,
    BY_TYPE,
    SCALARS,
    TAG,
    Json,
    Opaque,
    Path,
    TypeCodec,
    is_unicode,
    load_late,
    refuse,
    text,
    type_name,
)
from ckptstore.format.types_engine import Decoder, Encoder

T = TypeVar("T")

_MAX_NAME = 300


@dataclass(frozen=True)
class _Registered:
    cls: type
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]


_BY_NAME: dict[str, _Registered] = {}


def register_type(
    cls: type[T], *, encode: Callable[[T], object], decode: Callable[[Any], T], name: str | None = None
) -> type[T]:
    """Teach the store how to keep values of exactly this class; subclasses need a registration of their own.

    Register before saving and before loading, in every process that does either. Registering a name again replaces
    what it stood for, so a notebook cell may run twice.

    Args:
        encode: gives something that can be stored: plain values, containers, tensors, other registered types.
        decode: makes the value from what ``encode`` gave, and must not trust it more than any file.
        name: what the file calls the type; ``module:qualname`` of the class when None. A name of your own survives
            moving or renaming the class.

    Returns:
        The class itself.

    Raises:
        ConfigError: not a class, a type the store handles itself, or a name that can't be written.
    """
    if not isinstance(cls, type):
        raise ConfigError(f"register_type needs a class, not {cls!r}")
    load_late()
    known = BY_TYPE.get(cls)
    if cls in SCALARS or (known is not None and known.tag != "type"):
        raise ConfigError(f"{cls.__qualname__} is stored as it is and can't be registered")
    name = type_name(cls) if name is None else name
    if not name or len(name) > _MAX_NAME or not name.isprintable() or not is_unicode(name):
        raise ConfigError(f"{name!r} can't be the name of a type", hint=f"use 1 to {_MAX_NAME} printable characters")
    previous = _BY_NAME.get(name)
    if previous is not None and previous.cls is not cls:
        BY_TYPE.pop(previous.cls, None)
    entry = _Registered(cls, name, encode, decode)
    _BY_NAME[name] = entry
    BY_TYPE[cls] = TypeCodec("type", _REGISTERED_FIELDS, _encoder_of(entry), _decode_registered)
    return cls


def is_registered(cls: type) -> bool:
    """Whether :func:`register_type` was called for exactly this class."""
    codec = BY_TYPE.get(cls)
    return codec is not None and codec.tag == "type"


def is_known(opaque: Opaque) -> bool:
    """Whether this process could decode it: its type is registered here."""
    return type(opaque.data) is dict and opaque.data.get(TAG) == "type" and opaque.name in _BY_NAME


_REGISTERED_FIELDS = frozenset({"name", "v"})


def _encoder_of(entry: _Registered) -> Callable[[Encoder, Any, Path], Json]:
    def encode(enc: Encoder, value: Any, path: Path) -> Json:
        try:
            plain = entry.encode(value)
        except CkptError:
            raise
        except Exception as error:
            refuse(path, f"the registered encoder of {entry.name} failed: {type(error).__name__}: {error}")
        return {"name": entry.name, "v": enc.value(plain, path)}

    return encode


def _decode_registered(dec: Decoder, node: Json, path: Path) -> Any:
    name = text(node.get("name"), path)
    entry = _BY_NAME.get(name) if dec.registered else None
    if entry is None:
        hint = "import the code that registers it before loading (ckptstore.register_type)"
        return dec.opaque(name, node, path, f"the type {name!r:.80} is not registered in this process", hint)
    marked, dec.is_marked = dec.is_marked, False
    plain = dec.value(node.get("v"), path)
    holds_references, dec.is_marked = dec.is_marked, marked or dec.is_marked
    if dec.late and holds_references:
        return Opaque(name, node)
    try:
        return entry.decode(plain)
    except Exception as error:
        problem = f"the registered decoder of {name} failed: {type(error).__name__}: {error}"
        return dec.opaque(name, node, path, problem, "see ckptstore.register_type")


BY_TAG["type"] = TypeCodec("type", _REGISTERED_FIELDS, lambda *_: {}, _decode_registered)
