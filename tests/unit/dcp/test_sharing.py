"""Who reads for whom: every wanted chunk reaches everybody, in bounded windows, each remote byte once per node."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ckptstore.dcp.sharing import ChunkId, Readers, deliveries, windows


def size_of(chunk: ChunkId) -> int:
    return 10 * (chunk[2] + 1)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[list[ChunkId]], Readers]:
    """Ranks on nodes that hold some shards, and what each rank wants that its node lacks or holds damaged."""
    world_size = draw(st.integers(1, 6))
    numbers = [draw(st.integers(0, 3)) for _ in range(world_size)]
    nodes = tuple(list(dict.fromkeys(numbers)).index(number) for number in numbers)
    held = tuple(draw(st.frozensets(st.integers(0, 3))) for _ in range(max(nodes) + 1))
    readers = Readers(nodes, held, draw(st.booleans()))
    chunk = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3))
    is_damaged = draw(st.booleans())
    wants = [
        sorted(c for c in draw(st.frozensets(chunk)) if is_damaged or not readers.is_here(rank, c[0]))
        for rank in range(world_size)
    ]
    return wants, readers


def whole(wants: list[list[ChunkId]], readers: Readers, chunk: ChunkId) -> set[int]:
    """Ranks whose node's disk has it, and of whose node nobody says that it is damaged there."""
    lacking = {readers.nodes[rank] for rank, chunks in enumerate(wants) if chunk in chunks}
    return {rank for rank in readers.holders(chunk[0]) if readers.nodes[rank] not in lacking}


@given(jobs())
def test_every_chunk_comes_from_a_rank_that_can_read_it_and_only_to_those_that_want_it(
    job: tuple[list[list[ChunkId]], Readers],
) -> None:
    wants, readers = job
    found = deliveries(wants, readers, size_of)
    received = Counter((taker, d.chunk) for d in found for taker in d.takers)
    assert set(received.values()) <= {1}
    for d in found:
        holders = whole(wants, readers, d.chunk)
        assert all(d.chunk in wants[taker] for taker in d.takers)
        if holders:
            assert d.sender in holders, "a node's disk comes before a remote"
        else:
            assert d.sender in d.takers
            one_node = len({readers.nodes[taker] for taker in d.takers}) == 1
            assert one_node or readers.once_per_job, "what a remote gives stays on the node"
        menders = [readers.nodes[taker] for taker in d.takers if readers.repairs(taker, d)]
        assert sorted(menders) == sorted({readers.nodes[t] for t in d.takers} - {readers.nodes[d.sender]})
    for rank, chunks in enumerate(wants):
        for chunk in chunks:
            neighbours = [
                r
                for r, other in enumerate(wants)
                if chunk in other and (readers.once_per_job or readers.nodes[r] == readers.nodes[rank])
            ]
            is_alone = not whole(wants, readers, chunk) and len(neighbours) == 1
            assert received[rank, chunk] == (not is_alone)


@given(jobs(), st.integers(1, 200))
def test_windows_hold_everything_once_and_no_rank_gets_more_than_it_can_hold(
    job: tuple[list[list[ChunkId]], Readers], max_bytes: int
) -> None:
    wants, readers = job
    found = deliveries(wants, readers, size_of)
    rounds = list(windows(found, max_bytes))
    assert all(rounds)
    assert Counter(d for window in rounds for d in window) == Counter(found)
    for window in rounds:
        for rank in range(len(wants)):
            given_ = [d.size_bytes for d in window for taker in d.takers if d.sender == rank != taker]
            taken = [d.size_bytes for d in window if rank in d.takers and d.sender != rank]
            assert sum(taken) <= max_bytes or len(taken) == 1
            assert sum(given_) <= max_bytes or len([d for d in window if d.sender == rank]) == 1
    for sender in range(len(wants)):
        order = [d.chunk for window in rounds for d in window if d.sender == sender]
        assert order == [d.chunk for d in found if d.sender == sender]


def test_neighbouring_chunks_are_read_by_one_rank_and_the_work_is_spread() -> None:
    wanted = [(0, 0, number) for number in range(64)]
    found = deliveries([wanted] * 4, Readers((0, 0, 0, 0), (frozenset(),)), lambda _: 1 << 20)
    senders = [d.sender for d in found]
    assert Counter(senders) == {0: 16, 1: 16, 2: 16, 3: 16}
    assert senders[:16] == [0] * 8 + [1] * 8
