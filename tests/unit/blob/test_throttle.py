"""Bytes a second, requests at a time, and backing off."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.blob.throttle import Throttle, ThrottledBlobStore
from ckptstore.clock import ManualClock
from ckptstore.errors import TransientError


def test_the_rate_holds_on_average_when_many_bodies_are_moved() -> None:
    clock = ManualClock()
    store = ThrottledBlobStore(MemoryBlobStore("rate"), Throttle(1000, clock=clock))
    for number in range(11):
        store.put(f"k{number}", bytes(500))
    assert clock.elapsed == pytest.approx(5.0)
    for number in range(10):
        store.get(f"k{number}", length=500)
    assert clock.elapsed == pytest.approx(10.0)
    store.get("k0")
    store.get("k1")
    assert clock.elapsed == pytest.approx(11.0)


def test_nothing_waits_when_there_is_no_rate() -> None:
    clock = ManualClock()
    store = ThrottledBlobStore(MemoryBlobStore("free"), Throttle(clock=clock))
    store.put("k", bytes(10**6))
    store.delete(["k"])
    assert clock.elapsed == 0


def test_no_more_requests_run_at_a_time_than_allowed_when_there_are_many_threads() -> None:
    running, most, lock = 0, 0, threading.Lock()

    class Slow(MemoryBlobStore):
        def head(self, key: str) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1

    store = ThrottledBlobStore(Slow("slow"), Throttle(concurrency=3))
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(store.head, [f"k{number}" for number in range(30)]))
    assert most == 3


def test_the_share_halves_and_recovers_when_the_server_throttles() -> None:
    throttle = Throttle(1000, concurrency=8, clock=ManualClock())

    def fail(reason: str) -> None:
        with pytest.raises(TransientError), throttle.request():
            raise TransientError("no", reason=reason)

    fail("timeout")
    assert throttle.share == 1
    fail("throttled")
    fail("throttled")
    assert throttle.share == 0.25
    for _ in range(20):
        fail("throttled")
    assert throttle.share == 1 / 64
    for _ in range(100):
        with throttle.request():
            pass
    assert throttle.share == 1


@pytest.mark.parametrize(("rate", "concurrency"), [(0, None), (-1, None), (None, 0)])
def test_a_throttle_that_lets_nothing_through_is_refused_when_made(rate: float | None, concurrency: int | None) -> None:
    with pytest.raises(ValueError, match="lets something through"):
        Throttle(rate, concurrency)
