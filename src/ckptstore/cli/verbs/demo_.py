"""`ckptctl demo`."""

from __future__ import annotations

from ckptstore.cli.options import Settings, verb
from ckptstore.errors import ConfigError


@verb()
def command(settings: Settings) -> int:
    """Play the whole story on this machine: train, kill -9, wipe the disk, restore from S3, go on.

    \b
    Example:
      ckptctl demo
    """
    del settings
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise ConfigError("the demo needs PyTorch", hint="pip install 'ckptstore[demo]'")
    from ckptstore.demo.director import main

    return main()
