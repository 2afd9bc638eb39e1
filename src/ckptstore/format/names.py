"""Names of leaves: the ones stock DCP gives, except where two leaves would get the same one.

DCP joins the path to a leaf with dots, so ``{"a.b": x}`` and ``{"a": {"b": y}}`` both say ``a.b``, and so do an int key
and a string key of the same digits. Whoever comes first keeps the stock name; the next is named by its path as a JSON
array, ``["a","b"]``, which only that path has. Slashes, spaces and other scripts need no escape: names are never paths.

The walk over a state is the same on every rank, so the names are. A reader finds a leaf by its place in the state tree,
not by naming it again: its target may be walked in another order.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

from ckptstore.format.types_base import SAFE_INT, Path, is_unicode, key_text, type_name


def fqn(path: Path, taken: Collection[str] = ()) -> str:
    """The name for a path: as DCP would say it, or escaped when that is ``taken`` or can't be written as UTF-8."""
    stock = ".".join(map(key_text, path))
    if path and is_unicode(stock) and stock not in taken:
        return stock
    escaped = json.dumps([_part(key) for key in path], separators=(",", ":"), ensure_ascii=not is_unicode(stock))
    name, n = escaped, 1
    while name in taken:  # only when somebody has a key that looks like an escaped name
        n += 1
        name = f"{escaped}~{n}"
    return name


class Names:
    """Hands out a name for each path and never one twice.

    Args:
        taken: names that are in use already.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def __contains__(self, name: object) -> bool:
        return name in self._taken

    def name(self, path: Path) -> str:
        """The name of the leaf at ``path``; ask once for each leaf, in the order of the walk."""
        name = fqn(path, self._taken)
        self._taken.add(name)
        return name


def _part(key: object) -> object:
    if type(key) is str or (type(key) is int and abs(key) <= SAFE_INT):
        return key
    return {type_name(type(key)): key_text(key)}
