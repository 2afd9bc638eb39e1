"""What is kept with a checkpoint beside the state: numbers, and the versions that made it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

from ckptstore.errors import ConfigError, StateError
from ckptstore.repo.names import MAX_STEP
from ckptstore.types import json_number


def read_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | str]:
    """Metric values as floats (or "nan", "inf", "-inf"): read on the host, detached from any graph.

    Raises:
        StateError: a value that is not one number.
        ConfigError: not a mapping.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics must be a mapping of names to numbers, not {type(metrics).__name__}")
    result: dict[str, float | str] = {}
    for name, value in (metrics or {}).items():
        try:
            number = value.detach().item() if hasattr(value, "detach") else float(value)
            result[str(name)] = json_number(float(number))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise StateError(
                f"metric {name!r} is not one number but {type(value).__name__}", hint="pass a float", key=str(name)
            ) from None
    return result


def check_arguments(step: object, epoch: object, tags: object) -> None:
    """Refuse on every rank what a checkpoint can't be named by, or can't keep.

    Raises:
        ConfigError: naming the argument.
    """
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MAX_STEP:
        raise ConfigError(f"step must be an int of 0 to {MAX_STEP}, not {step!r}")
    if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, Integral)):
        raise ConfigError(f"epoch must be an int, not {epoch!r}")
    if isinstance(tags, str) or not isinstance(tags, Collection) or not all(isinstance(tag, str) for tag in tags):
        raise ConfigError(f"tags must be a sequence of str, not {tags!r}")


def versions() -> dict[str, str]:
    """Of this package and of torch."""
    import torch

    from ckptstore._version import __version__

    return {"ckptstore": __version__, "torch": torch.__version__}
