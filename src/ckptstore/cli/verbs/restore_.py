"""`ckptctl restore`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import note, plain, print_json
from ckptstore.cli.parts import parse_part
from ckptstore.cli.progress import transfer_bar
from ckptstore.ops.transfer import restore
from ckptstore.ops.words import human_bytes


@verb()
@click.option("--to", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path), help="New local root.")
@click.option("--step", default="latest", show_default=True, help="Step, latest, latest~1, or a save id.")
@click.option("--part", metavar="I/N", help="Only every N-th rank's shard, for a cluster that restores together.")
@click.option("--only", metavar="GLOB", multiple=True, help="Only tensors whose name matches; may be repeated.")
@store_argument
def command(settings: Settings, folder: Path, step: str, part: str | None, only: tuple[str, ...]) -> None:
    """Rebuild a local tier from a remote, on a fresh node. Verifies every byte; goes on where it was stopped.

    What is there already is left as it is. A part (--only) that was stopped begins anew.

    \b
    Examples:
      ckptctl restore s3://bucket/prefix --to /data/ckpt
      ckptctl restore s3://bucket/prefix --to /data/ckpt --step latest~1
      ckptctl restore s3://bucket/prefix --to /data/weights --only 'model.*'
    """
    pieces = parse_part(part)
    with opened(settings) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with transfer_bar("restoring", quiet=settings.quiet or settings.as_json) as progress:
            restored = restore(tiers, step, folder, part=pieces, only=only, progress=progress)
    info = restored.info
    if settings.as_json:
        print_json(checkpoint=info.to_json(), path=str(restored.path), was_there=restored.was_there)
        return
    if restored.was_there:
        note("it was there already")
    print(f"step {info.step} of run {plain(info.run)}: {human_bytes(info.size_bytes)}, verified, in {restored.path}")
    if only:
        note(f"a part of the state: CheckpointStore({str(folder)!r}, run={info.run!r}).load(state) without a remote")
        return
    if info.tiers.get("local") == "prepared":
        note("the parts of other ranks are still to come: restore those here too, or load with the remote at hand")
    note(f"go on with CheckpointStore({str(folder)!r}, run={info.run!r}, ...).load(state)")
