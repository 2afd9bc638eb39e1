"""`ckptctl unpin`."""

from __future__ import annotations

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_steps, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.ops.lifecycle import unpin


@verb()
@store_and_steps
def command(settings: Settings, steps: tuple[str, ...]) -> None:
    """Let retention decide about checkpoints again.

    \b
    Examples:
      ckptctl unpin /data/ckpt 1200
      ckptctl -s /data/ckpt --remote s3://bucket/prefix unpin 1200 1400
    """
    with opened(settings, with_remote=True) as place:
        actions = unpin(place.tiers(place.choose_run(settings.run)), steps)
    if settings.as_json:
        print_json(actions=[action.to_json() for action in actions])
        return
    for action in actions:
        print(plain(f"step {action.step}: unpinned on {action.tier} ({action.why})"))
