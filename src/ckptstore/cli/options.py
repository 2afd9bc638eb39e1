"""Options every verb shares; they may stand before or after the verb, the later one wins."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the command line said, gathered over the group and the verb."""

    store: str | None = None
    remote: str | None = None
    run: str | None = None
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def store_or_environment(self) -> str | None:
        """The STORE given, else ``local``, else ``remote``, of environment or ckptstore.toml."""
        return self.store or self._source("local") or self._source("remote")

    @property
    def remote_or_environment(self) -> str | None:
        """The remote given, else that of environment or ckptstore.toml."""
        return self.remote or self._source("remote")

    @property
    def run_or_environment(self) -> str | None:
        """The run given, else that of environment or ckptstore.toml."""
        return self.run or self._source("run")

    @staticmethod
    def _source(name: str) -> str | None:
        if not os.environ.get("CKPTSTORE_FILE") and not os.path.exists("ckptstore.toml"):
            return os.environ.get(f"CKPTSTORE_{name.upper()}")  # what the reader below would say, without loading it
        from ckptstore.ops.settings import Settings as Sources

        return Sources.read().get(name)


_OPTIONS = [
    click.option("-s", "--store", metavar="STORE", help="Local root or remote URL."),
    click.option("--remote", metavar="URL", help="Remote that belongs to a local STORE.  [env: CKPTSTORE_REMOTE]"),
    click.option("--run", metavar="RUN", help="Run to look at, where the store holds several."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Only results and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Say more on stderr."),
]


def shared_options(function: F) -> Any:
    """Add the shared options and gather them into the context's :class:`Settings`."""

    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        settings = click.get_current_context().ensure_object(Settings)
        for name in ("store", "remote", "run", "as_json", "quiet", "verbose"):
            value = kwargs.pop(name)
            if value:
                setattr(settings, name, value)
        return function(**kwargs)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper


def verb(**attributes: Any) -> Callable[[F], click.Command]:
    """Make a verb of a function that takes ``settings`` first."""

    def decorate(function: F) -> click.Command:
        @functools.wraps(function)
        def call(**kwargs: Any) -> Any:
            return function(click.get_current_context().ensure_object(Settings), **kwargs)

        options = {"context_settings": {"help_option_names": ["-h", "--help"]}, **attributes}
        made: click.Command = click.command(**options)(shared_options(call))
        return made

    return decorate


def store_argument(function: F) -> F:
    """An optional STORE argument that counts like ``--store``."""

    @functools.wraps(function)
    def wrapper(settings: Settings, store_arg: str | None, **kwargs: Any) -> Any:
        if store_arg:
            settings.store = store_arg
        return function(settings, **kwargs)

    return click.argument("store_arg", metavar="[STORE]", required=False)(wrapper)  # type: ignore[return-value]
