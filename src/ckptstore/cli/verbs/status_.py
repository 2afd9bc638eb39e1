"""`ckptctl status`."""

from __future__ import annotations

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import human_bytes, human_seconds, plain, print_json, print_table
from ckptstore.ops.status import Safety, status


@verb()
@store_argument
def command(settings: Settings) -> None:
    """Say what would be lost if this process, machine or site died now.

    \b
    Examples:
      ckptctl status /data/ckpt --remote s3://bucket/prefix
      ckptctl -s /data/ckpt status --json
    """
    with opened(settings, with_remote=True) as place:
        found = status(place.tiers(place.choose_run(settings.run)))
    if settings.as_json:
        print_json(
            run=found.run,
            safety=[row.to_json() for row in found.safety],
            waiting_uploads=found.waiting_uploads,
            waiting_bytes=found.waiting_bytes,
            agent=found.agent,
        )
        return
    print(f"run {plain(found.run)}")
    print_table(["SURVIVES", "NEWEST STEP", "WOULD BE LOST"], [_row(row) for row in found.safety])
    if found.waiting_uploads:
        print(f"uploads waiting: {found.waiting_uploads} checkpoints, {human_bytes(found.waiting_bytes)} of state")
    print(f"agent: pid {found.agent['pid']}" if found.agent else "agent: not running")


def _row(row: Safety) -> list[str]:
    if row.step is None or row.seconds_at_risk is None:
        return [row.survives, "-", "everything"]
    behind = f" and {row.steps_at_risk} steps" if row.steps_at_risk else ""
    return [row.survives, str(row.step), f"{human_seconds(row.seconds_at_risk)} of training{behind}"]
