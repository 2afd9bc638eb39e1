"""`ckptctl plot`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.errors import CheckpointExistsError, CkptError, ConfigError, StorageError
from ckptstore.ops.words import human_bytes

PICTURES = (".png", ".svg", ".pdf")


@verb()
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the report goes: .html, .png, .svg or .pdf.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@store_argument
def command(settings: Settings, output: str, force: bool) -> None:
    """Write a report of a run: curves, checkpoints, sizes, and what would be lost.

    An .html file can be zoomed and opens anywhere, without a network. A .png, .svg or .pdf is a picture, drawn here
    (pip install 'ckptstore[plot]').

    \b
    Examples:
      ckptctl plot /data/ckpt -o report.html
      ckptctl plot /data/ckpt --run bert -o bert.png
      ckptctl plot s3://bucket/prefix --run bert -o bert.html --force
    """
    from ckptstore.clock import SYSTEM_CLOCK
    from ckptstore.dashboard.source import Source

    path = Path(output)
    kind = path.suffix.lower()
    if kind not in (".html", ".htm", *PICTURES):
        raise ConfigError(
            f"a report is .html, {', '.join(PICTURES)}, not {path.suffix or path.name!r}", hint="-o report.html"
        )
    if path.exists() and not force:
        raise CheckpointExistsError(f"{path} is there already", hint="--force replaces it")
    if kind in PICTURES:
        from ckptstore.dashboard.picture import draw  # before anything is read: it may not be installed
    from ckptstore.dashboard.report import gather, render

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with opened(settings, with_remote=True) as place:
        source = Source(place)
        try:
            run = place.choose_run(settings.run)
            store, now = settings.store_or_environment or "", SYSTEM_CLOCK.now()
            if kind in PICTURES:
                draw(gather(source, run, store=store, now=now), temporary, kind[1:])
            else:
                temporary.write_text(render(source, run, store=store, now=now), encoding="utf-8")
            size_bytes = temporary.stat().st_size
            os.replace(temporary, path)
        except CkptError:
            raise
        except OSError as error:
            raise StorageError(f"can't write {path}: {error.strerror}") from None
        finally:
            source.close()
            with suppress(OSError):  # why nothing could be written has been said
                temporary.unlink()
    if settings.as_json:
        print_json(run=run, path=str(path.absolute()), size_bytes=size_bytes)
        return
    print(f"{plain(path)}: run {plain(run)}, {human_bytes(size_bytes)}")
