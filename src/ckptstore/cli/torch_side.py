"""The few things the command line needs torch for, behind one door that says so when it is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptstore.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType


def foreign(what: str) -> Any:
    """The module that knows stock PyTorch's files.

    Raises:
        ConfigError: torch is not installed.
    """
    module: ModuleType
    try:
        import ckptstore.dcp.foreign as module
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(f"{what} needs PyTorch", hint="pip install 'ckptstore[torch]'") from None
    return module
