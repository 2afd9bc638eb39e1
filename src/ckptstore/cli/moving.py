"""What `push` and `pull` share: which checkpoints to move, between a local store and its remotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_step
from ckptstore.cli.progress import transfer_bar
from ckptstore.errors import ConfigError
from ckptstore.ops.open import RunTiers
from ckptstore.repo.progress import ProgressCallback
from ckptstore.types import StepLike

M = TypeVar("M")


class Move(Protocol[M]):
    """`push_checkpoints` or `pull_checkpoints`."""

    def __call__(
        self, tiers: RunTiers, step: StepLike | None, *, everything: bool, progress: ProgressCallback | None = None
    ) -> list[M]: ...


def step_or_all(all_help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """STORE and STEP as arguments, STEP also as an option, or ``--all``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in (
            store_and_step,
            click.option("--all", "everything", is_flag=True, help=all_help),
            click.option("--step", "step_option", metavar="STEP", help="The same as STEP."),
        ):
            function = option(function)
        return function

    return decorate


def move(
    settings: Settings, work: Move[M], word: str, step: str | None, step_option: str | None, everything: bool
) -> list[M]:
    """Do it, with a bar that says ``word``; the newest checkpoint if neither a step nor all were asked for.

    Raises:
        ConfigError: a step and all of them were asked for, or two steps.
    """
    if len([one for one in (step, step_option, everything) if one]) > 1:
        raise ConfigError("name one step, or --all", hint="without both, the newest one")
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with transfer_bar(word, quiet=settings.quiet or settings.as_json) as progress:
            return work(tiers, step or step_option, everything=everything, progress=progress)
