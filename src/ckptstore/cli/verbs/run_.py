"""`ckptctl run`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, plain
from ckptstore.errors import ConfigError
from ckptstore.ops.open import is_url


@verb(context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False})
@click.option("--drain", "drain_s", metavar="S", default=600.0, show_default=True, help="Longest wait for uploads.")
@click.argument("argv", metavar="-- CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(settings: Settings, drain_s: float, argv: tuple[str, ...]) -> int:
    """Run a training command, pass signals on to it, and wait for its uploads before the container goes away.

    Exits with the command's own code (128 + n after signal n); 75 when it went well but uploads are left.

    \b
    Examples:
      ckptctl -s /data/ckpt run -- torchrun --nproc-per-node 8 train.py
      ckptctl -s /data/ckpt run --drain 120 -- python train.py
    """
    from ckptstore.ops.supervise import Supervisor

    store = settings.store_or_environment
    if store is None or is_url(store):
        raise ConfigError("name the local store whose uploads to wait for", hint="ckptctl -s /data/ckpt run -- CMD")
    say = (lambda text: None) if settings.quiet else (lambda text: note(plain(f"ckptctl: {text}")))
    supervisor = Supervisor(argv, say)
    code = supervisor.run()
    try:
        if supervisor.wait_for_uploads(Path(store).absolute(), drain_s):
            return code
    finally:
        supervisor.restore()
    note("uploads are left: `ckptctl push --all` sends them")
    return code or 75
