"""Where the time of each save went: notes beside the checkpoints, for people; nothing depends on them.

One small JSON file per save, not fsynced, written by the agent and read by ``ckptctl show --timing``::

    {"ranks": {"0": {"reserve": s, "plan": s, "copy": s, "hand_over": s}}, "write": s, "commit": s, "upload s3": s}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptstore.clock import new_nonce
from ckptstore.repo import durable, names
from ckptstore.repo.local import LocalTier

_MAX_BYTES = 1 << 20


def note(tier: LocalTier, run: str, save_id: str, values: Mapping[str, Any]) -> None:
    """Add to what is known of this save. Never fails: a note is not worth a save."""
    path = _path(tier, run, save_id)
    with suppress(OSError, ValueError):
        path.parent.mkdir(0o700, exist_ok=True)  # not durable.make_dir: nobody is to wait for the disk
        merged = {**read(tier, run, save_id), **values}
        temporary = path.with_name(f".{path.name}-{new_nonce()}")
        fd = durable.create_file(temporary)
        try:
            durable.write_all(fd, json.dumps(merged, sort_keys=True).encode())
        finally:
            os.close(fd)
        os.replace(temporary, path)


def read(tier: LocalTier, run: str, save_id: str) -> dict[str, Any]:
    """What is known; empty if nothing is."""
    try:
        value = json.loads(durable.read_bounded(_path(tier, run, save_id), _MAX_BYTES))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _path(tier: LocalTier, run: str, save_id: str) -> Path:
    return tier.run_path(run) / names.TIMINGS / f"{names.check_save_id(save_id)}.json"
