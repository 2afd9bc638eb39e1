"""gc: what goes, what stays, what it refuses, and each of its guards in the one moment that needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from ckptstore.blob.base import ObjectInfo
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.clock import ManualClock
from ckptstore.errors import IntegrityError, LockedError, TransientError
from ckptstore.repo import gc
from ckptstore.repo.aside import set_aside_remotely
from ckptstore.repo.condemned import CondemnedList
from ckptstore.repo.gc_lease import LEASE_SECONDS, Lease, ServerTime
from ckptstore.testing.watched import Request

sys.path.insert(0, str(Path(__file__).parent))
from gc_world import (
    RULES,
    RUN,
    World,
    blind_to_intents,
    blind_to_lists,
    deaf_to_news,
    without_a_second_look,
    without_grace,
)

DAY = 25


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    while made.paused:
        made.resume()


def putting(part: str) -> Callable[[Request], bool]:
    return lambda request: request.op == "put" and part in request.key


def pushed(world: World, *seeds: int) -> int:
    world.save(seeds)
    world.push(len(world.paths) - 1)
    return len(world.paths) - 1


def test_packs_of_a_deleted_save_go_after_the_grace_and_shared_ones_stay(world: World) -> None:
    pushed(world, 0, 1)
    pushed(world, 0, 2)
    before = world.packs()
    world.delete(0)
    for _ in range(2):
        found = world.collect()[0]
        assert not found.deleted
        world.wait(1)
    assert world.packs() == before
    world.collect_all()
    world.check()
    assert world.packs() == world.needed() == before, "the second save refers to the first one's pack"
    world.delete(0)
    world.collect_all()
    assert world.packs() == set()
    assert {key.split("/")[0] for key in _keys(world)} <= {"timelines", "pins", "news"}, "nothing else is left"


def _keys(world: World) -> list[str]:
    return [info.key.removeprefix(f"runs/{RUN}/") for info in world.server.list(f"runs/{RUN}/")]


def test_what_a_dead_push_left_goes_when_its_intent_is_old(world: World) -> None:
    from gc_world import Interruption, crash

    pushed(world, 0)
    world.save([5])
    world.push(1, [Interruption(putting("/shards/"), crash)])
    left = world.packs() - world.needed()
    assert len(left) == 1
    world.wait(5 * 24)
    world.collect()
    world.wait(DAY)
    assert world.collect()[0].deleted == [], "it may still go on"
    world.collect_all()
    assert world.packs() == world.needed()
    world.push(1)
    world.check()
    assert len(world.promised) == 2, "the local copy can be sent again"


def test_a_dry_run_tells_the_same_and_writes_nothing(world: World) -> None:
    pushed(world, 0)
    pushed(world, 1)
    world.delete(0)
    before = {info.key: info for info in world.server.list()}
    told = gc.preview(world.server, "r", [RUN], rules=RULES)[0]
    assert {info.key: info for info in world.server.list()} == before
    done = world.collect()[0]
    assert [d.key for d in told.condemned] == [d.key for d in done.condemned] != []
    assert done.condemned[0].why == "its save is gone"


def test_parts_together_collect_what_one_collects(world: World) -> None:
    for seed in range(6):
        pushed(world, seed)
    for _ in range(5):
        world.delete(0)
    for _ in range(5):
        for index in range(3):
            world.collect(part=(index, 3))
        world.wait(DAY)
    assert world.packs() == world.needed()
    world.check()


def test_parts_divide_the_deletions_among_them(world: World) -> None:
    for seed in range(8):
        pushed(world, seed)
    for _ in range(7):
        world.delete(0)
    deleted: dict[int, list[str]] = {0: [], 1: []}
    for _ in range(6):
        for index in deleted:
            deleted[index] += [doomed.key for doomed in world.collect(part=(index, 2))[0].deleted]
        world.wait(DAY)
    assert all(deleted.values()), "each did a share"
    assert not set(deleted[0]) & set(deleted[1]), "none did the other's work"
    assert world.packs() == world.needed()
    world.check()


def test_foreign_and_malformed_names_are_left_alone(world: World) -> None:
    pushed(world, 0)
    foreign = [f"runs/{RUN}/packs/readme.txt", f"runs/{RUN}/shards/x/shard-00000.json", f"runs/{RUN}x/packs/y", "mine"]
    for key in foreign:
        world.server.put(key, b"mine")
    stolen = CondemnedList(run=RUN, keys=("pins/x", "../../mine", "ckptstore.json", "commits/" + "1" * 30))
    world.server.put(f"runs/{RUN}/condemned/{'0' * 12}.json", stolen.encode())
    world.delete(0)
    world.collect_all()
    assert set(foreign) <= {info.key for info in world.server.list()}
    assert world.server.head("ckptstore.json") is not None


# --- each guard in the moment that needs it; and the loss that follows when it is taken out


def a_push_believes_in_a_pack_that_is_deleted(world: World) -> None:
    """It looks, is suspended for days, and goes on."""
    pushed(world, 0)
    world.save([0])
    world.pause(lambda plan: world.push(1, plan), putting("/shards/"))
    world.delete(0)
    for _ in range(3):
        world.collect()
        world.wait(DAY)
    world.resume()


def a_list_comes_out_after_a_push_has_read_them(world: World) -> None:
    """The collector has looked, and is suspended before it publishes; meanwhile somebody commits."""
    pushed(world, 0)
    world.save([0])
    world.pause(lambda plan: world.push(1, plan), putting("/shards/"))
    world.delete(0)
    world.collect()
    world.wait(DAY)
    world.pause(world.collect, putting("/condemned/"))
    world.resume()  # the push
    world.resume()  # the collector
    world.wait(DAY)
    world.collect()


def a_push_is_between_its_packs_and_its_manifest(world: World) -> None:
    """For two days, which is long, but it is alive."""
    world.save([3])
    world.pause(lambda plan: world.push(0, plan), putting("/commits/"))
    for _ in range(3):
        world.collect()
        world.wait(DAY)
    world.resume()


def a_list_is_published_while_an_agent_remembers_older_ones(world: World) -> None:
    """An agent that has read the lists once hears of a new one, whatever it remembers, in the middle of its push."""
    pushed(world, 0)
    pushed(world, 1)  # by an agent that is warm now
    world.save([0])
    world.pause(lambda plan: world.push(2, plan), putting("/shards/"))
    world.delete(0)
    for _ in range(3):
        world.collect()
        world.wait(DAY)
    world.resume()


@pytest.mark.parametrize(
    ("story", "mutation"),
    [
        (a_push_believes_in_a_pack_that_is_deleted, blind_to_lists),
        (a_list_comes_out_after_a_push_has_read_them, without_a_second_look),
        (a_list_comes_out_after_a_push_has_read_them, without_grace),
        (a_push_is_between_its_packs_and_its_manifest, blind_to_intents),
        (a_list_is_published_while_an_agent_remembers_older_ones, deaf_to_news),
    ],
)
def test_nothing_is_lost_and_something_is_when_the_guard_is_taken_out(
    story: Callable[[World], None],
    mutation: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(tmp_path / "guarded")
    story(world)
    world.check()
    assert world.promised
    mutation(monkeypatch)
    unguarded = World(tmp_path / "unguarded")
    story(unguarded)
    with pytest.raises((AssertionError, Exception), match=r"was deleted|there is no object"):
        unguarded.check()


def test_a_list_nobody_was_told_of_is_not_carried_out(world: World) -> None:
    """A collector dies between the list and its news: an agent that remembers older lists would never look."""
    from gc_world import Interruption, crash

    pushed(world, 0)
    pushed(world, 1)
    world.delete(0)
    world.collect([Interruption(putting("/news/"), crash)])
    assert [key for key in _keys(world) if key.startswith("condemned/")]
    before = {key for key in _keys(world) if key.startswith("shards/")}
    world.wait(DAY)
    world.collect()
    assert {key for key in _keys(world) if key.startswith("shards/")} == before
    world.wait(DAY)
    world.collect()
    assert {key for key in _keys(world) if key.startswith("shards/")} < before
    world.check()


# --- listings that lie


class Shortened(MemoryBlobStore):
    """A server whose listings leave out keys with a certain part."""

    hidden = ""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from (info for info in super().list(prefix) if not self.hidden or self.hidden not in info.key)


@pytest.mark.parametrize("hidden", ["/commits/", "/shards/", "/packs/", "/condemned/", "gc/", "/runs/", "/"])
def test_short_and_empty_listings_delete_nothing(world: World, hidden: str) -> None:
    server = Shortened(_name(world), clock=world.clock)
    pushed(world, 0)
    pushed(world, 1)
    packs = world.packs()
    server.hidden = hidden
    for _ in range(4):
        world.wait(8 * 24)
        try:
            gc.collect(server, "r", [RUN], rules=RULES, clock=world.clock)
        except (TransientError, IntegrityError):
            continue
    world.check()
    assert world.packs() == packs


def test_what_was_set_aside_is_not_collected_when_a_listing_leaves_it_out(world: World) -> None:
    server = Shortened(_name(world), clock=world.clock)
    pushed(world, 0)
    pushed(world, 1)
    tier = world.tier_of(server)
    set_aside_remotely(tier, tier.saves()[0])
    before = _keys(world)
    server.hidden = "/aside/"
    for _ in range(4):
        world.wait(8 * 24)
        with pytest.raises(TransientError, match="aside"):
            gc.collect(server, "r", [RUN], rules=RULES, clock=world.clock)
    assert _keys(world) == before


def test_damaged_news_stops_neither_a_push_nor_a_collection(world: World) -> None:
    pushed(world, 0)
    pushed(world, 1)
    world.delete(0)
    world.collect()
    news = f"runs/{RUN}/news/condemned.json"
    world.server.put(news, b"junk")
    pushed(world, 2)
    world.wait(DAY)
    world.collect()  # nobody can have been told, so nothing is carried out; it is announced anew
    assert world.server.get(news, max_bytes=1 << 20) != b"junk"
    world.wait(DAY)
    world.collect()
    world.check()


def test_a_committer_knows_what_is_condemned_when_the_listing_is_stale(world: World) -> None:
    """What it hears from the listing it would remember until there is news: so news names the lists."""
    server = Shortened(_name(world), clock=world.clock)
    pushed(world, 0)
    pushed(world, 1)
    world.delete(0)
    world.collect()
    expected = world.tier_of(world.server).condemned()
    assert expected
    server.hidden = "/condemned/"
    assert world.tier_of(server).condemned() == expected


def _name(world: World) -> str:
    return world.server.url.removeprefix("mem://")


def test_a_failing_listing_stops_it(world: World) -> None:
    from ckptstore.testing.watched import WatchedBlobStore

    pushed(world, 0)
    world.delete(0)
    world.collect()
    world.wait(DAY)

    def fail(request: Request) -> None:
        if request.op == "list" and "/shards/" in request.key:
            raise TransientError("cut off")

    before = set(_keys(world))
    with pytest.raises(TransientError):
        gc.collect(WatchedBlobStore(world.server, after=fail), "r", [RUN], rules=RULES, clock=world.clock)
    assert set(_keys(world)) == before


def test_a_committed_save_without_its_manifest_stops_it(world: World) -> None:
    pushed(world, 0)
    pushed(world, 1)
    world.delete(0)
    shard = next(key for key in _keys(world) if key.startswith("shards/") and key.split("/")[1].endswith("-2"))
    world.server.delete([f"runs/{RUN}/{shard}"])
    with pytest.raises(IntegrityError, match="nothing is collected"):
        gc.collect(world.server, "r", [RUN], rules=RULES, clock=world.clock)


# --- lease and clocks


def test_an_hour_of_clock_skew_changes_nothing(world: World) -> None:
    """The collectors' clocks play no part: only their monotonic ones are used."""
    pushed(world, 0)
    world.delete(0)
    early, late = ManualClock(), ManualClock()
    early.wall -= timedelta(hours=1)
    late.wall += timedelta(hours=1)
    assert gc.collect(world.server, "r", [RUN], rules=RULES, clock=late)[0].condemned
    world.wait(23.9)
    assert gc.collect(world.server, "r", [RUN], rules=RULES, clock=late)[0].deleted == []
    world.wait(0.2)
    assert gc.collect(world.server, "r", [RUN], rules=RULES, clock=early)[0].deleted


def test_one_collector_at_a_time_and_a_dead_one_is_replaced(world: World) -> None:
    time = ServerTime(world.server, world.clock)
    first = Lease(world.server, time)
    first.__enter__()
    first.check()
    with pytest.raises(LockedError), Lease(world.server, time):
        raise AssertionError("two at once")
    with pytest.raises(LockedError), Lease(world.server, time, (1, 2)):
        raise AssertionError("a part while the whole is collected")
    world.clock.sleep(LEASE_SECONDS + 1)
    with Lease(world.server, time) as second:
        second.check()
        with pytest.raises(LockedError, match="lost"):
            first.check()
    assert not list(world.server.list("gc/"))


def test_parts_of_one_division_go_side_by_side(world: World) -> None:
    time = ServerTime(world.server, world.clock)
    with Lease(world.server, time, (0, 2)), Lease(world.server, time, (1, 2)):
        other = Lease(world.server, time, (0, 3))
        with pytest.raises(LockedError):
            other.__enter__()
