"""`ckptctl pull`."""

from __future__ import annotations

from ckptstore.cli.moving import move, step_or_all
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, print_json
from ckptstore.ops.transfer import pull_checkpoints
from ckptstore.ops.words import human_bytes


@verb()
@step_or_all("Every checkpoint of the current line, newest first.")
def command(settings: Settings, step: str | None, step_option: str | None, everything: bool) -> None:
    """Download what the local store lacks. Fetches only what is missing, and goes on where it was stopped.

    \b
    Examples:
      ckptctl pull /data/ckpt --remote s3://bucket/prefix
      ckptctl pull /data/ckpt 1200 --remote s3://bucket/prefix
      ckptctl pull /data/ckpt --remote s3://bucket/prefix --all
    """
    pulled = move(settings, pull_checkpoints, "downloading", step, step_option, everything)
    if settings.as_json:
        print_json(
            pulled=[
                {"checkpoint": one.info.to_json(), "path": str(one.path), "was_there": one.was_there} for one in pulled
            ]
        )
        return
    for one in pulled:
        if one.was_there:
            note(f"step {one.info.step} was there already")
        else:
            print(f"step {one.info.step}: {human_bytes(one.info.size_bytes)}, verified, in {one.path}")
