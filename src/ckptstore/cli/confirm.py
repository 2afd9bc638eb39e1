"""Asking before something is taken away."""

from __future__ import annotations

import sys

import click

from ckptstore.cli.output import note, plain
from ckptstore.errors import ConfigError


def confirm(question: str, *, yes: bool) -> bool:
    """Whether to go on: ``--yes``, or a "y" on a terminal.

    Raises:
        ConfigError: nobody is there to be asked.
    """
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError("nobody is at a terminal to be asked", hint="add --yes if you mean it; nothing was done")
    if click.confirm(plain(question), default=False, err=True):
        return True
    note("nothing was done")
    return False
