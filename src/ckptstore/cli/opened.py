"""Open what the command line named, and close it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptstore.cli.options import Settings
from ckptstore.errors import ConfigError
from ckptstore.ops.open import Place, is_url, open_place


@contextmanager
def opened(settings: Settings, *, with_remote: bool = False, must_exist: bool = True) -> Iterator[Place]:
    """The place behind STORE; a local one together with its remote where the verb wants both."""
    store = settings.store_or_environment
    if store is None:
        raise ConfigError("no store named", hint="give STORE, CKPTSTORE_LOCAL or CKPTSTORE_REMOTE, or a ckptstore.toml")
    settings.run = settings.run_or_environment
    remote = settings.remote
    if remote is None and with_remote and not is_url(store):
        remote = settings.remote_or_environment
    place = open_place(store, remote, must_exist=must_exist)
    try:
        yield place
    finally:
        place.close()
