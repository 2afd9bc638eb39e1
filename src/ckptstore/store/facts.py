"""What is kept with a checkpoint beside the state: numbers, and the versions that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.errors import StateError
from ckptstore.types import json_number


def read_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float | str]:
    """Metric values as floats (or "nan", "inf", "-inf"): read on the host, detached from any graph.

    Raises:
        StateError: a value that is not one number.
    """
    result: dict[str, float | str] = {}
    for name, value in (metrics or {}).items():
        try:
            number = value.detach().item() if hasattr(value, "detach") else float(value)
            result[str(name)] = json_number(float(number))
        except (TypeError, ValueError, RuntimeError):
            raise StateError(
                f"metric {name!r} is not one number but {type(value).__name__}", hint="pass a float", key=str(name)
            ) from None
    return result


def versions() -> dict[str, str]:
    """Of this package and of torch."""
    import torch

    from ckptstore._version import __version__

    return {"ckptstore": __version__, "torch": torch.__version__}
