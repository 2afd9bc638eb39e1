"""`ckptctl dashboard`."""

from __future__ import annotations

import os

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import note


@verb()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8350, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--need-token", is_flag=True, help="Ask for a token on this machine too: others may have accounts here.")
@click.option(
    "--allow-host", multiple=True, metavar="NAME", help="A name the dashboard is reached by, as behind a proxy."
)
@click.option("--allow-actions", is_flag=True, help="Whoever has the token may pin, unpin and verify checkpoints.")
@click.option("--prefix", default="", metavar="/PATH", help="Path that a proxy leaves in front of ours.")
@store_argument
def command(
    settings: Settings,
    host: str,
    port: int,
    need_token: bool,
    allow_host: tuple[str, ...],
    allow_actions: bool,
    prefix: str,
) -> None:
    """Show in a browser whether training is safe, how it goes, and what is stored. Needs no trainer.

    Reads only, unless --allow-actions is given. That, and an address that others can reach, needs a token:
    CKPTSTORE_DASHBOARD_TOKEN, or one that is made up and printed.

    \b
    Examples:
      ckptctl dashboard /data/ckpt
      ckptctl dashboard /data/ckpt --remote s3://bucket/prefix --port 0
      ckptctl dashboard /data/ckpt --allow-actions
      ckptctl dashboard s3://bucket/prefix --host 0.0.0.0 --allow-host node7
    """
    from ckptstore.dashboard.guard import is_loopback, new_token
    from ckptstore.dashboard.serve import serve
    from ckptstore.ops.settings import Settings as Sources

    token = os.environ.get("CKPTSTORE_DASHBOARD_TOKEN") or None
    if token is None and (need_token or allow_actions or not is_loopback(host)):
        token = new_token()

    def announce(address: str) -> None:
        click.echo(address)
        note("open this address; Ctrl-C ends the dashboard")

    with opened(settings, with_remote=True) as place:
        shown = settings.store_or_environment or ""
        serve(
            place,
            store=shown,
            host=host,
            port=port,
            token=token,
            allowed_hosts=allow_host,
            prefix=prefix,
            allow_actions=allow_actions,
            prices=Sources.read().prices(),
            announce=announce,
        )
