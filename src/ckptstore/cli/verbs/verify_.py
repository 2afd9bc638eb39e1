"""`ckptctl verify`."""

from __future__ import annotations

import click

from ckptstore.cli.opened import opened
from ckptstore.cli.options import Settings, store_and_step, verb
from ckptstore.cli.output import note, print_json, print_wrapped
from ckptstore.cli.parts import parse_part
from ckptstore.cli.progress import bytes_bar
from ckptstore.errors import ConfigError
from ckptstore.ops.findings import Depth
from ckptstore.ops.history import note_verified
from ckptstore.ops.repair import Repaired
from ckptstore.ops.repair import repair as put_right
from ckptstore.ops.verify import verify
from ckptstore.ops.words import counted, human_bytes

_MEANINGS = {"REPAIRED": "good", "DAMAGE": "bad", "UNSTEADY": "doubtful", "UNCHECKED": "doubtful"}


def parse_share(text: str | None) -> float | None:
    """``5%`` or ``0.05`` -> 0.05.

    Raises:
        ConfigError: it is anything else, or not between 0 and 100 %.
    """
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ConfigError(f"--sample must be a share like 5%, not {text!r}")
    return share


@verb()
@click.option("--all", "everything", is_flag=True, help="Every checkpoint, superseded ones too.")
@click.option("--read-data", is_flag=True, help="Read and decode every byte, not only manifests and sizes.")
@click.option("--sample", metavar="P%", help="Read this share of the chunks, chosen at random.")
@click.option("--part", metavar="I/N", help="Only every N-th rank's shard, for several machines at once.")
@click.option("--repair", is_flag=True, help="Take good bytes from another tier; set aside what has none.")
@click.option("--yes", is_flag=True, help="With --repair: delete what is beyond repair instead of setting it aside.")
@store_and_step
def command(
    settings: Settings,
    step: str | None,
    everything: bool,
    read_data: bool,
    sample: str | None,
    part: str | None,
    repair: bool,
    yes: bool,
) -> int:
    """Check a checkpoint in every tier that has it, and say what is damaged.

    What looks wrong is read a second time before it is called damaged. With --repair the code is 20 only for what could
    not be repaired. Such a copy is set aside, under a name that counts as no checkpoint; nothing of it is lost.

    \b
    Examples:
      ckptctl verify /data/ckpt
      ckptctl verify s3://bucket/prefix --all --sample 5%
      ckptctl verify /data --remote s3://bucket/prefix --read-data --repair
    """
    share, pieces = parse_share(sample), parse_part(part) or (0, 1)
    if yes and not repair:
        raise ConfigError("--yes is about what --repair can't repair", hint="add --repair")
    repaired = Repaired()
    with opened(settings, with_remote=True) as place:
        tiers = place.tiers(place.choose_run(settings.run))
        with bytes_bar("verifying", quiet=settings.quiet or settings.as_json) as progress:
            result = verify(
                tiers, step, everything=everything, read_data=read_data, sample=share, part=pieces, progress=progress
            )
        if repair and result.is_damaged:
            depth = Depth(read_data or share is not None, 1.0, pieces)
            repaired = put_right(tiers, result, depth, delete=yes)
        is_whole = read_data and pieces[1] == 1
        note_verified(
            tiers.local,
            tiers.run,
            result,
            "bytes" if is_whole else "sample" if read_data or share is not None else "structure",
        )
    if settings.as_json:
        print_json(
            checked=[{"step": s, "save_id": i, "tier": t} for s, i, t in result.checked],
            findings=[finding.to_json() for finding in result.findings],
            bytes_read=result.bytes_read,
            not_repaired=repaired.reasons,
            set_aside=[one.to_json() for one in repaired.aside],
        )
    else:
        for finding in result.findings:
            where = f" ({finding.key})" if finding.key else ""
            mark = "REPAIRED" if finding.is_repaired else finding.kind.upper()
            print_wrapped(f"{mark}  ", f"step {finding.step}  {finding.tier}: {finding.what}{where}", _MEANINGS[mark])
        for reason in repaired.reasons:
            note(f"not repaired: {reason}")
        for one in repaired.aside:
            what = "deleted" if one.where is None else f"set aside as {one.where}"
            print_wrapped("", f"step {one.step}, {one.tier}: {what}; it counts as no checkpoint any more")
        read = f"every byte ({human_bytes(result.bytes_read)})"
        if share is not None and not read_data:
            read = f"a sample ({human_bytes(result.bytes_read)})"
        looked = read if read_data or share is not None else "manifests and sizes"
        left = sum(not finding.is_repaired for finding in result.findings)
        right = len(result.findings) - left
        told = counted(left, "finding") + (f", {right} repaired" if right else "")
        note(f"{counted(len(result.checked), 'copy')} checked, {looked}: {told}")
    if result.is_damaged:
        return 20
    return 0 if result.is_clean else 3
