"""Options every verb shares; they may stand before or after the verb, the later one wins."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import click
from click.shell_completion import CompletionItem

from ckptstore.logs import wants_json

F = TypeVar("F", bound=Callable[..., Any])
#: A function on its way to :func:`verb`; click's decorators keep no more of its type.
Wrapped: TypeAlias = Callable[..., Any]


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
    def is_store_known(self) -> bool:
        """Whether a STORE was given with an option, or a local one by environment or ckptstore.toml."""
        return bool(self.store or self.source("local"))

    @property
    def store_or_environment(self) -> str | None:
        """The STORE given, else ``local``, else ``remote``, of environment or ckptstore.toml."""
        return self.store or self.source("local") or self.source("remote")

    @property
    def remote_or_environment(self) -> str | None:
        """The remote given, else that of environment or ckptstore.toml."""
        return self.remote or self.source("remote")

    @property
    def run_or_environment(self) -> str | None:
        """The run given, else that of environment or ckptstore.toml."""
        return self.run or self.source("run")

    @staticmethod
    def source(name: str) -> str | None:
        """``local``, ``remote`` or ``run``, as environment or ckptstore.toml say."""
        if not os.environ.get("CKPTSTORE_FILE") and not os.path.exists("ckptstore.toml"):
            return os.environ.get(f"CKPTSTORE_{name.upper()}")  # what the reader below would say, without loading it
        from ckptstore.ops.settings import Settings as Sources

        return Sources.read().get(name)


def _folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell completes folders where a STORE may stand."""
    del context, parameter
    return [CompletionItem(incomplete, type="dir")]


_OPTIONS = [
    click.option("-s", "--store", metavar="STORE", help="Local root or remote URL.", shell_complete=_folders),
    click.option("--remote", metavar="URL", help="Remote that belongs to a local STORE.  [env: CKPTSTORE_REMOTE]"),
    click.option("--run", metavar="RUN", help="Run to look at, where the store holds several."),
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Only results and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is tried again, and why."),
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
        if settings.verbose:
            _talk()
        elif not settings.quiet and not wants_json() and sys.stderr.isatty():
            _say_once_that_it_waits()
        return function(**kwargs)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper


def _talk() -> None:
    """Let what the store logs appear on stderr: retries, repairs, what was passed over and why."""
    import logging

    logger = logging.getLogger("ckptstore")
    if not any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def _say_once_that_it_waits() -> None:
    """A person at a terminal shouldn't wonder why nothing happens while requests are tried again."""
    import logging

    from ckptstore.cli.output import note

    class Once(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.removeHandler(self)
            note(f"{record.getMessage().partition(';')[0]}; trying again (-v tells each try)")

    logger = logging.getLogger("ckptstore.blob.retry")
    logger.setLevel(logging.DEBUG)
    if not logger.handlers:  # the group and the verb both come here
        logger.addHandler(Once())


class Verb(click.Command):
    """A command whose usage line names the options that it can't do without."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        options, *arguments = super().collect_usage_pieces(ctx)
        needed = (one for one in self.get_params(ctx) if isinstance(one, click.Option) and one.required)
        records = (one.get_help_record(ctx) for one in needed)
        return [options, *(record[0].rpartition(", ")[2] for record in records if record is not None), *arguments]


def verb(**attributes: Any) -> Callable[[F], click.Command]:
    """Make a verb of a function that takes ``settings`` first."""

    def decorate(function: F) -> click.Command:
        @functools.wraps(function)
        def call(**kwargs: Any) -> Any:
            return function(click.get_current_context().ensure_object(Settings), **kwargs)

        options = {"cls": Verb, "context_settings": {"help_option_names": ["-h", "--help"]}, **attributes}
        made: click.Command = click.command(**options)(shared_options(call))
        return made

    return decorate


def store_argument(function: Wrapped) -> Wrapped:
    """An optional STORE argument that counts like ``--store``."""

    @functools.wraps(function)
    def wrapper(settings: Settings, store_arg: str | None, **kwargs: Any) -> Any:
        if store_arg:
            settings.store = store_arg
        return function(settings, **kwargs)

    return click.argument("store_arg", metavar="[STORE]", required=False, shell_complete=_folders)(wrapper)


#: What STEP may be; a folder of such a name is written ``./1200``.
_STEP = re.compile(r"[0-9]{1,18}|latest(~[0-9]+)?|best(:.+)?|[0-9a-f]{12}-[0-9]{1,9}")


#: The same, of a run that may be named before it.
STEP_OF_RUN = re.compile(rf"([A-Za-z0-9][A-Za-z0-9._-]{{0,127}}/)?({_STEP.pattern})")


def names_store(word: str, *, is_known: bool, step: re.Pattern[str] = _STEP) -> bool:
    """Whether a word names a store: what can't be a STEP does, a new one too.

    Args:
        is_known: the store is known already: then what doesn't look like one is a STEP mistyped.
        step: what a STEP may be.
    """
    return step.fullmatch(word) is None and (not is_known or "/" in word or os.path.isdir(word))


def store_and_steps(function: Wrapped) -> Wrapped:
    """An optional STORE, which counts like ``--store``, before one or more STEPs."""

    @functools.wraps(function)
    def wrapper(settings: Settings, words: tuple[str, ...], **kwargs: Any) -> Any:
        if words and names_store(words[0], is_known=settings.is_store_known):
            settings.store, words = words[0], words[1:]
        if not words:
            raise click.UsageError("Missing argument 'STEP...'.")
        return function(settings, steps=words, **kwargs)

    return click.argument("words", metavar="[STORE] STEP...", nargs=-1, shell_complete=_folders)(wrapper)


def store_and_step(function: Wrapped) -> Wrapped:
    """An optional STORE, which counts like ``--store``, and an optional STEP, in either order."""

    @functools.wraps(function)
    def wrapper(settings: Settings, words: tuple[str, ...], **kwargs: Any) -> Any:
        step: str | None = None
        store: str | None = None
        is_known = settings.is_store_known
        for word in words:
            is_store = names_store(word, is_known=is_known)
            if is_store and store is None:
                store = settings.store = word
            elif not is_store and step is None:
                step = word
            else:
                what, first = ("STORE", store) if is_store else ("STEP", step)
                raise click.UsageError(f"{what} is given twice: {first!r} and {word!r}.")
        return function(settings, step=step, **kwargs)

    return click.argument("words", metavar="[STORE] [STEP]", nargs=-1, shell_complete=_folders)(wrapper)
