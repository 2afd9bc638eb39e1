"""A store's remotes by name, and the levels it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptstore.errors import ConfigError
from ckptstore.format.manifest import check_run_name

RemoteArgument = str | Sequence[str] | Mapping[str, str] | None


def name_remotes(remote: RemoteArgument) -> dict[str, str]:
    """Remote's name -> URL; an unnamed remote is named by its scheme, a second of the same scheme gets ``-2``.

    Raises:
        ConfigError: an unknown scheme or a malformed URL.
    """
    from ckptstore.blob import open_blob_store

    if remote is None:
        return {}
    if isinstance(remote, Mapping):
        named = {str(name): str(url) for name, url in remote.items()}
    else:
        named = {}
        for url in [remote] if isinstance(remote, str) else remote:
            scheme = str(url).partition("://")[0]
            count = 1 + sum(name == scheme or name.startswith(f"{scheme}-") for name in named)
            named[scheme if count == 1 else f"{scheme}-{count}"] = str(url)
    for name, url in named.items():
        open_blob_store(url)  # free and local; refuses what can't be a URL
        check_run_name(name)
        if name == "local":
            raise ConfigError("a remote can't be named 'local'", hint="that is the local tier's name")
    return named


def check_level(level: str, remotes: Mapping[str, str]) -> None:
    """ConfigError for a level that there isn't, or that a store with these remotes can't reach."""
    if level not in ("staged", "local", "remote"):
        raise ConfigError(f"no such level: {level!r}", hint="use 'staged', 'local' or 'remote'")
    if level == "remote" and not remotes:
        raise ConfigError("level 'remote' can't be reached: this store has no remote", hint="pass remote=")
