"""Leaf types of the standard library: time, exact numbers, ids, paths and random generators.

Time keeps its zone: a fixed offset with its name, or the key of a ``zoneinfo`` zone, and ``fold``.
"""

from __future__ import annotations

import random
import re
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path as OsPath
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ckptstore.format.types_base import (
    Json,
    Opaque,
    Path,
    add_codec,
    malformed,
    refuse,
    text,
)
from ckptstore.format.types_engine import Decoder, Encoder

#: Fits every zone of the IANA database; what it names is looked up as a file.
_ZONE_KEY = re.compile(r"[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,3}")
#: Python's ``random.getstate()``: version, 624 words and the position, the second half of a pair of normal numbers.
_RANDOM_WORDS = 625


# --- time -------------------------------------------------------------------------------------------------------------


def _encode_moment(enc: Encoder, value: datetime | time, path: Path) -> Json:
    if value.tzinfo is not None and type(value.tzinfo) not in {timezone, ZoneInfo}:
        refuse(
            path,
            f"its time zone is a {type(value.tzinfo).__module__}.{type(value.tzinfo).__qualname__}",
            "use datetime.timezone or zoneinfo.ZoneInfo",
        )
    node: Json = {"v": value.replace(tzinfo=None, fold=0).isoformat()}
    if value.tzinfo is not None:
        node["zone"] = enc.key(value.tzinfo, path)
    if value.fold:
        node["fold"] = 1
    return node


def _decode_moment(dec: Decoder, node: Json, path: Path, cls: type[datetime] | type[time]) -> Any:
    zone, fold = dec.value(node.get("zone"), path), node.get("fold", 0)
    if isinstance(zone, Opaque):
        return Opaque(cls.__name__, node)
    if not (zone is None or isinstance(zone, tzinfo)) or type(fold) is not int:
        malformed(path, "damaged time zone")
    return cls.fromisoformat(text(node.get("v"), path)).replace(tzinfo=zone, fold=fold)


def _decode_timedelta(dec: Decoder, node: Json, path: Path) -> timedelta:
    days, seconds, microseconds = dec.values(node.get("v"), path)
    if not all(type(v) is int for v in (days, seconds, microseconds)):
        malformed(path, "a timedelta has ints")
    return timedelta(days, seconds, microseconds)


def _encode_timezone(enc: Encoder, value: timezone, path: Path) -> Json:
    offset, name = value.utcoffset(None), value.tzname(None)
    node: Json = {"v": [offset.days, offset.seconds, offset.microseconds]}
    if name != timezone(offset).tzname(None):
        node["name"] = enc.key(name, path)
    return node


def _decode_timezone(dec: Decoder, node: Json, path: Path) -> timezone:
    offset = _decode_timedelta(dec, node, path)
    return timezone(offset, dec.value(node["name"], path)) if "name" in node else timezone(offset)


def _encode_zone(_: Encoder, value: ZoneInfo, path: Path) -> Json:
    if value.key is None or not _ZONE_KEY.fullmatch(value.key):
        refuse(path, f"the time zone {value!r} has no key of the IANA database")
    return {"v": value.key}


def _decode_zone(dec: Decoder, node: Json, path: Path) -> Any:
    key = text(node.get("v"), path)
    if not _ZONE_KEY.fullmatch(key):
        malformed(path, f"{key!r:.80} is not a time zone")
    try:
        return ZoneInfo(key)
    except (ZoneInfoNotFoundError, OSError, ValueError):
        return dec.opaque(
            "ZoneInfo", node, path, f"this machine doesn't know the time zone {key}", "pip install tzdata"
        )


add_codec("datetime", datetime, "v zone fold", _encode_moment, partial(_decode_moment, cls=datetime))
add_codec("time", time, "v zone fold", _encode_moment, partial(_decode_moment, cls=time))
add_codec(
    "date",
    date,
    "v",
    lambda _, value, path: {"v": value.isoformat()},
    lambda _, node, path: date.fromisoformat(text(node.get("v"), path)),
)
add_codec(
    "timedelta",
    timedelta,
    "v",
    lambda _, value, path: {"v": [value.days, value.seconds, value.microseconds]},
    _decode_timedelta,
)
add_codec("timezone", timezone, "v name", _encode_timezone, _decode_timezone)
add_codec("ZoneInfo", ZoneInfo, "v", _encode_zone, _decode_zone)


# --- exact numbers and ids --------------------------------------------------------------------------------------------


def _decode_fraction(dec: Decoder, node: Json, path: Path) -> Fraction:
    numerator, denominator = dec.values(node.get("v"), path)
    if type(numerator) is not int or type(denominator) is not int:
        malformed(path, "a fraction has two ints")
    return Fraction(numerator, denominator)


add_codec(
    "Decimal",
    Decimal,
    "v",
    lambda _, value, path: {"v": str(value)},
    lambda _, node, path: Decimal(text(node.get("v"), path)),
)
add_codec(
    "Fraction",
    Fraction,
    "v",
    lambda enc, value, path: {"v": enc.values([value.numerator, value.denominator], path)},
    _decode_fraction,
)
add_codec(
    "UUID",
    UUID,
    "v",
    lambda _, value, path: {"v": str(value)},
    lambda _, node, path: UUID(text(node.get("v"), path)),
)


# --- paths ------------------------------------------------------------------------------------------------------------


def _add_path(cls: type[PurePath], there: type[PurePath]) -> None:
    def decode(dec: Decoder, node: Json, path: Path) -> PurePath:
        name = dec.value(node.get("v"), path)
        return there(text(name, path))

    # A path may hold bytes that are not text (as lone surrogates), which the engine writes its own way.
    add_codec(cls.__name__, cls, "v", lambda enc, value, path: {"v": enc.key(str(value), path)}, decode)


#: A concrete path of the other system can only be looked at.
_IS_POSIX = type(OsPath()) is PosixPath
_add_path(PurePosixPath, PurePosixPath)
_add_path(PureWindowsPath, PureWindowsPath)
_add_path(PosixPath, PosixPath if _IS_POSIX else PurePosixPath)
_add_path(WindowsPath, PureWindowsPath if _IS_POSIX else WindowsPath)


# --- random.Random ----------------------------------------------------------------------------------------------------


def _encode_random(enc: Encoder, value: random.Random, path: Path) -> Json:
    version, words, gauss = value.getstate()
    return {"v": enc.values([version, list(words), gauss], path)}


def _decode_random(dec: Decoder, node: Json, path: Path) -> random.Random:
    version, words, gauss = dec.values(node.get("v"), path)
    fits = type(words) is list and len(words) == _RANDOM_WORDS and all(type(w) is int for w in words)
    if version != 3 or not fits or not (gauss is None or type(gauss) is float):
        malformed(path, "damaged state of a random.Random")
    result = random.Random()  # noqa: S311 - the user's own generator, for training
    result.setstate((version, tuple(words), gauss))
    return result


add_codec("Random", random.Random, "v", _encode_random, _decode_random)
