"""Who reads a chunk that a rank can't read itself, or that several ranks of a node want from a remote: pure decisions.

A rank reads what its node's disk holds. What only another node's disk holds is read by a rank there. What only remotes
hold is read by one of the ranks of a node that want it, so each remote byte comes to a node once; or, if the job asks
for that, by one rank of the job, so that of all replicas only the first costs the remote anything. What turns out to be
damaged on a node's disk counts as not held there. Whoever reads for others hands the bytes over the ranks' own process
group, in windows of bounded size that all ranks go through in step. Every rank computes the same from the same words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

#: (rank that saved, number of the piece in its shard, number of the chunk in that piece)
ChunkId = tuple[int, int, int]

#: No rank gives or takes more at once, unless one chunk is larger.
WINDOW_BYTES = 16 << 20
#: Neighbours in a shard are read by the same rank in runs of about this size, so that they share requests.
_RUN_BYTES = 8 << 20


@dataclass(frozen=True)
class Readers:
    """What each rank can read without another; the same on all ranks.

    Attributes:
        nodes: node of each rank.
        held: for each node, the ranks that saved whose shard files are on its disk.
        once_per_job: what only remotes hold is fetched once in the whole job instead of once per node.
    """

    nodes: tuple[int, ...]
    held: tuple[frozenset[int], ...]
    once_per_job: bool = False

    def is_here(self, rank: int, saved_by: int) -> bool:
        """Whether this rank's own node has the shard file of the rank that saved."""
        return saved_by in self.held[self.nodes[rank]]

    def holders(self, saved_by: int) -> tuple[int, ...]:
        """Ranks that can read that shard file from their node's disk; none if only remotes have it."""
        return tuple(rank for rank in range(len(self.nodes)) if self.is_here(rank, saved_by))

    def repairs(self, rank: int, delivery: Delivery) -> bool:
        """Whether this taker mends its node's disk with what came from another node: one rank of each node does."""
        node = self.nodes[rank]
        return node != self.nodes[delivery.sender] and rank == next(r for r in delivery.takers if self.nodes[r] == node)


@dataclass(frozen=True)
class Delivery:
    """One chunk, read by ``sender``, for all of ``takers``, which may include itself."""

    chunk: ChunkId
    size_bytes: int
    sender: int
    takers: tuple[int, ...]


def deliveries(
    wants: Sequence[Sequence[ChunkId]], readers: Readers, size_of: Callable[[ChunkId], int]
) -> list[Delivery]:
    """Which of the wanted chunks travel, and from whom to whom; each rank reads the others for itself.

    Args:
        wants: for each rank, the chunks it wants and that its own node's disk lacks, or holds damaged.
        readers: who can read what.
        size_of: bytes of a chunk.
    """
    takers: defaultdict[ChunkId, list[int]] = defaultdict(list)
    for rank, chunks in enumerate(wants):
        for chunk in chunks:
            takers[chunk].append(rank)
    found: list[Delivery] = []
    holders_of = cache(readers.holders)
    read_bytes: Counter[tuple[int, ...]] = Counter()

    def pick(candidates: tuple[int, ...], size: int) -> int:
        turn = read_bytes[candidates] // _RUN_BYTES
        read_bytes[candidates] += size
        return candidates[turn % len(candidates)]

    for chunk in sorted(takers):
        size, ranks = size_of(chunk), takers[chunk]
        lacking = {readers.nodes[rank] for rank in ranks}
        holders = tuple(rank for rank in holders_of(chunk[0]) if readers.nodes[rank] not in lacking)
        if holders:
            found.append(Delivery(chunk, size, pick(holders, size), tuple(ranks)))
            continue
        together: defaultdict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            together[0 if readers.once_per_job else readers.nodes[rank]].append(rank)
        groups = (tuple(group) for group in together.values() if len(group) > 1)
        found.extend(Delivery(chunk, size, pick(group, size), group) for group in groups)
    return found


def windows(found: Sequence[Delivery], max_bytes: int = WINDOW_BYTES) -> Iterator[list[Delivery]]:
    """The deliveries in rounds; in each no rank gives or takes more than ``max_bytes``. Each sender keeps its order."""
    queues: defaultdict[int, list[Delivery]] = defaultdict(list)
    for delivery in reversed(found):
        queues[delivery.sender].append(delivery)
    while queues:
        given: Counter[int] = Counter()
        taken: Counter[int] = Counter()
        window: list[Delivery] = []
        for sender in sorted(queues):
            queue = queues[sender]
            while queue:
                size, others = queue[-1].size_bytes, [taker for taker in queue[-1].takers if taker != sender]
                is_first = not given[sender] and not any(taken[taker] for taker in others)
                fits = given[sender] + size * len(others) <= max_bytes
                fits = fits and all(taken[taker] + size <= max_bytes for taker in others)
                if not (fits or is_first):
                    break
                window.append(queue.pop())
                given[sender] += max(1, size * len(others))
                taken.update(dict.fromkeys(others, size))
            if not queue:
                del queues[sender]
        yield window
