"""Calls that never become part of a compiled or captured graph. Torch is used only where it is loaded already."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ckptstore.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """``function``, left alone by ``torch.compile`` with all it calls, and refused while a CUDA graph is captured.

    Raises:
        ConfigError: from the result, during a capture or without torch; nothing has been done then.
    """
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        need_torch(name)
        _refuse_capture(name)
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not hasattr(dynamo, "disable"):  # nothing is compiled in this process so far
            return function(*args, **kwargs)
        return dynamo.disable(function, wrapping=False)(*args, **kwargs)

    # What the compiler looks for: it breaks its graph here instead of tracing into this.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_recursive = True  # type: ignore[attr-defined]
    return cast(F, call)


def need_torch(name: str) -> None:
    """Refuse a call that works on torch's objects where there is no torch; looking at checkpoints needs none.

    Raises:
        ConfigError: torch is not installed.
    """
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        raise ConfigError(f"{name}() needs PyTorch", hint="pip install 'ckptstore[torch]'")


def _refuse_capture(name: str) -> None:
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized() or not cuda.is_current_stream_capturing():
        return
    raise ConfigError(
        f"{name}() can't be part of a CUDA graph, which would replay old copies",
        hint=f"call {name}() outside of torch.cuda.graph(...)",
    )
