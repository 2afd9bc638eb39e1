"""`ckptctl show`."""

from __future__ import annotations

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_step, verb
from ckptstore.cli.output import note, plain, print_json, print_table
from ckptstore.clock import rfc3339
from ckptstore.ops.listing import Details, show_checkpoint
from ckptstore.ops.words import counted, human_age, human_bytes


@verb()
@click.option("--only", metavar="GLOB", help="Only tensors whose name matches.")
@click.option("--timing", is_flag=True, help="Where the time of this save went.")
@store_and_step
def command(settings: Settings, step: str | None, only: str | None, timing: bool) -> None:
    """Show one checkpoint: where it is, what made it, and every tensor in it.

    \b
    Examples:
      ckptctl show /data/ckpt
      ckptctl -s /data/ckpt show 1200 --only 'model.*' --json
      ckptctl -s /data/ckpt show latest --timing
    """
    with opened(settings) as place:
        details = show_checkpoint(place.tiers(place.choose_run(settings.run)), step or "latest", only=only)
    info = details.info
    if settings.as_json:
        print_json(
            checkpoint={**info.to_json(), "versions": details.versions, "num_nodes": details.num_nodes},
            tensors=[row.to_json() for row in details.tensors],
            timing=details.timing,
        )
        return
    if timing:
        _print_timing(details)
        return
    facts = [
        ("run", info.run),
        ("step", f"{info.step}" + (f" (epoch {info.epoch})" if info.epoch is not None else "")),
        ("save", f"{info.save_id}, timeline {info.timeline}"),
        ("created", f"{rfc3339(info.created_at)} ({human_age(info.created_at)})"),
        ("size", f"{human_bytes(info.size_bytes)} in {counted(len(details.tensors), 'tensor')}"),
        ("written by", _makers(details)),
        ("tiers", ", ".join(f"{tier} {state}" for tier, state in info.tiers.items())),
        ("uploaded", _uploaded(details)),
        ("metrics", ", ".join(f"{k}={v:.6g}" for k, v in info.metrics.items()) or "-"),
        ("tags", ", ".join(info.tags) or "-"),
    ]
    for name, value in facts:
        print(f"{name:<11}{plain(value)}")
    print()
    print_table(
        ["TENSOR", "DTYPE", "SHAPE", "SIZE", "STORED", "UPLOADED", "RANKS"],
        [
            [
                row.name,
                row.dtype,
                "x".join(map(str, row.shape)) or "scalar",
                f"= {row.alias_of}" if row.alias_of else human_bytes(row.size_bytes),
                (row.stored or "-") + (f" of {row.base_step}" if row.base_step is not None else ""),
                "-" if row.stored_bytes is None else human_bytes(row.stored_bytes),
                ",".join(map(str, row.ranks)) if len(row.ranks) <= 4 else f"{len(row.ranks)} ranks",
            ]
            for row in details.tensors
        ],
        right=frozenset({"SIZE", "UPLOADED"}),
        flexible=("TENSOR", "SHAPE"),
    )


def _makers(details: Details) -> str:
    ranks, nodes = counted(details.info.world_size, "rank"), counted(details.num_nodes, "node")
    versions = ", ".join(f"{name} {version}" for name, version in details.versions.items())
    return f"{ranks} on {nodes}" + (f"; {versions}" if versions else "")


def _uploaded(details: Details) -> str:
    info = details.info
    if info.stored_bytes is None:
        return "-"
    base = f", deltas against step {info.base_step}" if info.base_step is not None else ""
    return human_bytes(info.stored_bytes) + base


_STAGES = {
    "reserve": "wait for a free arena generation",
    "plan": "bind the state and agree with the other ranks",
    "copy": "copy into the arena",
    "hand_over": "hand the copy over to the agent",
    "slow_path": "some state had to be asked for",
    "queued": "wait until the save before was written",
    "write": "write and fsync the shard files",
    "fsync": "of this, fsync",
    "commit": "manifests, fsync, rename",
}
_NODE_STAGES = ("queued", "write", "fsync", "commit")


def _print_timing(details: Details) -> None:
    """A line per stage: what held training first, then what happened behind it."""
    timing = details.timing
    if not timing:
        note("no timing is known: it is kept in the local tier of the node that saved")
        return
    rows = [
        [
            f"rank {rank}",
            _STAGES.get(stage, stage),
            f"{seconds * 1e3:.1f} ms" if isinstance(seconds, float) else seconds,
        ]
        for rank, spans in sorted(timing.get("ranks", {}).items(), key=lambda item: int(item[0]))
        for stage, seconds in sorted(spans.items(), key=lambda item: [*_STAGES, item[0]].index(item[0]))
    ]
    rows += [["agent", _STAGES[s], f"{timing[s] * 1e3:.1f} ms"] for s in _NODE_STAGES if s in timing]
    for name, spans in timing.items():
        if name.startswith("remote "):
            if "lag" in spans:  # not so of a push by hand
                rows.append([name, "from the call to the commit there", f"{spans['lag']:.2f} s"])
            rows.append([name, "sent", human_bytes(spans["sent_bytes"])])
    print_table(["WHO", "STAGE", "TIME"], rows, right=frozenset({"TIME"}))
