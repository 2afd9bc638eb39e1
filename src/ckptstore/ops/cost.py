"""What a run costs in a bucket, by a table of prices (``[prices]`` in ckptstore.toml): bytes, objects, dollars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptstore.repo.remote import RemoteTier

GIB = float(1 << 30)
#: A restore asks for ranges of about this size.
RANGE_BYTES = 16 << 20


@dataclass(frozen=True)
class Cost:
    """One run on one remote.

    Attributes:
        stored_bytes: everything below the run, what gc has still to delete included.
        objects: how many; each was at least one put.
        stored_dollars_per_month: for keeping them.
        put_dollars: what writing them has cost, once.
        restore_dollars: for reading everything once from outside the cloud.
        restore_gets: requests that this takes.
    """

    remote: str
    stored_bytes: int
    objects: int
    stored_dollars_per_month: float
    put_dollars: float
    restore_dollars: float
    restore_gets: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "remote": self.remote,
            "stored_bytes": self.stored_bytes,
            "objects": self.objects,
            "stored_dollars_per_month": round(self.stored_dollars_per_month, 6),
            "put_dollars": round(self.put_dollars, 6),
            "restore_dollars": round(self.restore_dollars, 6),
            "restore_gets": self.restore_gets,
        }


def cost(remote: RemoteTier, prices: Mapping[str, float]) -> Cost:
    """Add up; one LIST of the run, page by page.

    Args:
        remote: The run on one remote.
        prices: ``stored_gib_month``, ``put_thousand``, ``get_thousand``, ``egress_gib``, in dollars.
    """
    sizes = [info.size_bytes for info in remote.blob.list(f"runs/{remote.run}/")]
    stored = sum(sizes)
    gets = sum(max(1, -(-size // RANGE_BYTES)) for size in sizes)
    return Cost(
        remote=remote.name,
        stored_bytes=stored,
        objects=len(sizes),
        stored_dollars_per_month=stored / GIB * prices["stored_gib_month"],
        put_dollars=len(sizes) / 1000 * prices["put_thousand"],
        restore_dollars=gets / 1000 * prices["get_thousand"] + stored / GIB * prices["egress_gib"],
        restore_gets=gets,
    )
