"""The non-tensor part of a state as safe, typed, versioned JSON: no pickle, and nothing in it is ever called.

``encode`` turns a state of any nesting into ``{"version": 1, "tree": node}``, to which :func:`with_views` may add
``"views"``: how tensors that overlapped lay in one memory. ``decode`` gives it back with the same
values, container types, key types and order, or says by key why it can't. Tensors are not in it: a ``leaf`` callback
puts a :class:`TensorRef` where one was, and gives something for each on the way back.

Kept are None, bool, int, float (every bit), complex, str, bytes, bytearray; list, tuple, namedtuple, set, frozenset,
deque, dict, OrderedDict, defaultdict, Counter, mappingproxy, range, slice; Enum, dataclass, pydantic model, Namespace,
SimpleNamespace; datetime and its family with zones, Decimal, Fraction, UUID, paths, random.Random; NumPy scalars,
arrays, dtypes and generators; and what :func:`register_type` teaches. Anything else, and any subclass of these that is
not known, is refused before a byte is written. Two places that held the same object hold equal objects afterwards.

What a node looks like: :mod:`ckptstore.format.types_base` and :mod:`ckptstore.format.types_plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ckptstore.errors import FormatError, StateError
from ckptstore.format import types_plain, types_refs, types_registered, types_std, types_user
from ckptstore.format.names import Names, fqn
from ckptstore.format.types_base import (
    MAX_DEPTH,
    TAG,
    ArrayRef,
    Composite,
    Json,
    Key,
    Opaque,
    Path,
    PerRankRef,
    Ref,
    TensorRef,
    malformed,
    type_name,
)
from ckptstore.format.types_engine import Decoder, Encoder
from ckptstore.format.types_registered import is_known, is_registered, register_type

__all__ = [
    "VERSION",
    "ArrayRef",
    "Composite",
    "Key",
    "Names",
    "Opaque",
    "Path",
    "PerRankRef",
    "TensorRef",
    "View",
    "decode",
    "encode",
    "fqn",
    "is_known",
    "is_registered",
    "iter_leaves",
    "joined",
    "register_type",
    "subtrees",
    "tensor_names",
    "views",
    "with_joined",
    "with_views",
]

VERSION = 1

#: Classes a file may name: all that are loaded, those of a list of ``module:qualname``, those a function allows.
Trusted = Literal["loaded"] | Collection[str] | Callable[[type], bool]

#: What may stand beside the tree itself.
_NOTES = {"views", "joined"}
#: Tags of references to tensors.
_NAMED = ("tensor", "array")

# Imported for the codecs they add.
_CODECS = (types_plain, types_refs, types_registered, types_std, types_user)


def encode(value: object, leaf: Callable[[Path, Any], object] | None = None) -> Json:
    """The typed JSON of a value, as it is at the call.

    Args:
        value: the state, or any value.
        leaf: called as ``leaf(path, value)`` for every value that is not a plain scalar (None, bool, int, float, str),
            containers before their contents, but not for dict keys and set elements. Returns the value itself, or what
            to encode in its place: a :class:`TensorRef`, :class:`PerRankRef`, :class:`ArrayRef` or
            :class:`Composite`; an :class:`Opaque`, whose node is put in as it is; or another value, whose contents are
            asked about in turn.
            ``path`` holds dict keys, indexes and field names. None: leave every value.

    Raises:
        StateError: something has no stored form, contains itself, or is too deep or too large; names the key.
    """
    try:
        return {"version": VERSION, "tree": Encoder(leaf).value(value, ())}
    except RecursionError:
        raise StateError(
            f"can't store the state: it is nested too deep for the call stack here (at most {MAX_DEPTH} levels)"
        ) from None


def decode(
    tree: Json,
    leaf: Callable[[Ref], object],
    *,
    trusted: Trusted = (),
    unknown: Literal["raise", "opaque"] = "raise",
    late: bool = False,
) -> Any:
    """The value that ``encode`` was given.

    Args:
        tree: what ``encode`` returned, or what was read; it is not trusted.
        leaf: gives the value for each reference, and for each composite, whose parts it was asked for before; its
            exceptions pass unchanged.
        trusted: classes that may be rebuilt besides registered ones. They must be loaded already and be an Enum, a
            dataclass, a namedtuple or a pydantic model; nothing of theirs is called. ``"loaded"`` suits a training
            program that reads its own checkpoints; the default, none, suits a tool that reads anybody's.
        unknown: ``"raise"``, or ``"opaque"``: put an :class:`Opaque` where a value of an unknown type was.
        late: put an :class:`Opaque`, too, where a registered type holds references, instead of calling its decoder
            with what only stands for tensors.

    Raises:
        FormatError: damaged, written by a newer version, or a type that this process doesn't know; names the key.
    """
    decoder = Decoder(leaf, trusted=_trust(trusted), unknown=unknown, late=late)
    root = _root(tree)
    try:
        return decoder.value(root, ())
    except RecursionError:
        raise FormatError("state tree: nested too deep") from None


def subtrees(tree: Json) -> dict[Any, Json]:
    """The values of the mapping that was encoded, each as a tree of its own, by decoded key, in order.

    Raises:
        FormatError: damaged, or what was encoded is no mapping.
    """
    node = _root(tree)
    tag = node.get(TAG) if type(node) is dict else None
    if type(node) is not dict or (isinstance(tag, str) and tag not in types_plain.MAPPING_TAGS):
        raise FormatError("state tree: the state is not a mapping")
    return {key: {"version": VERSION, "tree": value} for key, value in _items(node, ())}


class View(NamedTuple):
    """Where a tensor lay in the memory that the tensors of its group shared, in elements."""

    group: int
    offset: int
    stride: tuple[int, ...]


def with_views(tree: Json, views: Mapping[str, View]) -> Json:
    """The tree that also says which of its tensors, by name, overlapped; each is stored whole all the same."""
    if not views:
        return tree
    return {**tree, "views": {name: [view.group, view.offset, *view.stride] for name, view in views.items()}}


def views(tree: Json) -> dict[str, View]:
    """What :func:`with_views` noted. Numbers are in range, and not to be trusted beyond that.

    Raises:
        FormatError: damaged.
    """
    noted = tree.get("views", {}) if type(tree) is dict else {}
    if type(noted) is not dict:
        raise FormatError("state tree: its views are damaged")
    for name, view in noted.items():
        if type(view) is not list or len(view) < 2 or not all(type(n) is int and 0 <= n < 2**60 for n in view):
            raise FormatError(f"state tree: the view {name!r} is damaged", key=name)
    return {name: View(view[0], view[1], tuple(view[2:])) for name, view in noted.items()}


def with_joined(tree: Json, places: Collection[str]) -> Json:
    """The tree that also says below which dotted places it is the states of several ranks joined, as of a pipeline."""
    return {**tree, "joined": list(places)}


def joined(tree: Json) -> list[str]:
    """What :func:`with_joined` noted.

    Raises:
        FormatError: damaged.
    """
    places = tree.get("joined", []) if type(tree) is dict else []
    if type(places) is not list or not all(type(place) is str for place in places):
        raise FormatError("state tree: what is said of joined states is damaged")
    return list(places)


def tensor_names(tree: Json) -> list[str]:
    """Names of the tensors a tree refers to, in its order, each once."""
    names: dict[str, None] = {}
    stack = [_root(tree)]
    while stack:
        node = stack.pop()
        if type(node) is list:
            stack.extend(reversed(node))
        elif type(node) is dict:
            if node.get(TAG) in _NAMED and type(node.get("v")) is str:
                names[node["v"]] = None
            else:
                stack.extend(reversed(_in_order(node)))
    return list(names)


def iter_leaves(tree: Json) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The leaves a stock DCP reader would see, with the paths it would give them.

    As DCP does, mappings are walked (keys become strings), lists only when they hold mappings or tensors, and all else
    is a leaf: a :class:`TensorRef`, :class:`ArrayRef` or :class:`PerRankRef`; a plain Python or NumPy value; or an
    :class:`Opaque` when a reference, or a type of the user's or of another library, is somewhere in it. The result
    depends on the tree alone, not on what this process has registered or loaded.

    Raises:
        FormatError: damaged.
    """
    yield from _leaves(_root(tree), (), 0)


def _leaves(node: Any, path: tuple[str | int, ...], depth: int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if depth > MAX_DEPTH:
        malformed(path, "nested too deep")
    tag = node.get(TAG) if type(node) is dict else None
    if type(node) is dict and (not isinstance(tag, str) or tag in types_plain.MAPPING_TAGS):
        for key, value in _items(node, path):
            yield from _leaves(value, (*path, str(key)), depth + 1)
    elif type(node) is list and not _is_terminal(node, depth):
        for i, value in enumerate(node):
            yield from _leaves(value, (*path, i), depth + 1)
    else:
        yield path, _leaf_value(node, path)


def _items(node: Json, path: Path) -> Iterator[tuple[Any, Any]]:
    """Decoded keys and raw nodes of a mapping node."""
    if isinstance(node.get(TAG), str):
        flat = node.get("v")
        if type(flat) is not list or len(flat) % 2:
            malformed(path, "keys and values don't pair")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            yield _leaf_value(key, path), value
    else:
        yield from types_plain.ordered_items(node, path)


def _is_terminal(node: list[Any], depth: int) -> bool:
    if depth > MAX_DEPTH:
        return True
    for entry in node:
        if type(entry) is list and not _is_terminal(entry, depth + 1):
            return False
        if type(entry) is dict:
            tag = entry.get(TAG)
            if not isinstance(tag, str) or tag in types_plain.MAPPING_TAGS or tag == "tensor":
                return False
    return True


def _leaf_value(node: Any, path: Path) -> Any:
    decoder = Decoder(lambda ref: ref, trusted=lambda _: False, unknown="opaque", registered=False)
    try:
        value = decoder.value(node, path)
    except RecursionError:
        malformed(path, "nested too deep")
    if decoder.is_marked and not isinstance(value, (TensorRef, ArrayRef, PerRankRef, Opaque)):
        return Opaque(node[TAG] if type(node) is dict else "list", node)
    return value


def _in_order(node: Json) -> list[Any]:
    if isinstance(node.get(TAG), str):
        return [node[field] for field in sorted(node)]
    return [value for _, value in types_plain.ordered_items(node, ())]


def _root(tree: Json) -> Any:
    if type(tree) is not dict or tree.keys() - _NOTES != {"version", "tree"} or type(tree["version"]) is not int:
        raise FormatError("state tree: this is not one")
    if tree["version"] > VERSION:
        raise FormatError(
            f"state tree: written in version {tree['version']}; this ckptstore reads up to {VERSION}",
            hint="upgrade ckptstore",
        )
    return tree["tree"]


def _trust(trusted: Trusted) -> Callable[[type], bool]:
    if callable(trusted):
        return trusted
    if trusted == "loaded":
        return lambda _: True
    allowed = {trusted} if isinstance(trusted, str) else set(trusted)
    return lambda cls: type_name(cls) in allowed
