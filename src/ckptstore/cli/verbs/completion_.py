"""`ckptctl completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ckptstore.cli.options import Settings, verb


@verb()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(settings: Settings, shell: str) -> None:
    """Print the script that completes verbs and options in your shell.

    \b
    Examples:
      ckptctl completion bash > ~/.local/share/bash-completion/completions/ckptctl
      ckptctl completion zsh > "${fpath[1]}/_ckptctl"
      ckptctl completion fish > ~/.config/fish/completions/ckptctl.fish
    """
    del settings
    from ckptstore.cli.app import cli

    made = get_completion_class(shell)
    assert made is not None
    print(made(cli, {}, "ckptctl", "_CKPTCTL_COMPLETE").source())
