"""`ckptctl version`."""

from __future__ import annotations

import platform
from importlib import metadata

from ckptstore._version import __version__
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import print_json
from ckptstore.format.manifest import FORMAT_VERSION

_PACKAGES = ("torch", "boto3", "oss2", "zstandard", "pydantic", "numpy")


@verb()
def command(settings: Settings) -> None:
    """Print the versions of ckptstore, of its format, and of the packages it works with.

    \b
    Example:
      ckptctl version --json
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "-"
    versions = {"ckptstore": __version__, "format": FORMAT_VERSION, "python": platform.python_version(), **packages}
    if settings.as_json:
        print_json(versions=versions)
        return
    for name, version in versions.items():
        print(f"{name:<10} {version}")
