"""`ckptctl show`."""

from __future__ import annotations

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import human_age, human_bytes, plain, print_json, print_table
from ckptstore.clock import rfc3339
from ckptstore.ops.listing import show_checkpoint


@verb()
@click.argument("step", default="latest")
@click.option("--only", metavar="GLOB", help="Only tensors whose name matches.")
def command(settings: Settings, step: str, only: str | None) -> None:
    """Show one checkpoint: where it is, what made it, and every tensor in it.

    \b
    Examples:
      ckptctl -s /data/ckpt show latest
      ckptctl -s /data/ckpt show 1200 --only 'model.*' --json
    """
    with opened(settings) as place:
        details = show_checkpoint(place.tiers(place.choose_run(settings.run)), step, only=only)
    info = details.info
    if settings.as_json:
        print_json(
            checkpoint={**info.to_json(), "versions": details.versions, "num_nodes": details.num_nodes},
            tensors=[row.to_json() for row in details.tensors],
        )
        return
    facts = [
        ("run", info.run),
        ("step", f"{info.step}" + (f" (epoch {info.epoch})" if info.epoch is not None else "")),
        ("save", f"{info.save_id}, timeline {info.timeline}"),
        ("created", f"{rfc3339(info.created_at)} ({human_age(info.created_at)})"),
        ("size", f"{human_bytes(info.size_bytes)} in {len(details.tensors)} tensors"),
        ("written by", f"{info.world_size} ranks on {details.num_nodes} nodes, {details.versions}"),
        ("tiers", ", ".join(f"{tier} {state}" for tier, state in info.tiers.items())),
        ("metrics", ", ".join(f"{k}={v:.6g}" for k, v in info.metrics.items()) or "-"),
        ("tags", ", ".join(info.tags) or "-"),
    ]
    for name, value in facts:
        print(f"{name:<11}{plain(value)}")
    print()
    print_table(
        ["TENSOR", "DTYPE", "SHAPE", "SIZE", "RANKS"],
        [
            [
                row.name,
                row.dtype,
                "x".join(map(str, row.shape)) or "scalar",
                f"= {row.alias_of}" if row.alias_of else human_bytes(row.size_bytes),
                ",".join(map(str, row.ranks)) if len(row.ranks) <= 4 else f"{len(row.ranks)} ranks",
            ]
            for row in details.tensors
        ],
        right=frozenset({"SIZE"}),
    )
