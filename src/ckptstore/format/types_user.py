"""Classes of the user's program that need no registration: Enum, dataclass, namedtuple and pydantic model.

A class is named in a file, so it is looked up, never imported, and an instance is its fields, put back without
``__init__``, ``__post_init__``, ``__new__``, validation or default factories of the class. Looking up reads the
dictionaries of modules that are loaded already, so not even a module's ``__getattr__`` runs. A class with ``__del__``
is left alone, since made-up fields could steer that. What remains are ``__hash__`` and ``__eq__``, which run when an
instance is a key or an element of a set; so beyond this ``trusted`` decides, class by class.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from enum import Enum, Flag
from types import MemberDescriptorType, ModuleType
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ckptstore.format.types_base import (
    BY_KIND,
    BY_TAG,
    Json,
    Path,
    add_codec,
    malformed,
    refuse,
    text,
    type_name,
)
from ckptstore.format.types_engine import Decoder, Encoder
from ckptstore.format.types_plain import FACTORIES

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def loaded_class(name: str) -> type | None:
    """The class of this name, if its module is loaded already; imports and calls nothing."""
    module_name, _, qualname = name.partition(":")
    names = [module_name] if module_name != "__main__" else ["__main__", "__mp_main__"]
    for candidate in names:
        found: Any = sys.modules.get(candidate)
        for part in qualname.split("."):
            if not issubclass(type(found), (ModuleType, type)):
                found = None
                break
            found = object.__getattribute__(found, "__dict__").get(part)
        if issubclass(type(found), type) and type_name(found) == name:
            return cast(type, found)
    return None


def _name_of(value: object, path: Path) -> str:
    name = type_name(type(value))
    found = loaded_class(name)
    if found is None or _kind(found) != _kind(type(value)):
        refuse(
            path,
            f"its class {name} can't be found by that name",
            "define the class at the top level of a module, or use ckptstore.register_type",
        )
    return name


def _class_of(dec: Decoder, node: Json, kind: str, path: Path) -> type | None:
    """The class a node names, or None when it can't be used here; ``raise`` mode ends in the error."""
    name = text(node.get("name"), path)
    cls = loaded_class(name)
    if cls is not None and _kind(cls) != kind:
        malformed(path, f"{name!r:.80} is not a {kind}")
    return cls if cls is not None and dec.trusted(cls) else None


def _unknown(dec: Decoder, node: Json, path: Path) -> Any:
    name = text(node.get("name"), path)
    loaded = loaded_class(name) is not None
    problem = f"its class {name!r:.80} is " + ("not trusted here" if loaded else "not loaded in this process")
    hint = "allow the class" if loaded else "import the module that defines it before loading"
    return dec.opaque(name, node, path, problem, hint + ", or use ckptstore.register_type")


def _kind(cls: type) -> str | None:
    if issubclass(cls, Enum):
        return "enum"
    bases = cls.__mro__[:-1]
    if issubclass(cls, tuple):
        fields = getattr(cls, "_fields", None)
        is_named = isinstance(fields, tuple) and all(isinstance(f, str) for f in fields)
        pure = all(b is tuple or b.__flags__ & _HEAP_TYPE for b in bases)
        return "namedtuple" if is_named and pure and not hasattr(cls, "__del__") else None
    if hasattr(cls, "__del__") or not all(b.__flags__ & _HEAP_TYPE for b in bases):
        return None
    if issubclass(cls, BaseModel):
        return "pydantic"
    return "dataclass" if dataclasses.is_dataclass(cls) else None


def _add_kind(kind: str, fields: str, encode: Callable[..., Json], decode: Callable[..., Any]) -> None:
    add_codec(kind, None, fields, encode, decode)
    BY_KIND.append((lambda value: _kind(type(value)) == kind, BY_TAG[kind]))


# --- Enum -------------------------------------------------------------------------------------------------------------


def _encode_enum(enc: Encoder, value: Enum, path: Path) -> Json:
    if isinstance(value, Flag):
        return {"name": _name_of(value, path), "v": enc.key(int(value._value_), path)}
    return {"name": _name_of(value, path), "v": value._name_}


def _decode_enum(dec: Decoder, node: Json, path: Path) -> Any:
    cls = _class_of(dec, node, "enum", path)
    if cls is None:
        return _unknown(dec, node, path)
    assert issubclass(cls, Enum)
    value = dec.value(node.get("v"), path)
    if issubclass(cls, Flag):
        if type(value) is not int:
            malformed(path, "a flag has an int")
        return cls(value)
    member = cls.__members__.get(text(value, path))
    if member is None:
        malformed(path, f"{type_name(cls)} has no member {value!r:.80}", "the class has changed since this was saved")
    return member


# --- namedtuple -------------------------------------------------------------------------------------------------------


def _encode_namedtuple(enc: Encoder, value: Any, path: Path) -> Json:
    if getattr(value, "__dict__", None):
        refuse(path, f"the namedtuple {type_name(type(value))} has attributes beside its fields")
    items = list(zip(type(value)._fields, tuple.__iter__(value), strict=True))
    return {"name": _name_of(value, path), "v": enc.pairs(items, path)}


def _decode_namedtuple(dec: Decoder, node: Json, path: Path) -> Any:
    cls = _class_of(dec, node, "namedtuple", path)
    if cls is None:
        return _unknown(dec, node, path)
    fields: Any = cls
    items = dict(dec.pairs(node.get("v"), path))
    defaults = getattr(cls, "_field_defaults", {})
    _complete(items, fields._fields, lambda name: defaults[name], cls, path)
    return tuple.__new__(cls, [items[name] for name in fields._fields])


# --- dataclass --------------------------------------------------------------------------------------------------------


def _slots(cls: type) -> dict[str, Any]:
    return {
        name: member
        for base in reversed(cls.__mro__)
        for name, member in vars(base).items()
        if isinstance(member, MemberDescriptorType)
    }


def _instance_dict(value: object) -> dict[str, Any] | None:
    try:
        return cast("dict[str, Any]", object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return None


def _encode_dataclass(enc: Encoder, value: Any, path: Path) -> Json:
    items: dict[str, Any] = {}
    for name, member in _slots(type(value)).items():
        try:
            items[name] = member.__get__(value)
        except AttributeError:
            continue  # a slot that was never set
    items.update(_instance_dict(value) or {})
    node: Json = {"name": _name_of(value, path), "v": enc.pairs(list(items.items()), path)}
    unset = [f.name for f in dataclasses.fields(value) if f.name not in items]
    return {**node, "unset": unset} if unset else node


def _decode_dataclass(dec: Decoder, node: Json, path: Path) -> Any:
    cls = _class_of(dec, node, "dataclass", path)
    if cls is None:
        return _unknown(dec, node, path)
    items = dict(dec.pairs(node.get("v"), path))
    slots = _slots(cls)
    result: Any = object.__new__(cls)
    attributes = _instance_dict(result)
    unset = dec.values(node.get("unset", []), path)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in unset}
    known = {*slots, *fields} if attributes is None else {*slots, *fields, *items}
    _complete(items, fields, lambda name: _default_of(fields[name]), cls, path, known=known)
    for name, value in items.items():
        if name in slots:
            slots[name].__set__(result, value)
        elif attributes is not None:
            attributes[name] = value
    return result


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return _made_by(field.default_factory)


def _made_by(factory: Any) -> Any:
    if not any(factory is known for known in FACTORIES.values()):
        raise KeyError("a factory that is code isn't called for a file")
    return factory()


def _complete(
    items: dict[str, Any],
    fields: Any,
    default: Callable[[str], Any],
    cls: type,
    path: Path,
    *,
    known: Any = None,
) -> None:
    """Fields that were added to the class since get their plain defaults; what the class can't hold is an error."""
    if not all(type(name) is str for name in items):
        malformed(path, "a field has a name")
    missing = []
    for name in fields:
        if name not in items:
            try:
                items[name] = default(name)
            except KeyError:
                missing.append(name)
    surplus = sorted(items.keys() - set(fields if known is None else known))
    if missing or surplus:
        malformed(
            path,
            f"{type_name(cls)} has changed since this was saved: missing fields {missing}, unknown fields {surplus}",
            "give new fields a default, or use ckptstore.register_type",
        )


# --- pydantic ---------------------------------------------------------------------------------------------------------


def _encode_pydantic(enc: Encoder, value: BaseModel, path: Path) -> Json:
    private = value.__pydantic_private__
    node: Json = {
        "name": _name_of(value, path),
        "v": enc.pairs(list(value.__dict__.items()), path),
        "set": sorted(value.__pydantic_fields_set__),
    }
    if value.__pydantic_extra__ is not None:
        node["extra"] = enc.pairs(list(value.__pydantic_extra__.items()), path)
    if private is not None:
        node["private"] = enc.pairs([(k, v) for k, v in private.items() if v is not PydanticUndefined], path)
    return node


def _decode_pydantic(dec: Decoder, node: Json, path: Path) -> Any:
    cls = _class_of(dec, node, "pydantic", path)
    if cls is None:
        return _unknown(dec, node, path)
    assert issubclass(cls, BaseModel)
    items = dict(dec.pairs(node.get("v"), path))
    fields = cls.model_fields
    _complete(items, fields, lambda name: _model_default(cls, name), cls, path, known={*fields, *items})
    extra = dict(dec.pairs(node["extra"], path)) if "extra" in node else None
    private = dict(dec.pairs(node["private"], path)) if "private" in node else None
    names = dec.values(node.get("set"), path)
    if not all(type(n) is str for n in [*names, *(extra or {}), *(private or {})]):
        malformed(path, "a field has a name")
    result = object.__new__(cls)
    for slot, content in {
        "__dict__": items,
        "__pydantic_fields_set__": set(names),
        "__pydantic_extra__": extra,
        "__pydantic_private__": private,
    }.items():
        object.__setattr__(result, slot, content)
    return result


def _model_default(cls: type[BaseModel], name: str) -> Any:
    field = cls.model_fields[name]
    if field.is_required():
        raise KeyError(name)
    return field.get_default() if field.default_factory is None else _made_by(field.default_factory)


_add_kind("enum", "name v", _encode_enum, _decode_enum)
_add_kind("namedtuple", "name v", _encode_namedtuple, _decode_namedtuple)
_add_kind("dataclass", "name v unset", _encode_dataclass, _decode_dataclass)
_add_kind("pydantic", "name v set extra private", _encode_pydantic, _decode_pydantic)
