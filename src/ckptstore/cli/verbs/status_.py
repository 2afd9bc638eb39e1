"""`ckptctl status`."""

from __future__ import annotations

import sys

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import colour_words, plain, print_json, table
from ckptstore.cli.queues import queue_line
from ckptstore.errors import CheckpointNotFoundError, StorageError
from ckptstore.ops.cost import cost
from ckptstore.ops.open import Place
from ckptstore.ops.settings import Settings as Sources
from ckptstore.ops.status import Safety, Status, status
from ckptstore.ops.words import counted, human_bytes, human_seconds


@verb()
@click.option("--watch", "is_live", is_flag=True, help="Keep the screen up to date until Ctrl-C.")
@click.option("--interval", "interval_s", default=2.0, show_default=True, type=click.FloatRange(min=0.2))
@click.option("--cost", "with_cost", is_flag=True, help="Also bytes, objects and dollars; lists the whole run.")
@store_argument
def command(settings: Settings, is_live: bool, interval_s: float, with_cost: bool) -> None:
    """Say what would be lost if this process, machine or site died now.

    Prices for --cost come from the table [prices] in ckptstore.toml; `ckptctl config show` lists them.

    \b
    Examples:
      ckptctl status /data/ckpt --remote s3://bucket/prefix
      ckptctl status /data/ckpt --watch
      ckptctl -s s3://bucket/prefix status --cost --json
    """
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(_run(place, settings.run))
        if is_live and not settings.as_json and sys.stdout.isatty():
            from ckptstore.cli.watch import watch

            watch(lambda: _lines(status(tiers)), interval_s=interval_s)
        found = status(tiers)
        prices = Sources.read().prices() if with_cost else {}
        asked = [remote for remote in tiers.remotes if with_cost and remote.name not in found.unknown]
        costs = [cost(remote, prices) for remote in asked]
    if settings.as_json:
        print_json(
            run=found.run,
            safety=[row.to_json() for row in found.safety],
            waiting_uploads=found.waiting_uploads,
            waiting_bytes=found.waiting_bytes,
            agent=found.agent,
            ranks=[rank.to_json() for rank in found.ranks],
            **({"costs": [one.to_json() for one in costs], "prices": prices} if with_cost else {}),
        )
        return
    for line in _lines(found):
        print(colour_words(line, {"everything": "bad"}))
    for one in costs:
        month = _dollars(one.stored_dollars_per_month)
        print(
            plain(f"{one.remote}: {human_bytes(one.stored_bytes)} in {counted(one.objects, 'object')}, {month} a month")
        )
        print(f"  writing them took {counted(one.objects, 'request')} or more, {_dollars(one.put_dollars)}")
        gets = counted(one.restore_gets, "request")
        print(f"  reading it all from elsewhere takes {gets}, {_dollars(one.restore_dollars)}")


def _run(place: Place, run: str | None) -> str:
    """The run to look at: a remote that is out of reach, or refuses, doesn't keep the local tier from telling."""
    try:
        return place.choose_run(run)
    except StorageError as error:
        if isinstance(error, CheckpointNotFoundError) or place.local is None or not place.local.exists():
            raise
        try:
            return Place(place.local, {}).choose_run(run)
        except CheckpointNotFoundError:
            raise error from None  # that remote may have it


def _dollars(amount: float) -> str:
    return "less than 0.01 $" if 0 < amount < 0.01 else f"{amount:.2f} $"


def _lines(found: Status) -> list[str]:
    lines = [f"run {plain(found.run)}"]
    lines += table(["SURVIVES", "NEWEST STEP", "WOULD BE LOST"], [_row(row) for row in found.safety])
    if found.waiting_uploads:
        size = human_bytes(found.waiting_bytes)
        lines.append(f"uploads waiting: {counted(found.waiting_uploads, 'checkpoint')}, {size} of state")
    lines.append(f"agent: pid {found.agent['pid']}" if found.agent else "agent: not running")
    if not any(rank.is_attached for rank in found.ranks):
        lines.append("no trainer is attached here: the times are ages of checkpoints")
    said = (found.agent or {}).get("runs", {}).get(found.run, {})
    for rank in found.ranks:
        staging = ", ".join(f"step {step}" for step in rank.staging) or "nothing"
        state = "attached" if rank.is_attached else "its trainer is gone"
        lines.append(f"rank slot {rank.slot}: {state}, in memory only: {staging}")
    return lines + [queue_line(found.run, remote, queue) for remote, queue in said.get("remotes", {}).items()]


def _row(row: Safety) -> list[str]:
    if row.unknown is not None:
        return [row.survives, "unknown", row.unknown]
    if row.step is None or row.seconds_at_risk is None:
        return [row.survives, "-", "everything"]
    behind = f" and {row.steps_at_risk} steps" if row.steps_at_risk else ""
    return [row.survives, str(row.step), f"{human_seconds(row.seconds_at_risk)} of training{behind}"]
