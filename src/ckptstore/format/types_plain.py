"""Scalars that JSON lacks, and the containers of the standard library.

A dict whose keys are all strings is a JSON object with the same keys. JSON objects have no order, so when the keys are
not in sorted order ``"~"`` holds the position of each sorted key: ``{"lr": 0.1, "epoch": 3}`` is
``{"epoch": 3, "lr": 0.1, "~": [1, 0]}``. A key that begins with ``~`` gets a second one in front. All other
mappings are ``{"~": "dict", "v": [key, value, key, value]}`` under their own tag.

Sets are written in the order of their elements' nodes, so that equal sets are equal bytes on every rank.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from ckptstore.format.manifest import canonical
from ckptstore.format.types_base import (
    BY_TAG,
    MAX_INT_BITS,
    RUNS,
    TAG,
    Json,
    Path,
    TypeCodec,
    add_codec,
    blob,
    is_unicode,
    malformed,
    refuse,
    text,
)
from ckptstore.format.types_engine import Decoder, Encoder

#: What a defaultdict may make on its own.
FACTORIES: Mapping[str, type] = {
    t.__name__: t
    for t in (int, float, complex, bool, str, bytes, list, tuple, dict, set, frozenset, deque, Counter, OrderedDict)
}
#: Tags whose ``v`` is ``[key, value, key, value]``.
_MIN_RUN = 16
MAPPING_TAGS = frozenset({"dict", "OrderedDict", "defaultdict", "Counter", "mappingproxy"})


# --- scalars: written by the engine, read here ------------------------------------------------------------------------


def _decode_int(_: Decoder, node: Json, path: Path) -> int:
    digits = text(node.get("v"), path)
    if len(digits) > MAX_INT_BITS // 4 + 8:
        malformed(path, "an int is too long")
    return int(digits, 16)


def _decode_float(_: Decoder, node: Json, path: Path) -> float:
    bits = text(node.get("v"), path)
    if bits in {"nan", "inf", "-inf"}:
        return float(bits)
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    if not math.isnan(value):
        malformed(path, "damaged float")
    return float(value)


def _decode_str(_: Decoder, node: Json, path: Path) -> str:
    return blob(node.get("v"), path).decode("utf-8", "surrogatepass")


def _never(*_: object) -> Any:
    raise AssertionError("the engine writes scalars itself")


add_codec("int", None, "v", _never, _decode_int)
add_codec("float", None, "v", _never, _decode_float)
add_codec("str", None, "v", _never, _decode_str)
add_codec(
    "bytes",
    bytes,
    "v",
    lambda enc, value, path: {"v": enc.blob(value, path)},
    lambda _, node, path: blob(node.get("v"), path),
)
add_codec(
    "bytearray",
    bytearray,
    "v",
    lambda enc, value, path: {"v": enc.blob(value, path)},
    lambda _, node, path: bytearray(blob(node.get("v"), path)),
)


def _decode_complex(dec: Decoder, node: Json, path: Path) -> complex:
    real, imag = dec.values(node.get("v"), path)
    if type(real) is not float or type(imag) is not float:
        malformed(path, "a complex number has two floats")
    return complex(real, imag)


add_codec(
    "complex",
    complex,
    "v",
    lambda enc, value, path: {"v": enc.values([value.real, value.imag], path)},
    _decode_complex,
)


# --- sequences and sets -----------------------------------------------------------------------------------------------


def _add_sequence(cls: type, make: Callable[[list[Any]], Any]) -> None:
    add_codec(
        cls.__name__,
        cls,
        "v",
        lambda enc, value, path: {"v": enc.values(value, path)},
        lambda dec, node, path: make(dec.values(node.get("v"), path)),
    )


def _add_set(cls: type, make: Callable[[list[Any]], Any]) -> None:
    def encode(enc: Encoder, value: Any, path: Path) -> Json:
        return {"v": sorted((enc.key(v, path) for v in list(value)), key=canonical)}

    def decode(dec: Decoder, node: Json, path: Path) -> Any:
        elements = dec.values(node.get("v"), path)
        result = make(elements)
        if len(result) != len(elements):
            malformed(path, "duplicate element")
        return result

    add_codec(cls.__name__, cls, "v", encode, decode)


def _encode_list(enc: Encoder, value: list[Any], path: Path) -> Any:
    values = list(value)
    if len(values) >= _MIN_RUN and type(values[0]) in RUNS and len(set(map(type, values))) == 1:
        return RUNS[type(values[0])](enc, values, path)
    return enc.values(values, path)


def _ints(dec: Decoder, node: Json, path: Path) -> list[int]:
    values = dec.values(node.get("v"), path)
    if not all(type(v) is int for v in values):
        malformed(path, "a range has ints")
    return values


def _decode_deque(dec: Decoder, node: Json, path: Path) -> deque[Any]:
    values, maxlen = dec.values(node.get("v"), path), dec.value(node.get("maxlen"), path)
    if maxlen is not None and (type(maxlen) is not int or maxlen < len(values)):
        malformed(path, "a deque is longer than its maxlen")
    return deque(values, maxlen)


add_codec("", list, "", _encode_list, _never)
_add_sequence(tuple, tuple)
_add_set(set, set)
_add_set(frozenset, frozenset)
add_codec(
    "deque",
    deque,
    "v maxlen",
    lambda enc, value, path: {"v": enc.values(list(value), path), "maxlen": value.maxlen},
    _decode_deque,
)
add_codec(
    "range",
    range,
    "v",
    lambda enc, value, path: {"v": enc.values([value.start, value.stop, value.step], path)},
    lambda dec, node, path: range(*_ints(dec, node, path)),
)
add_codec(
    "slice",
    slice,
    "v",
    lambda enc, value, path: {"v": enc.values([value.start, value.stop, value.step], path)},
    lambda dec, node, path: slice(*dec.values(node.get("v"), path)),
)


# --- mappings ---------------------------------------------------------------------------------------------------------


def _escaped(key: str) -> str:
    return TAG + key if key.startswith(TAG) else key


def _encode_dict(enc: Encoder, value: dict[Any, Any], path: Path) -> Json:
    items = list(value.items())
    if not all(type(k) is str and is_unicode(k) for k, _ in items):
        return {TAG: "dict", "v": enc.pairs(items, path)}
    node: Json = {_escaped(k): enc.value(v, (*path, k)) for k, v in items}
    ordered = sorted(node)
    if ordered != list(node):
        position = {k: i for i, k in enumerate(node)}
        node[TAG] = [position[k] for k in ordered]
    return node


def ordered_items(node: Json, path: Path) -> list[tuple[str, Any]]:
    """Keys and nodes of a plain dict in the order they had."""
    keys = sorted(k for k in node if k != TAG)
    if TAG in node:
        positions = node[TAG]
        if type(positions) is not list or not all(type(p) is int for p in positions):
            malformed(path, "the order of a dict is damaged")
        if sorted(positions) != list(range(len(keys))):
            malformed(path, "the order of a dict doesn't fit its keys")
        keys = [k for _, k in sorted(zip(positions, keys, strict=True))]
    for key in keys:
        if type(key) is not str or (key.startswith(TAG) and not key.startswith(2 * TAG)):
            malformed(path, f"key {key!r:.80} is not escaped")
    return [(k.removeprefix(TAG), node[k]) for k in keys]


def _decode_dict(dec: Decoder, node: Json, path: Path) -> dict[Any, Any]:
    return {k: dec.value(v, (*path, k)) for k, v in ordered_items(node, path)}


def _add_mapping(cls: type, make: Callable[[list[tuple[Any, Any]]], Any]) -> None:
    add_codec(
        cls.__name__,
        cls,
        "v",
        lambda enc, value, path: {"v": enc.pairs(list(value.items()), path)},
        lambda dec, node, path: make(dec.pairs(node.get("v"), path)),
    )


def _encode_defaultdict(enc: Encoder, value: defaultdict[Any, Any], path: Path) -> Json:
    factory = value.default_factory
    name = next((n for n, known in FACTORIES.items() if known is factory), None)
    if name is None and factory is not None:
        refuse(
            path,
            f"the default_factory {factory!r} of a defaultdict is code",
            f"use one of {', '.join(FACTORIES)}, or convert it with dict(...)",
        )
    return {"factory": name, "v": enc.pairs(list(value.items()), path)}


def _decode_defaultdict(dec: Decoder, node: Json, path: Path) -> defaultdict[Any, Any]:
    name = node.get("factory")
    if name is not None and text(name, path) not in FACTORIES:
        malformed(path, f"unknown default factory {name!r:.80}")
    return defaultdict(None if name is None else FACTORIES[name], dec.pairs(node.get("v"), path))


def _fields(dec: Decoder, node: Json, path: Path) -> dict[str, Any]:
    items = dict(dec.pairs(node.get("v"), path))
    if not all(type(k) is str for k in items):
        malformed(path, "a namespace has names")
    return items


def _decode_namespace(dec: Decoder, node: Json, path: Path) -> argparse.Namespace:
    result = argparse.Namespace()
    vars(result).update(_fields(dec, node, path))
    return result


add_codec("", dict, "", _encode_dict, _decode_dict)
BY_TAG["dict"] = TypeCodec("dict", frozenset({"v"}), _never, lambda dec, node, path: dict(dec.pairs(node["v"], path)))
_add_mapping(OrderedDict, OrderedDict)
_add_mapping(Counter, lambda items: Counter(dict(items)))
_add_mapping(MappingProxyType, lambda items: MappingProxyType(dict(items)))
add_codec("defaultdict", defaultdict, "v factory", _encode_defaultdict, _decode_defaultdict)
add_codec(
    "SimpleNamespace",
    SimpleNamespace,
    "v",
    lambda enc, value, path: {"v": enc.pairs(list(vars(value).items()), path)},
    lambda dec, node, path: SimpleNamespace(**_fields(dec, node, path)),
)
add_codec(
    "Namespace",
    argparse.Namespace,
    "v",
    lambda enc, value, path: {"v": enc.pairs(list(vars(value).items()), path)},
    _decode_namespace,
)
