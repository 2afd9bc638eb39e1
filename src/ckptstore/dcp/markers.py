"""What a user wraps around part of a state to say how it is to be stored. Plain objects; torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class PerRank(Generic[T]):
    """Each rank stores and gets back its own value, instead of all sharing rank 0's.

    As a target of ``load``, ``value`` is filled like any container: what is in it in place, what can't be filled in
    place (an int, a string) by replacing ``value`` itself.

    Attributes:
        value: the rank's own value; whatever a state may hold, nested as you like, but no further ``per_rank``.
    """

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"per_rank({self.value!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PerRank) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]  # mutable


class Trainable:
    """A module of which only the parameters that require grad, and the buffers, are stored and loaded (LoRA).

    What is frozen is neither written nor missed at load. Whether a parameter requires grad is read at each ``save`` and
    ``load``, not when this is made.

    Attributes:
        module: the module itself.

    Raises:
        TypeError: not an ``nn.Module``.
    """

    __slots__ = ("module",)

    def __init__(self, module: torch.nn.Module) -> None:
        if not callable(getattr(module, "named_parameters", None)) or not callable(
            getattr(module, "named_buffers", None)
        ):
            raise TypeError(f"trainable() takes an nn.Module, not a {type(module).__name__}")
        self.module = module

    def __repr__(self) -> str:
        return f"trainable({type(self.module).__name__})"


#: The names a state is written with: ``{"model": trainable(model), "rng": per_rank(state)}``.
per_rank = PerRank
trainable = Trainable
