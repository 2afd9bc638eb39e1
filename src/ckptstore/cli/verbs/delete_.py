"""`ckptctl delete`."""

from __future__ import annotations

import click

from ckptstore.cli.confirm import confirm
from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_steps, verb
from ckptstore.cli.output import note, plain, print_json, print_table
from ckptstore.ops.lifecycle import delete, plan_delete


@verb()
@click.option("--tier", metavar="NAME", help="Only there: 'local', or a remote's name as `list` shows it.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@store_and_steps
def command(settings: Settings, steps: tuple[str, ...], tier: str | None, dry_run: bool, yes: bool) -> None:
    """Remove checkpoints, manifest first, from every tier named; `ckptctl gc` frees the bucket's space later.

    Pinned checkpoints stay. Checkpoints that refer to the same chunks keep them.

    \b
    Examples:
      ckptctl -s /data/ckpt --remote s3://bucket/prefix delete 1200
      ckptctl delete /data/ckpt 1200 1400 --tier local --yes
    """
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        plan = plan_delete(tiers, steps, tier=tier)
        if not settings.as_json:
            rows = [[str(a.step), a.save_id, a.tier, a.why] for a in plan.actions]
            print_table(["STEP", "SAVE", "DELETE FROM", "WHY"], rows, right=frozenset({"STEP"}), flexible=("WHY",))
        for warning in plan.warnings:
            note(plain(f"warning: {warning}"))
        is_done = not dry_run and bool(plan.actions) and confirm("delete?", yes=yes)
        if is_done:
            delete(tiers, plan)
    if settings.as_json:
        actions = [action.to_json() for action in plan.actions]
        print_json(actions=actions, warnings=list(plan.warnings), is_done=is_done)
    elif is_done:
        note("deleted")
