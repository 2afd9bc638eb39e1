"""A checkpoint's state tree with stubs where its tensors go, renamed to the target's names.

Stubs cost nothing, so a tree of any size can be compared with a target before anything is allocated or read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from ckptstore.dcp import assembly
from ckptstore.dcp import torch_types as _torch_types  # noqa: F401  # registers torch's small types
from ckptstore.dcp.modules import EXTRA_STATE
from ckptstore.dcp.source import ChunkSource
from ckptstore.errors import FormatError
from ckptstore.format import tree


@dataclass(frozen=True)
class Stub:
    """Stands for a stored tensor, by its stored name (no alias)."""

    name: str


class StoredState:
    """The decoded top-level values of a checkpoint, by key.

    Args:
        source: the checkpoint.
        rank: whose ``per_rank`` values; rank r of a larger world gets those of rank r modulo the stored world.
        keys: top-level keys to decode; None: all.
        rename: stored prefix -> target prefix of dotted names.
        allocate: gives a real tensor for (top-level key, stored name) where a stub could not be found again.
    """

    def __init__(
        self,
        source: ChunkSource,
        *,
        rank: int,
        keys: frozenset[Any] | None,
        rename: Mapping[str, str] | None = None,
        allocate: Callable[[Any, str], object] | None = None,
    ) -> None:
        self._source = source
        self.renamed: dict[str, str] = {}
        #: To be called when all tensors are filled: is what was put together from them sound?
        self.checks: list[Callable[[], None]] = []
        #: Top-level key -> stored name -> tensor, of those in objects that are made when all is filled.
        self._hidden: dict[Any, dict[str, object]] = {}
        #: id of a value that may be such an object -> itself, its top-level key, the way to it from there.
        self._late: dict[int, tuple[object, Any, tuple[int, ...]]] = {}
        self._filled: dict[Any, Any] = {}
        encoded = source.tree
        if encoded is None:
            raise FormatError("the checkpoint has no state tree")
        self._subtrees = tree.subtrees(encoded)
        own = source.per_rank(rank % source.root.summary.world_size)
        self._own = tree.subtrees(own) if own is not None else {}
        self.values: dict[Any, Any] = {}
        for key in self._subtrees:
            if keys is None or key in keys or rename:
                self.values[key] = self._with_stubs(key, allocate)
        if rename:
            self._rename(rename)

    def _with_stubs(self, key: Any, allocate: Callable[[Any, str], object] | None) -> Any:
        found: Counter[str] = Counter()

        def stub(name: str) -> Stub:
            found[name] += 1
            return Stub(name)

        value = self.decode(key, stub, late=True)
        hidden = found - visible_stubs(value)
        if hidden and allocate is not None:
            # Tensors inside objects nobody can look into (a dataclass, an array): those are made when they are filled.
            self._hidden[key] = {name: allocate(key, name) for name in hidden}
            for path, leaf in _leaves(value, ()):
                self._late[id(leaf)] = (leaf, key, path)
        return value

    def is_late(self, value: object) -> bool:
        """Whether this will be something else when the tensors in it are filled."""
        return id(value) in self._late and (not isinstance(value, tree.Opaque) or tree.is_known(value))

    def late(self, value: Any) -> Any:
        """``value`` with the objects in it that hold tensors, which are filled now.

        Raises:
            FormatError: one of them can't be made.
        """
        if not self._late:
            return value
        cls = type(value)
        if cls in (dict, OrderedDict, defaultdict):
            for key in value:
                value[key] = self.late(value[key])
        elif cls in (list, deque):
            for i in range(len(value)):
                value[i] = self.late(value[i])
        elif isinstance(value, tuple):
            new = [self.late(item) for item in value]
            if any(a is not b for a, b in zip(new, value, strict=True)):
                return cls(*new) if hasattr(cls, "_fields") else cls(new)
        elif id(value) in self._late:
            _, key, path = self._late[id(value)]
            return self._made(key, path)
        return value

    def _made(self, key: Any, path: tuple[int, ...]) -> Any:
        if key not in self._filled:
            tensors = self._hidden[key]
            self._filled[key] = self.decode(key, lambda name: tensors.get(name, Stub(name)))
        value, names = self._filled[key], [key]
        for place in path:
            below, value = next(islice(_numbered(value), place, None))
            names.append(below)
        if isinstance(value, tree.Opaque):
            raise FormatError(
                f"{dotted(tuple(names))!r} could not be made of what is stored: {value.name}",
                hint="see ckptstore.register_type",
                key=dotted(tuple(names)),
            )
        return value

    @property
    def keys(self) -> list[Any]:
        """All top-level keys of the checkpoint, in order."""
        return list(self._subtrees)

    def names(self, key: Any) -> list[str]:
        """Names of the tensors below one top-level key, tied ones as what they share."""
        refs: list[str] = []

        def note(name: str) -> Stub:
            refs.append(name)
            return Stub(name)

        self.decode(key, note, late=True)
        return refs

    def decode(self, key: Any, tensor: Callable[[str], object], *, late: bool = False) -> Any:
        """The value below one top-level key, with ``tensor(stored name)`` for each tensor.

        Args:
            late: what ``tensor`` gives isn't filled yet: leave registered types that hold some opaque.
        """

        def leaf(ref: tree.TensorRef | tree.PerRankRef | tree.Composite) -> object:
            if isinstance(ref, tree.Composite):
                return self._whole(f"{key}.{ref.at}" if ref.at else str(key), ref)
            if isinstance(ref, tree.TensorRef):
                name = self._source.aliases.get(ref.name, ref.name)
                if name not in self._source.tensors:
                    raise FormatError(f"the state refers to a tensor {ref.name!r} that is not stored", key=ref.name)
                return tensor(name)
            if ref.key not in self._own:
                return MISSING
            return tree.decode(self._own[ref.key], leaf, trusted="loaded", unknown="opaque", late=late)

        return tree.decode(self._subtrees[key], leaf, trusted="loaded", unknown="opaque", late=late)

    def _whole(self, key: str, stored: tree.Composite) -> object:
        """The tensor, once its parts are tensors; what stands for it while they are stubs."""
        if not all(isinstance(part, torch.Tensor) for part in stored.parts.values()):
            return stored
        return self.put_together(key, stored)

    def put_together(self, key: str, stored: tree.Composite, allowed: type | None = None) -> torch.Tensor:
        """A composite tensor of its parts, to be filled later; notes to check it then.

        Args:
            allowed: a class that may be rebuilt because the target has one.
        """
        built = assembly.put_together(key, stored, allowed)
        self.checks.append(partial(assembly.check, key, built))
        return built

    def _rename(self, rename: Mapping[str, str]) -> None:
        """Move what lies below each stored prefix to its new one; all at once, the longest prefix wins."""
        moves: list[tuple[str, Any]] = []
        taken: list[tuple[str, str, Any]] = []
        for old in sorted(rename, key=len, reverse=True):
            for key in list(self.values):
                moves.extend((old, path) for path in list(_paths_below(self.values, (key,), old)))
            for _, path in moves:
                stored = dotted(path)
                new = rename[old] + stored[len(old) :] if stored.startswith(old) else rename[old].removesuffix(".")
                taken.append((stored, new, _take(self.values, path)))
            moves.clear()
        for stored, new, value in taken:
            self.renamed[stored] = new
            _put(self.values, new, value)


def dotted(path: tuple[Any, ...]) -> str:
    """The path as names and messages say it."""
    return ".".join(map(str, path))


def visible_stubs(value: Any) -> Counter[str]:
    """Names of the stubs :func:`substitute` would find, with how often each."""
    names: Counter[str] = Counter()

    def note(stub: Stub) -> Stub:
        names[stub.name] += 1
        return stub

    substitute(value, note)
    return names


def _numbered(value: Any) -> Iterator[tuple[Any, Any]]:
    """Keys or indexes, and values, of a container that :func:`substitute` looks into."""
    yield from value.items() if isinstance(value, dict) else enumerate(value)


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], object]]:
    """What :func:`substitute` would not look into, scalars and stubs left out, with the way there.

    The way is by position: a key with a NaN in it isn't found again.
    """
    cls = type(value)
    if cls in (dict, OrderedDict, defaultdict, list, deque) or isinstance(value, tuple):
        for place, (_, item) in enumerate(_numbered(value)):
            yield from _leaves(item, (*path, place))
    elif value is not None and not isinstance(value, (bool, int, float, str, Stub, tree.Composite)):
        yield path, value


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


#: No value is stored here.
MISSING: Any = _Missing()


def _paths_below(root: Any, path: tuple[Any, ...], prefix: str) -> Iterator[tuple[Any, ...]]:
    """Paths of the outermost values whose dotted name lies below ``prefix``, through string-keyed mappings."""
    value = root
    for key in path:
        value = value[key]
    name = dotted(path)
    if name.startswith(prefix) or name + "." == prefix or name == prefix:
        yield path
    elif prefix.startswith(name + ".") and isinstance(value, dict):
        for key in list(value):
            yield from _paths_below(root, (*path, key), prefix)


def _take(root: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        root = root[key]
    return root.pop(path[-1])


def _put(root: dict[Any, Any], name: str, value: Any) -> None:
    """Put ``value`` where a target will look for the dotted ``name``: as a flat key below its first segment."""
    head, dot, rest = name.partition(".")
    if not dot:
        if isinstance(value, dict) and isinstance(root.get(head), dict):
            root[head].update(value)
        else:
            root[head] = value
        return
    below = root.setdefault(head, {})
    if not isinstance(below, dict):
        raise FormatError(f"rename: {head!r} is not a mapping in the checkpoint", key=name)
    below[rest] = value


def look_up(stored: Mapping[Any, Any], key: Any) -> tuple[Any, tuple[Any, ...]]:
    """The stored value for one key of a target mapping, and the stored keys it came from.

    A key that is not there as such may be there as flat dotted names (``a.b``, ``a.c`` for ``a``).
    """
    if key in stored:
        return stored[key], (key,)
    if str(key) in stored:
        return stored[str(key)], (str(key),)
    prefix = f"{key}."
    below = {k: v for k, v in stored.items() if isinstance(k, str) and k.startswith(prefix)}
    if not below:
        return MISSING, ()
    return {k[len(prefix) :]: v for k, v in below.items()}, tuple(below)


def flatten(stored: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings of tensors as one flat dict of dotted names; other values stay whole."""
    flat: dict[str, Any] = {}
    for key, value in stored.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and _holds_stub(value) and not name.endswith(EXTRA_STATE):
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat


def _holds_stub(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_stub(below) for below in value.values())
    return isinstance(value, (Stub, tree.Composite))


def substitute(
    value: Any,
    tensor: Callable[[Stub], Any],
    compose: Callable[[tree.Composite | tree.Opaque], Any] = lambda stored: stored,
) -> Any:
    """``value`` with every visible stub replaced; dicts and lists are changed in place, tuples made anew.

    Args:
        tensor: gives what takes the place of a stub.
        compose: gives what takes the place of an opaque value, and of a composite tensor whose parts have been
            replaced; one with a part that became MISSING is MISSING.
    """
    if isinstance(value, Stub):
        return tensor(value)
    if isinstance(value, tree.Composite):
        parts = {name: substitute(part, tensor, compose) for name, part in value.parts.items()}
        return MISSING if any(p is MISSING for p in parts.values()) else compose(replace(value, parts=parts))
    if isinstance(value, tree.Opaque):
        return compose(value)
    cls = type(value)
    if cls in (dict, OrderedDict, defaultdict):
        for key in value:
            value[key] = substitute(value[key], tensor, compose)
    elif cls in (list, deque):
        for i in range(len(value)):
            value[i] = substitute(value[i], tensor, compose)
    elif isinstance(value, tuple):
        new = [substitute(item, tensor, compose) for item in value]
        if any(a is not b for a, b in zip(new, value, strict=True)):
            return cls(*new) if hasattr(cls, "_fields") else cls(new)
    return value
