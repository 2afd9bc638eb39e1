"""`ckptctl export`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_step, verb
from ckptstore.cli.output import note, print_json
from ckptstore.cli.progress import transfer_bar
from ckptstore.cli.torch_side import foreign
from ckptstore.errors import ConfigError
from ckptstore.ops.export import SHARD_BYTES, Exported, Selection, export_dcp, export_safetensors, export_with
from ckptstore.ops.open import RunTiers
from ckptstore.ops.words import counted, human_bytes
from ckptstore.repo.progress import ProgressCallback


def parse_renames(pairs: tuple[str, ...]) -> dict[str, str]:
    """``A=B`` each -> {A: B}."""
    renames = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (equals and old):
            raise ConfigError(f"--rename must be OLD=NEW, not {pair!r}", hint="for example --rename model.=backbone.")
        renames[old] = new
    return renames


@verb()
@click.option("--format", "kind", type=click.Choice(["safetensors", "dcp", "torch"]), required=True)
@click.option("-o", "--output", metavar="PATH", required=True, type=click.Path(path_type=Path), help="Must not exist.")
@click.option("--only", metavar="GLOB", multiple=True, help="Only tensors whose stored name matches; may be repeated.")
@click.option("--strip-prefix", metavar="P", default="", help="Take this off the names that begin with it.")
@click.option("--rename", metavar="OLD=NEW", multiple=True, help="Then replace a prefix; may be repeated.")
@click.option("--dtype", metavar="D", help="Convert floating-point tensors: bfloat16, float16, float32, float64.")
@click.option("--shard-bytes", default=SHARD_BYTES, show_default=True, help="Size of one safetensors file at most.")
@store_and_step
def command(
    settings: Settings,
    step: str | None,
    kind: str,
    output: Path,
    only: tuple[str, ...],
    strip_prefix: str,
    rename: tuple[str, ...],
    dtype: str | None,
    shard_bytes: int,
) -> None:
    """Write a checkpoint as files that other tools read: safetensors, a DCP directory, or one torch.save file.

    Every byte is verified on the way. The output appears when it is whole. With safetensors, PATH is one file if it
    ends in .safetensors, else a directory of files with an index. Only --format torch needs PyTorch installed.

    \b
    Examples:
      ckptctl export /data best --format safetensors -o hf --only 'model.*'
      ckptctl export s3://bucket/prefix 1200 --format dcp -o /data/stock
      ckptctl -s /data export latest --format torch -o state.pt --dtype bfloat16
    """
    step = step or "latest"
    selection = Selection(tuple(only), strip_prefix, parse_renames(rename), dtype)
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with transfer_bar("exporting", quiet=settings.quiet or settings.as_json) as progress:
            if kind == "safetensors":
                done = export_safetensors(tiers, step, output, selection, shard_bytes=shard_bytes, progress=progress)
            elif kind == "dcp":
                done = export_dcp(tiers, step, output, selection, progress=progress)
            else:
                done = _export_torch(tiers, step, output, selection, progress)
    summary = done.record.summary
    if settings.as_json:
        print_json(
            step=summary.step,
            save_id=summary.save_id,
            path=str(done.path),
            files=[str(file) for file in done.files],
            num_tensors=done.num_tensors,
            size_bytes=done.size_bytes,
        )
        return
    print(f"step {summary.step}: {counted(done.num_tensors, 'tensor')}, {human_bytes(done.size_bytes)}, in {done.path}")
    if selection.is_everything and done.leaves_out:
        note("values that each rank keeps for itself are not in it; `ckptctl restore` brings those")


def _export_torch(
    tiers: RunTiers, step: str, output: Path, selection: Selection, progress: ProgressCallback | None
) -> Exported:
    return export_with(tiers, step, output, selection, foreign("--format torch").save_torch_file, progress=progress)
