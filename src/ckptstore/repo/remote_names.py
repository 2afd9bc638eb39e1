"""Names in a remote.

Below the store's prefix::

    ckptstore.json                                               marker: what this is, and in which version
    names/<run>                                                  empty: this run exists
    runs/<run>/intents/<save_id>.json                            from before the first pack until after the commit
    runs/<run>/packs/<save_id>/<rank>-<xxh3_128 of the pack>.pack
    runs/<run>/shards/<save_id>/shard-<rank>.json                RemoteShard: where each chunk of one rank lies
    runs/<run>/summaries/<timeline>-<step>-<save_id>.json        what `list` shows
    runs/<run>/commits/<timeline>-<step>-<save_id>.json          root manifest: THE commit point
    runs/<run>/timelines/<number>.json
    runs/<run>/pins/<save_id>
    runs/<run>/condemned/<id>.json, <id>.swept.json              what gc will delete, and what it has deleted
    runs/<run>/aside/<save_id>.json                              root manifest of a damaged save that was set aside
    runs/<run>/news/<folder>.json                                changes when others must look into that folder again
    gc/lease-<part>-of-<parts>-<epoch>.json                      who collects now

Names that don't follow this grammar are somebody else's: never read, never deleted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptstore.format.manifest import SAVE_ID_PATTERN, Summary

MARKER = "ckptstore.json"

_COMMIT = re.compile(rf"([0-9]{{8,}})-([0-9]{{12,}})-({SAVE_ID_PATTERN})\.json")
_SHARD = re.compile(r"shard-([0-9]{5,6})\.json")


@dataclass(frozen=True, order=True)
class RemoteSave:
    """A committed save as its name in ``commits/`` tells it; sorts in the order of the run."""

    timeline: int
    step: int
    save_id: str

    @property
    def name(self) -> str:
        """``<timeline>-<step>-<save_id>.json``, fixed width, so that text sorts as the run does."""
        return f"{self.timeline:08d}-{self.step:012d}-{self.save_id}.json"

    @property
    def key(self) -> str:
        """Key of the root manifest below the run's prefix."""
        return f"commits/{self.name}"

    @property
    def summary_key(self) -> str:
        """Key of the summary below the run's prefix."""
        return f"summaries/{self.name}"

    @classmethod
    def parse(cls, name: str) -> RemoteSave | None:
        """The save of this name, or None for any name this store would not have written."""
        match = _COMMIT.fullmatch(name)
        if match is None:
            return None
        save = cls(int(match.group(1)), int(match.group(2)), match.group(3))
        return save if save.name == name else None

    @classmethod
    def of(cls, summary: Summary) -> RemoteSave:
        """The save this summary is about."""
        return cls(summary.timeline, summary.step, summary.save_id)


def shard_key(save_id: str, rank: int) -> str:
    """Key of a remote shard manifest below the run's prefix."""
    return f"shards/{save_id}/shard-{rank:05d}.json"


def parse_shard_key(key: str) -> tuple[str, int] | None:
    """save_id and rank of a remote shard manifest below the run's prefix, or None for foreign names."""
    folder, _, rest = key.partition("/")
    save_id, _, name = rest.partition("/")
    rank = parse_shard_name(name)
    if folder != "shards" or rank is None or re.fullmatch(SAVE_ID_PATTERN, save_id) is None:
        return None
    return save_id, rank


def intent_key(save_id: str) -> str:
    """Key of an intent below the run's prefix."""
    return f"intents/{save_id}.json"


def parse_intent_name(name: str) -> str | None:
    """The save whose intent has this name, or None for foreign names."""
    save_id = name.removesuffix(".json")
    return save_id if name.endswith(".json") and re.fullmatch(SAVE_ID_PATTERN, save_id) else None


def parse_shard_name(name: str) -> int | None:
    """The rank whose shard manifest has this name, or None for foreign names."""
    match = _SHARD.fullmatch(name)
    return int(match.group(1)) if match is not None and name == f"shard-{int(match.group(1)):05d}.json" else None
