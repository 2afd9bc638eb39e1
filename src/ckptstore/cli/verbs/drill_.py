"""`ckptctl drill`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.cli.progress import transfer_bar
from ckptstore.ops.drill import drill
from ckptstore.ops.words import human_bytes, human_seconds


@verb()
@click.option("--step", default="latest", show_default=True, help="Step, latest, latest~1, or a save id.")
@click.option(
    "--scratch", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where to try it."
)
@store_argument
def command(settings: Settings, step: str, scratch: Path | None) -> None:
    """Restore into a scratch folder as a fresh node would, verify every byte, and remove it again.

    Prints the measured recovery time, and how much work would be lost: the age of the checkpoint.

    \b
    Examples:
      ckptctl drill s3://bucket/prefix
      ckptctl drill s3://bucket/prefix --scratch /data
    """
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with transfer_bar("restoring", quiet=settings.quiet or settings.as_json) as progress:
            done = drill(tiers, step, scratch=scratch, progress=progress)
    if settings.as_json:
        print_json(**done.to_json())
        return
    info, rate = done.info, human_bytes(int(done.rate_bytes_per_s))
    print(f"step {info.step} of run {plain(info.run)}: {human_bytes(info.size_bytes)}, verified")
    print(f"recovery time  {done.restore_seconds:.1f} s ({rate}/s; {human_bytes(done.received_bytes)} received)")
    print(f"work at risk   {human_seconds(done.age_seconds)} (the age of this checkpoint)")
