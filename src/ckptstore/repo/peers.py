"""The manifests of one save as the nodes of a running job tell each other of them.

A node holds the shard files its ranks wrote, and their manifests. A rank that needs to know the whole save on a job
without a remote must hear of the others' manifests. What is told is believed as far as digests go: a shard manifest
must be the one that the root pins, and the root must follow from its shard manifests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ckptstore.errors import CkptError, FormatError, IntegrityError, NotFoundError
from ckptstore.format.manifest import RootManifest, ShardManifest, ShardRef, strong_digest
from ckptstore.repo import directory, names
from ckptstore.repo.local import LocalTier
from ckptstore.repo.local_save import LocalSave

#: Who said it, in messages.
PEERS = "other nodes"


@dataclass(frozen=True)
class Told:
    """Manifests of one save.

    Attributes:
        roots: Root manifests, of nodes on which the save is complete.
        shards: Rank -> shard manifest, of ranks whose shard file is there too.
    """

    roots: tuple[bytes, ...] = ()
    shards: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def by(cls, tier: LocalTier, run: str, save: LocalSave) -> Told:
        """What this node can tell. What can't be read is left out: somebody else may have it."""
        roots: list[bytes] = []
        shards: dict[int, bytes] = {}
        try:
            if save.state == "complete":
                roots.append(tier.root_manifest(run, save).encode())
        except CkptError:
            pass
        for rank in directory.present_ranks(save.path):
            try:
                shard = tier.shard_manifest(save.path, rank)
            except CkptError:
                continue
            if directory.file_bytes(save.path / names.shard_file(rank)) == shard.file_bytes:
                shards[rank] = shard.encode()
        return cls(tuple(roots), shards)

    @classmethod
    def together(cls, nodes: Iterable[Told]) -> Told:
        """What all of them tell; of several that tell of one rank, any."""
        roots: dict[bytes, None] = {}
        shards: dict[int, bytes] = {}
        for node in nodes:
            roots |= dict.fromkeys(node.roots)
            shards |= node.shards
        return cls(tuple(roots), shards)

    def root_manifests(self, *, run: str, save_id: str) -> Iterator[RootManifest]:
        """The root manifests told that are well-formed and this save's."""
        for data in self.roots:
            try:
                root = directory.check_root(RootManifest.decode(data, what="root manifest"), what="root manifest")
                directory.check_summary(root.summary, run=run, step=None, save_id=save_id, what="root manifest")
            except FormatError:
                continue
            yield root

    def shard(self, ref: ShardRef) -> ShardManifest:
        """The shard manifest that ``ref`` pins.

        Raises:
            NotFoundError: nobody told of it.
            IntegrityError: what was told is another one.
        """
        data = self.shards.get(ref.rank)
        if data is None:
            raise NotFoundError(f"no other node of this job has the part of rank {ref.rank}", rank=ref.rank)
        if strong_digest(data) != ref.manifest_digest:
            raise IntegrityError(f"another node's manifest of rank {ref.rank} is not the committed one", rank=ref.rank)
        return ShardManifest.decode(data, what=f"shard manifest of rank {ref.rank}")
