"""`ckptctl verify`."""

from __future__ import annotations

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import human_bytes, note, plain, print_json
from ckptstore.ops.verify import verify


@verb()
@click.argument("step", required=False)
@click.option("--all", "everything", is_flag=True, help="Every checkpoint, superseded ones too.")
@click.option("--read-data", is_flag=True, help="Read and decode every byte, not only manifests and sizes.")
def command(settings: Settings, step: str | None, everything: bool, read_data: bool) -> int:
    """Check a checkpoint in every tier that has it, and say what is damaged.

    \b
    Examples:
      ckptctl -s /data/ckpt verify
      ckptctl -s s3://bucket/prefix verify --all --read-data
    """
    with opened(settings, with_remote=True) as place:
        result = verify(place.tiers(place.choose_run(settings.run)), step, everything=everything, read_data=read_data)
    if settings.as_json:
        print_json(
            checked=[{"step": s, "save_id": i, "tier": t} for s, i, t in result.checked],
            findings=[finding.to_json() for finding in result.findings],
            bytes_read=result.bytes_read,
        )
    else:
        for finding in result.findings:
            where = f" ({finding.key})" if finding.key else ""
            print(plain(f"{finding.kind.upper()}  step {finding.step}  {finding.tier}: {finding.what}{where}"))
        depth = f"every byte ({human_bytes(result.bytes_read)})" if read_data else "manifests and sizes"
        copies = len(result.checked)
        note(f"{copies} {'copy' if copies == 1 else 'copies'} checked, {depth}: {len(result.findings)} findings")
    if result.is_damaged:
        return 20
    return 3 if result.findings else 0
