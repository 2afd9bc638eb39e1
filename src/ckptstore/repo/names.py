"""The closed grammar of the local tier: every name we write, and the only names we read or delete.

::

    <root>/ckptstore.json                                marker
    <root>/<run>/timelines/<number:08d>.json             claims of timelines
    <root>/<run>/pins/<save_id>                          pins
    <root>/<run>/timings/<save_id>.json                  where a save's time went, for people
    <root>/<run>/journal/<name>.jsonl                    what happened to the run, for people
    <root>/<run>/.staging-<save_id>/                     being written
    <root>/<run>/.deleting-<save_id>/                    being removed
    <root>/<run>/step-<step:010d>-<save_id>/             prepared, or with manifest.json complete

A name is parsed by matching and then rendering it again, so each thing has exactly one name and look-alikes
(other digits, other padding, a trailing line break) are foreign.
"""

from __future__ import annotations

import re

from ckptstore.errors import ConfigError
from ckptstore.format.manifest import RUN_PATTERN, SAVE_ID_PATTERN

MARKER = "ckptstore.json"
MANIFEST = "manifest.json"
SUMMARY = "summary.json"
STOCK_METADATA = ".metadata"
TIMELINES = "timelines"
PINS = "pins"
TIMINGS = "timings"
JOURNAL = "journal"

_RUN = re.compile(RUN_PATTERN)
_SAVE_ID = re.compile(SAVE_ID_PATTERN)
#: The largest step that a directory's name has room for.
MAX_STEP = 10**18 - 1
_CHECKPOINT = re.compile(rf"step-([0-9]{{10,18}})-({SAVE_ID_PATTERN})")
_STAGING = re.compile(rf"\.staging-({SAVE_ID_PATTERN})")
_DELETING = re.compile(rf"\.deleting-({SAVE_ID_PATTERN})")
_TIMELINE = re.compile(r"([0-9]{8,12})\.json")
_SHARD_MANIFEST = re.compile(r"shard-([0-9]{5,6})\.json")
_SHARD_FILE = re.compile(r"__([0-9]{1,6})_0\.distcp")
_TEMPORARY = re.compile(r"\.(ckptstore\.json|manifest\.json|summary\.json|\.metadata)\.[0-9a-f]{12}\.tmp")


def is_run(name: str) -> bool:
    """Whether ``name`` is allowed as a run name."""
    return _RUN.fullmatch(name) is not None


def is_save_id(name: str) -> bool:
    """Whether ``name`` has the form ``<12 hex job nonce>-<counter>``."""
    return _SAVE_ID.fullmatch(name) is not None


def check_save_id(save_id: str) -> str:
    """The save_id itself, or ConfigError; nothing else may become a path."""
    if not is_save_id(save_id):
        raise ConfigError(f"{save_id!r} is not a save_id", hint="`ckptctl list` shows the save_ids of a run")
    return save_id


def split_save_id(save_id: str) -> tuple[str, int]:
    """The job's nonce and the save's number within the job."""
    nonce, _, counter = save_id.partition("-")
    return nonce, int(counter)


def checkpoint_dir(step: int, save_id: str) -> str:
    return f"step-{step:010d}-{save_id}"


def parse_checkpoint_dir(name: str) -> tuple[int, str] | None:
    """Step and save_id of a checkpoint directory's name; None for foreign names."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None or checkpoint_dir(int(match[1]), match[2]) != name:
        return None
    return int(match[1]), match[2]


def staging_dir(save_id: str) -> str:
    return f".staging-{save_id}"


def parse_staging_dir(name: str) -> str | None:
    """The save_id of a staging directory's name; None for foreign names."""
    match = _STAGING.fullmatch(name)
    return match[1] if match else None


def deleting_dir(save_id: str) -> str:
    return f".deleting-{save_id}"


def parse_deleting_dir(name: str) -> str | None:
    """The save_id of a name that a deletion left; None for foreign names."""
    match = _DELETING.fullmatch(name)
    return match[1] if match else None


def kept_dir(save_id: str, nonce: str) -> str:
    """Where foreign files are left when the checkpoint around them is deleted; outside the grammar on purpose."""
    return f"kept-{save_id}-{nonce}"


def timeline_file(number: int) -> str:
    return f"{number:08d}.json"


def parse_timeline_file(name: str) -> int | None:
    """The timeline number of a claim's name; None for foreign names."""
    match = _TIMELINE.fullmatch(name)
    if match is None or timeline_file(int(match[1])) != name:
        return None
    return int(match[1])


def shard_manifest_file(rank: int) -> str:
    return f"shard-{rank:05d}.json"


def parse_shard_manifest_file(name: str) -> int | None:
    """The rank of a shard manifest's name; None for foreign names."""
    match = _SHARD_MANIFEST.fullmatch(name)
    if match is None or shard_manifest_file(int(match[1])) != name:
        return None
    return int(match[1])


def shard_file(rank: int) -> str:
    return f"__{rank}_0.distcp"


def parse_shard_file(name: str) -> int | None:
    """The rank of a shard file's name; None for foreign names."""
    match = _SHARD_FILE.fullmatch(name)
    if match is None or shard_file(int(match[1])) != name:
        return None
    return int(match[1])


def is_checkpoint_file(name: str) -> bool:
    """Whether a checkpoint directory of ours may hold ``name`` under its final name."""
    return (
        name in (MANIFEST, SUMMARY, STOCK_METADATA)
        or parse_shard_file(name) is not None
        or parse_shard_manifest_file(name) is not None
    )


def temporary_file(name: str, nonce: str) -> str:
    """The name under which ``name`` is written before its rename."""
    return f".{name}.{nonce}.tmp"


def is_temporary_file(name: str) -> bool:
    """Whether a crash between writing and renaming one of our files can have left ``name``."""
    return _TEMPORARY.fullmatch(name) is not None
