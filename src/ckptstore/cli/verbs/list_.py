"""`ckptctl list`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_argument, verb
from ckptstore.cli.output import note, plain, print_json, print_table
from ckptstore.ops.listing import list_checkpoints, why_superseded
from ckptstore.ops.open import Place
from ckptstore.ops.words import human_age, human_bytes
from ckptstore.types import CheckpointInfo

_MARKS = {"complete": "yes", "prepared": "part", "damaged": "DAMAGED", "absent": "-"}


@verb()
@click.option("--all", "everything", is_flag=True, help="Also superseded checkpoints.")
@click.option("--why", "wants_reasons", is_flag=True, help="Say which rule keeps each checkpoint, and what may go.")
@store_argument
def command(settings: Settings, everything: bool, wants_reasons: bool) -> None:
    """Show the checkpoints of a store, oldest first; without --run, of all its runs.

    A local store is listed alone, without a network; --remote URL adds what is there.

    \b
    Examples:
      ckptctl list /data/ckpt
      ckptctl list s3://bucket/prefix --run bert --json
      ckptctl list /data/ckpt --all
      ckptctl list /data/ckpt --why
    """
    with opened(settings) as place:
        run = place.choose_run(settings.run) if settings.run else None
        infos = list_checkpoints(place, run, include_superseded=everything)
        reasons = why_superseded(place, infos) if everything else {}
        kept = why_kept_by_run(place, infos) if wants_reasons else None
    if settings.as_json:
        print_json(
            checkpoints=[
                {
                    **info.to_json(),
                    "superseded_why": reasons.get(info.save_id),
                    **({} if kept is None else {"kept_why": kept.get(info.save_id, {})}),
                }
                for info in infos
            ]
        )
        return
    if not infos:
        note("no checkpoints yet")
        return
    tiers = list(dict.fromkeys(tier for info in infos for tier in info.tiers))
    several = len({info.run for info in infos}) > 1
    headers = (["RUN"] if several else []) + [
        "STEP",
        "EPOCH",
        "AGE",
        "SIZE",
        *(t.upper() for t in tiers),
        "METRICS",
        "",
    ]
    rows = [([info.run] if several else []) + _row(info, tiers) for info in infos]
    meanings = {"DAMAGED": "bad", "part": "doubtful", "superseded": "doubtful", "emergency": "doubtful"}
    print_table(
        headers,
        rows,
        right=frozenset({"STEP", "EPOCH", "SIZE"}),
        flexible=("METRICS", "", *(("RUN",) if several else ())),
        meanings=meanings,
    )
    for reason in dict.fromkeys(reasons.values()):
        ours = [info for info in infos if reasons.get(info.save_id) == reason]
        print(plain(f"superseded, because {reason}:"))
        for info in ours:
            print(plain(f"  step {info.step}, save {info.save_id}"))
    if kept is not None:
        _print_reasons(infos, kept)


def _print_reasons(infos: Sequence[CheckpointInfo], kept: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    if not kept:
        print("no manager has saved in this run on this machine: the rules are not known here")
        return
    rows = []
    for info in infos:
        by_tier = kept.get(info.save_id, {})
        if len(set(by_tier.values())) == 1:
            by_tier = {"every tier": next(iter(by_tier.values()))}
        rows += [[str(info.step), tier, ", ".join(reasons)] for tier, reasons in by_tier.items()]
    print()
    print_table(["STEP", "TIER", "KEPT BECAUSE"], rows, right=frozenset({"STEP"}), flexible=("KEPT BECAUSE",))


def why_kept_by_run(place: Place, infos: Sequence[CheckpointInfo]) -> dict[str, dict[str, tuple[str, ...]]]:
    from ckptstore.ops.keeping import why_kept

    return {key: value for run in {info.run for info in infos} for key, value in why_kept(place, run).items()}


def _row(info: CheckpointInfo, tiers: list[str]) -> list[str]:
    flags = [
        word
        for word, is_set in (
            ("pinned", info.pinned),
            ("emergency", info.emergency),
            ("superseded", info.superseded),
        )
        if is_set
    ]
    return [
        str(info.step),
        "-" if info.epoch is None else str(info.epoch),
        human_age(info.created_at),
        human_bytes(info.size_bytes),
        *(_MARKS.get(info.tiers.get(tier, "absent"), info.tiers.get(tier, "absent")) for tier in tiers),
        " ".join(f"{name}={value:.4g}" for name, value in info.metrics.items()),
        " ".join([*flags, *info.tags]),
    ]
