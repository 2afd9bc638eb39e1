"""`ckptctl plot`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.errors import CheckpointExistsError, ConfigError, StorageError
from ckptstore.ops.words import human_bytes


@verb()
@click.option("-o", "--output", required=True, metavar="FILE.html", help="Where the report goes.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@store_argument
def command(settings: Settings, output: str, force: bool) -> None:
    """Write one HTML file with curves, checkpoints and sizes of a run; it opens anywhere, without a network.

    \b
    Examples:
      ckptctl plot /data/ckpt -o report.html
      ckptctl plot s3://bucket/prefix --run bert -o bert.html --force
    """
    from ckptstore.clock import SYSTEM_CLOCK
    from ckptstore.dashboard.report import render
    from ckptstore.dashboard.source import Source

    path = Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"a report is an HTML file, not {path.suffix or path.name!r}",
            hint="-o report.html; its PNG button saves a curve as a picture",
        )
    if path.exists() and not force:
        raise CheckpointExistsError(f"{path} is there already", hint="--force replaces it")
    with opened(settings, with_remote=True) as place:
        source = Source(place)
        try:
            run = place.choose_run(settings.run)
            shown = settings.store_or_environment or ""
            text = render(source, run, store=shown, now=SYSTEM_CLOCK.now())
        finally:
            source.close()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    size_bytes = len(text.encode())
    if settings.as_json:
        print_json(run=run, path=str(path.absolute()), size_bytes=size_bytes)
        return
    print(f"{plain(path)}: run {plain(run)}, {human_bytes(size_bytes)}")
