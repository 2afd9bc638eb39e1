"""Settings: stored as plain values, and compared with those of the job that resumes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

_LISTED = 8


def is_config(value: Any) -> bool:
    """Whether this is settings by its type: a Namespace, a pydantic model, a frozen dataclass."""
    if isinstance(value, type):
        return False
    if is_dataclass(value):
        return bool(getattr(value, "__dataclass_params__").frozen)  # noqa: B009  # not in the stubs
    return isinstance(value, (argparse.Namespace, SimpleNamespace)) or hasattr(type(value), "model_fields")


def plain(value: Any) -> Any:
    """Settings as nested dicts, lists and scalars; what is none of these is kept as its text.

    Reads, never copies the object: a config may hold anything.
    """
    if isinstance(value, (bool, int, float, str, type(None))) and type(value) in (bool, int, float, str, type(None)):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, (str, int)) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    if callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    if isinstance(value, (argparse.Namespace, SimpleNamespace)):
        return plain(vars(value))
    return str(value)


def differences(stored: Any, current: Any) -> list[str]:
    """What changed, in words: ``lr: 0.001 -> 0.0003``; at most a few, then a count."""
    found = list(_differences(stored, current, ""))
    more = [f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
    return found[:_LISTED] + more


def _differences(stored: Any, current: Any, at: str) -> Iterator[str]:
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for key in [*stored, *(key for key in current if key not in stored)]:
            name = f"{at}.{key}" if at else str(key)
            if key not in current:
                yield f"{name}: {_short(stored[key])} -> absent"
            elif key not in stored:
                yield f"{name}: absent -> {_short(current[key])}"
            else:
                yield from _differences(stored[key], current[key], name)
    elif stored != current and not (stored != stored and current != current):
        yield f"{at or 'value'}: {_short(stored)} -> {_short(current)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
