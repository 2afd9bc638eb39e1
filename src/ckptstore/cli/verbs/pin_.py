"""`ckptctl pin`."""

from __future__ import annotations

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_steps, verb
from ckptstore.cli.output import plain, print_json
from ckptstore.ops.lifecycle import pin


@verb()
@store_and_steps
def command(settings: Settings, steps: tuple[str, ...]) -> None:
    """Keep checkpoints whatever retention says, in every tier that has them.

    \b
    Examples:
      ckptctl pin /data/ckpt 1200
      ckptctl -s /data/ckpt --remote s3://bucket/prefix pin best latest
    """
    with opened(settings, with_remote=True) as place:
        actions = pin(place.tiers(place.choose_run(settings.run)), steps)
    if settings.as_json:
        print_json(actions=[action.to_json() for action in actions])
        return
    for action in actions:
        print(plain(f"step {action.step}: pinned on {action.tier} ({action.why})"))
