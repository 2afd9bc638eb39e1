"""`ckptctl config`."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import urlsplit

import click

from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import print_json, print_table
from ckptstore.ops.open import is_url
from ckptstore.ops.settings import Setting
from ckptstore.ops.settings import Settings as Sources


@verb()
@click.argument("action", type=click.Choice(["show"]), default="show")
def command(settings: Settings, action: str) -> None:
    """Show every setting in force and where it comes from: argument, environment, ckptstore.toml or default.

    \b
    Examples:
      ckptctl config show
      CKPTSTORE_CONFIG__PACK_BYTES=134217728 ckptctl config show --json
    """
    del action
    store = settings.store
    arguments = {
        "local": store if store and not is_url(store) else None,
        "remote": settings.remote or (store if store and is_url(store) else None),
        "run": settings.run,
    }
    found = [_shown(setting) for setting in Sources.read().everything(arguments)]
    if settings.as_json:
        print_json(settings=[{"name": s.name, "value": s.value, "origin": s.origin} for s in found])
        return
    rows = [[s.name, "-" if s.value is None else str(s.value), s.origin] for s in found]
    print_table(["SETTING", "VALUE", "FROM"], rows, flexible=("VALUE", "FROM"))


def _shown(setting: Setting) -> Setting:
    """The address of a hook is often a secret: only its host is shown."""
    if setting.name != "config.hook_url" or not str(setting.value).startswith("http"):
        return setting
    address = urlsplit(str(setting.value))
    return replace(setting, value=f"{address.scheme}://{address.hostname}/...")
