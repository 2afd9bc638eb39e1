"""`ckptctl agent`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.agent.client import AgentClient
from ckptstore.agent.runtime import RuntimeDir
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, print_json
from ckptstore.errors import ConfigError, NotFoundError
from ckptstore.ops.open import is_url


@verb()
@click.argument("action", type=click.Choice(["logs", "stop"]))
@click.option("--timeout", "timeout_s", default=600.0, show_default=True, help="stop: seconds to drain first.")
def command(settings: Settings, action: str, timeout_s: float) -> None:
    """Look after the agent of a local tier: print its log, or let it drain and stop.

    \b
    Examples:
      ckptctl -s /data/ckpt agent logs
      ckptctl -s /data/ckpt agent stop --timeout 60
    """
    store = settings.store_or_environment
    if store is None or is_url(store):
        raise ConfigError("name a local store", hint="ckptctl -s /data/ckpt agent logs")
    root = Path(store).absolute()
    if action == "logs":
        path = RuntimeDir.of(root).log
        if not path.exists():
            raise NotFoundError(f"no agent has run for {root} as this user")
        print(path.read_text(errors="replace"), end="")
        return
    client = AgentClient.observe(root)
    if client is None:
        note("no agent is running")
        return
    client.stop(timeout_s=timeout_s)
    client.close()
    if settings.as_json:
        print_json(stopped=True)
    else:
        note("stopped")
