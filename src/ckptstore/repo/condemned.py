"""What gc has announced it will delete: how collectors and committers keep out of each other's way without a lock.

One rule makes it safe: *every remote shard manifest that exists protects the packs it names*, and a live intent
protects the packs and shard manifests of its own save. Two orders, one on each side, leave no gap::

    committer   intent -> look which packs are there -> packs -> shard manifest -> read the condemned lists -> commit
    collector   publish a condemned list -> (a grace) -> list intents, read all shard manifests -> delete the rest

Either the collector's second look comes after the shard manifest, and spares its packs; or it comes before, and then
the list was published before the committer reads it, who sends again, under other names, what is on it. No clock
decides.

A list counts as published once there is *news* of it (:mod:`ckptstore.repo.remote_run`): committers that remember the
lists read them again when there is, and a list nobody was told of is not carried out.

A list stays after its objects are deleted, until no save is under way that was then: whoever still believes in a pack
that is gone must find it on the list.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from ckptstore.clock import new_nonce
from ckptstore.format.manifest import FORMAT_VERSION, RUN_PATTERN, Document

#: Keys on one list, so that its document stays a few MiB.
MAX_KEYS = 20_000

_NAME = re.compile(r"([0-9a-f]{12})\.json")
_SWEPT = re.compile(r"([0-9a-f]{12})\.swept\.json")


class CondemnedList(Document):
    """Keys, below the run's prefix, that nothing referred to when this was written. Never changed."""

    format: Literal["ckptstore"] = "ckptstore"
    version: int = Field(default=FORMAT_VERSION, ge=1)
    run: str = Field(pattern=f"^{RUN_PATTERN}$")
    keys: tuple[str, ...]
    commits: tuple[str, ...] = ()
    """Names of the commits that were there: the second look proves of each that it is gone, if it misses one."""


class SweptList(Document):
    """The list of this name was carried out; these saves were under way just after, and may not have noticed."""

    format: Literal["ckptstore"] = "ckptstore"
    version: int = Field(default=FORMAT_VERSION, ge=1)
    waiting_for: tuple[str, ...]


def new_list_id() -> str:
    """A name nobody else has."""
    return new_nonce()


def list_name(list_id: str) -> str:
    return f"{list_id}.json"


def parse_list_name(name: str) -> str | None:
    """The id of a condemned list, or None for foreign names."""
    match = _NAME.fullmatch(name)
    return match.group(1) if match else None


def swept_name(list_id: str) -> str:
    return f"{list_id}.swept.json"


def parse_swept_name(name: str) -> str | None:
    """The id of the list that was carried out, or None for foreign names."""
    match = _SWEPT.fullmatch(name)
    return match.group(1) if match else None
