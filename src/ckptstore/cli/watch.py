"""A screen that keeps itself up to date, until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable

from ckptstore.cli.output import plain
from ckptstore.errors import TransientError


def watch(lines: Callable[[], list[str]], *, interval_s: float) -> None:
    """Show what ``lines`` returns, again and again. A tier that is away for a while is said, and asked again."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), screen=False, auto_refresh=False) as live:
        while True:
            try:
                shown = lines()
            except TransientError as error:
                shown = [f"can't be reached now: {error.message}"]
            stamp = time.strftime("%H:%M:%S")
            live.update(Text("\n".join([*map(plain, shown), "", f"{stamp}, every {interval_s:g} s; Ctrl-C ends"])))
            live.refresh()
            time.sleep(interval_s)
