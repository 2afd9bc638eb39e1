"""`ckptctl push`."""

from __future__ import annotations

from ckptstore.cli.moving import move, step_or_all
from ckptstore.cli.options import Settings, verb
from ckptstore.cli.output import note, print_json
from ckptstore.ops.transfer import push_checkpoints
from ckptstore.ops.words import human_bytes


@verb()
@step_or_all("Every checkpoint the remote lacks, newest first.")
def command(settings: Settings, step: str | None, step_option: str | None, everything: bool) -> None:
    """Upload what the remote lacks. Sends only what is missing, and goes on where it was stopped.

    \b
    Examples:
      ckptctl push /data/ckpt --remote s3://bucket/prefix
      ckptctl push /data/ckpt 1200 --remote s3://bucket/prefix
      ckptctl push /data/ckpt --remote s3://bucket/prefix --all
    """
    pushed = move(settings, push_checkpoints, "uploading", step, step_option, everything)
    if settings.as_json:
        print_json(
            pushed=[
                {
                    "step": one.step,
                    "save_id": one.save_id,
                    "remote": one.remote,
                    "plain_bytes": one.result.plain_bytes,
                    "stored_bytes": one.result.stored_bytes,
                    "sent_bytes": one.result.sent_bytes,
                    "reused_bytes": one.result.reused_bytes,
                    "is_committed": one.result.committed is not None,
                }
                for one in pushed
            ]
        )
        return
    if not pushed:
        note("nothing to do: the remote has it")
    for one in pushed:
        sent, plain_bytes = human_bytes(one.result.sent_bytes), human_bytes(one.result.plain_bytes)
        print(f"step {one.step} -> {one.remote}: sent {sent} for {plain_bytes} of state")
