"""`ckptctl pull`."""

from __future__ import annotations

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import note, print_json
from ckptstore.cli.progress import transfer_bar
from ckptstore.ops.transfer import pull_checkpoints
from ckptstore.ops.words import human_bytes


@verb()
@click.option("--step", help="This step only; default: the newest.")
@click.option("--all", "everything", is_flag=True, help="Every checkpoint of the current line, newest first.")
@store_argument
def command(settings: Settings, step: str | None, everything: bool) -> None:
    """Download what the local store lacks. Fetches only what is missing, and goes on where it was stopped.

    \b
    Examples:
      ckptctl pull /data/ckpt --remote s3://bucket/prefix
      ckptctl pull /data/ckpt --remote s3://bucket/prefix --all
    """
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with transfer_bar("downloading", quiet=settings.quiet or settings.as_json) as progress:
            pulled = pull_checkpoints(tiers, step, everything=everything, progress=progress)
    if settings.as_json:
        print_json(
            pulled=[
                {"checkpoint": one.info.to_json(), "path": str(one.path), "was_there": one.was_there} for one in pulled
            ]
        )
        return
    for one in pulled:
        if one.was_there:
            note(f"step {one.info.step} was there already")
        else:
            print(f"step {one.info.step}: {human_bytes(one.info.size_bytes)}, verified, in {one.path}")
