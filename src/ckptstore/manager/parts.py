"""What a manager is put together from; its saving, loading and ending share these."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptstore.manager.children import ChildWatch
from ckptstore.manager.emergency import OptimizerGuard
from ckptstore.manager.keeper import Keeper
from ckptstore.manager.progress import Progress
from ckptstore.manager.proof import Proof
from ckptstore.manager.safety import Safety
from ckptstore.manager.scalars import Scalars
from ckptstore.manager.tracking import Tracked
from ckptstore.manager.voice import Voice
from ckptstore.policy.retention import Retention
from ckptstore.store import CheckpointStore


@dataclass(frozen=True)
class Parts:
    """One job's parts.

    Attributes:
        owns_store: whether the store is the manager's to close.
        keeper: carries retention out; None for a store without a local tier.
        retention: of the local tier.
        proof: when a checkpoint was last seen to come back whole.
    """

    store: CheckpointStore
    owns_store: bool
    retention: Retention
    keeper: Keeper | None
    proof: Proof
    scalars: Scalars
    voice: Voice
    tracked: Tracked = field(default_factory=Tracked)
    progress: Progress = field(default_factory=Progress)
    safety: Safety = field(default_factory=Safety)
    children: ChildWatch = field(default_factory=ChildWatch)
    guard: OptimizerGuard = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guard", OptimizerGuard(self.children))

    @classmethod
    def of(
        cls,
        store: CheckpointStore,
        scalars: Scalars,
        voice: Voice,
        *,
        owns_store: bool,
        local: Retention,
        remote: Retention,
        remind_s: float,
    ) -> Parts:
        """The parts around this store, with these retentions of its tiers."""
        keeper = None
        if store.local is not None:
            keeper = Keeper(
                store.local, store.remotes, store.run, local=local, remote=remote, voice=voice, forget=store.forget
            )
        return cls(store, owns_store, local, keeper, Proof(store, limit_s=remind_s), scalars, voice)
