"""`ckptctl gc`."""

from __future__ import annotations

from collections import Counter

import click

from ckptstore.cli.confirm import confirm
from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import note, plain, print_json
from ckptstore.cli.parts import parse_part
from ckptstore.cli.progress import count_bar
from ckptstore.ops.collect import Collection, collect_garbage
from ckptstore.ops.words import counted, human_bytes, human_seconds
from ckptstore.repo.gc import GRACE_SECONDS, INTENT_SECONDS, Collected, Doomed, Rules


@verb()
@click.option("--dry-run", is_flag=True, help="Say what would go, and write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--part", metavar="I/N", help="Only every N-th save's objects, for several collectors at once.")
@click.option(
    "--grace",
    "grace_seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=GRACE_SECONDS,
    show_default=True,
    help="From the announcement to the deletion.",
)
@click.option(
    "--dead-after",
    "intent_seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=7200),
    default=INTENT_SECONDS,
    show_default=True,
    help="Without a word from it for so long, a save that was begun is dead.",
)
@store_argument
def command(
    settings: Settings, dry_run: bool, yes: bool, part: str | None, grace_seconds: float, intent_seconds: float
) -> None:
    """Delete from buckets what no checkpoint needs, announced beforehand, a grace later.

    Run it once a day. What it finds today it announces; what it announced a grace ago, and nothing needs now, it
    deletes. Training, pushes and restores go on meanwhile; it may be killed and run again.

    \b
    Examples:
      ckptctl gc s3://bucket/prefix --dry-run
      ckptctl gc s3://bucket/prefix --yes
      ckptctl -s /data/ckpt --remote s3://bucket/prefix gc --part 0/4 --yes
    """
    rules = Rules(grace_seconds, intent_seconds)
    pieces = parse_part(part) or (0, 1)
    with opened(settings, with_remote=True) as place:
        run = place.choose_run(settings.run) if settings.run else None
        if dry_run or not yes:
            with count_bar("reading manifests", quiet=settings.quiet or settings.as_json) as progress:
                planned = collect_garbage(place, run, rules=rules, part=pieces, dry_run=True, progress=progress)
            if dry_run or not settings.as_json:
                _show(settings, planned, rules, is_done=False)
            if dry_run or not confirm("go on?", yes=yes):
                return
        with count_bar("collecting", quiet=settings.quiet or settings.as_json) as progress:
            done = collect_garbage(place, run, rules=rules, part=pieces, progress=progress)
    _show(settings, done, rules, is_done=True)


def _show(settings: Settings, found: Collection, rules: Rules, *, is_done: bool) -> None:
    if settings.as_json:
        print_json(**found.to_json(), is_done=is_done, grace_seconds=rules.grace_seconds)
        return
    deleted = "deleted" if is_done else "to be deleted"
    for name, runs in found.remotes.items():
        for run in runs:
            print(
                plain(
                    f"{name}, run {run.run}: {counted(run.kept_packs, 'pack')}, {human_bytes(run.kept_bytes)}, in use"
                )
            )
            _lines(deleted, run.deleted)
            _lines(f"announced now, to go in {human_seconds(rules.grace_seconds)}", run.condemned)
            _lines("announced earlier, waiting", run.waiting)
            _others(run)
    for leftover in found.local:
        print(plain(f"local: {deleted} {leftover}: left by a crash"))
    if not found.remotes and not found.local:
        note("nothing to collect")


#: Folder of a run -> what lies in it.
_KINDS = {"packs": "pack", "shards": "shard manifest", "summaries": "summary"}


def _lines(what: str, doomed: list[Doomed]) -> None:
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for one in doomed:
        kind = one.key.partition("/")[0], one.why
        counts[kind] += 1
        sizes[kind] += one.size_bytes
    for (folder, why), count in sorted(counts.items()):
        print(plain(f"  {what}: {counted(count, _KINDS[folder])}, {human_bytes(sizes[folder, why])}: {why}"))


def _others(run: Collected) -> None:
    if run.spared:
        print(plain(f"  announced earlier and needed again: {len(run.spared)}"))
    for save_id in run.dead_intents:
        print(plain(f"  save {save_id} was begun and never committed"))
