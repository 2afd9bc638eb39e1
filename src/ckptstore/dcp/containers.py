"""The containers of a target, and of what is stored for it: taken from once, put into once all is read."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from ckptstore.dcp.modules import strip_wrappers
from ckptstore.dcp.stored import MISSING
from ckptstore.errors import LoadMismatchError

#: Puts a value where the one it was made for is.
Replace = Callable[[Any], None]


def replacer(container: Any, key: Any) -> Replace:
    """Puts a value under this key.

    Raises, when it is called:
        LoadMismatchError: nothing can be put into such a container.
    """

    def replace(value: Any) -> None:
        if not isinstance(container, (MutableMapping, list)):
            raise LoadMismatchError(
                f"the value stored for {key!r} can't be put into a {type(container).__name__}",
                hint="use a dict",
                key=str(key),
            )
        container[key] = value

    return replace


def in_place(target: Any, replace: Replace) -> Replace:
    """Containers of plain values keep their identity and get the stored contents; the rest is replaced."""

    def refill(value: Any) -> None:
        if type(target) is list and type(value) is list:
            target[:] = value
        elif isinstance(target, dict) and type(target) is type(value):
            target.clear()
            target.update(value)
        elif isinstance(target, torch.Generator) and isinstance(value, torch.Generator):
            target.set_state(value.get_state())
        else:
            replace(value)

    return refill


def replace_tuple(target: Any, new: list[Any], replace: Replace) -> None:
    """A tuple, named or not, with these items; the same one where none of them is another object."""
    if any(a is not b for a, b in zip(new, target, strict=True)):
        cls = type(target)
        replace(cls(*new) if hasattr(cls, "_fields") else cls(new))


class Flat:
    """Stored values by flat name, each taken once; wrapper segments in names don't matter."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._bare: dict[str, str] | None = None

    def take(self, fqn: str) -> Any:
        """The value for a name, or MISSING."""
        if fqn in self._values:
            return self._values.pop(fqn)
        if self._bare is None:
            self._bare = {strip_wrappers(name): name for name in self._values}
        return self._values.pop(self._bare.get(strip_wrappers(fqn), fqn), MISSING)

    def left(self) -> list[str]:
        """Names nobody took."""
        return list(self._values)
