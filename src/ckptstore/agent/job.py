"""One save on its way through the agent, and who hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from ckptstore.agent.arena import Generation
from ckptstore.agent.protocol import Event, SealRequest
from ckptstore.errors import ConfigError
from ckptstore.format.stock import Layout, PieceSpec
from ckptstore.repo import names


@dataclass(frozen=True)
class Part:
    """A sealed generation and what it holds."""

    request: SealRequest
    generation: Generation
    layout: Layout
    pieces: tuple[PieceSpec, ...]


class Stage(str, Enum):
    """Of a save that is not durable yet."""

    GATHERING = "gathering"
    WRITING = "writing"


@dataclass(eq=False)
class SaveJob:
    """One save between its first seal and its commit."""

    save_id: str
    step: int
    shape: tuple[object, ...]
    local_ranks: tuple[int, ...]
    begun: float
    stage: Stage = Stage.GATHERING
    parts: dict[int, Part] = field(default_factory=dict)
    abandoned: str | None = None

    @property
    def missing(self) -> list[int]:
        return [rank for rank in self.local_ranks if rank not in self.parts]


class Watcher(Protocol):
    """Hears of everything that happens to saves, for metrics. Must not block or raise."""

    def event(self, run: str, event: Event) -> None:
        """Trainers are told this."""

    def written(self, run: str, ranks: Mapping[str, Mapping[str, float]], timing: Mapping[str, float]) -> None:
        """A part is on disk: seconds by rank and stage, and by stage of this node."""

    def retried(self, op: str, reason: str) -> None:
        """A request to a remote is about to be tried again."""


def check_seal(run: str, request: SealRequest) -> None:
    """ConfigError where a seal contradicts itself, or is of another run."""
    names.check_save_id(request.save_id)
    ranks = request.local_ranks
    if request.rank not in ranks or len(set(ranks)) != len(ranks) or max(ranks) >= request.world_size:
        raise ConfigError(f"rank {request.rank} is not one of the local ranks {list(ranks)}")
    if request.num_nodes == 1 and len(ranks) != request.world_size:
        raise ConfigError(f"on one node all {request.world_size} ranks are local, not {list(ranks)}")
    summary = request.summary
    if (summary is None) != (request.rank != 0):
        raise ConfigError("rank 0, and no other, seals with the summary")
    if summary is not None and (summary.run, summary.save_id, summary.step, summary.world_size) != (
        run, request.save_id, request.step, request.world_size,
    ):  # fmt: skip
        raise ConfigError(f"the summary sealed with save {request.save_id} is another save's")
