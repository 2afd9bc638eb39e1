"""Trying again: budget, jitter, what is worth it, and lost answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptstore.blob.base import Buffer
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.blob.retry import Retrier, Retry, RetryingBlobStore, RetryPolicy
from ckptstore.clock import ManualClock
from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
    ConfigError,
    CredentialsError,
    IntegrityError,
    NoSpaceError,
    NoStoreError,
    NotFoundError,
    StorageError,
    TransientError,
)


class Script:
    """A request that fails as scripted, then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = [*failures]
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def _always(error: Exception) -> Script:
    return Script(*[error] * 1000)


def _busy(**context: object) -> TransientError:
    return TransientError("busy", reason="throttled", **context)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_the_request_is_made_once_when_it_succeeds(clock: ManualClock) -> None:
    request = Script()
    assert Retrier(clock=clock)("get", request) == "done"
    assert (request.num_calls, clock.elapsed) == (1, 0.0)


def test_waits_grow_up_to_the_limit_when_jitter_is_greatest(clock: ManualClock) -> None:
    seen: list[Retry] = []
    policy = RetryPolicy(attempts=7, deadline_s=1000, first_wait_s=1.0, max_wait_s=10.0)
    retrier = Retrier(policy, clock=clock, on_retry=seen.append, uniform=lambda low, high: high)
    assert retrier("put", Script(*[_busy() for _ in range(6)])) == "done"
    assert [retry.wait_s for retry in seen] == [2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    assert [(retry.op, retry.reason, retry.attempt) for retry in seen][:2] == [
        ("put", "throttled", 1),
        ("put", "throttled", 2),
    ]
    assert clock.elapsed == 44.0


def test_waits_differ_between_clients_when_all_fail_at_once() -> None:
    def total() -> float:
        clock = ManualClock()
        Retrier(RetryPolicy(attempts=4), clock=clock)("put", Script(_busy(), _busy(), _busy()))
        return clock.elapsed

    assert len({total() for _ in range(20)}) == 20


def test_the_last_error_says_how_often_when_attempts_are_spent(clock: ManualClock) -> None:
    request = _always(TransientError("busy", hint="wait", reason="throttled", bucket="b"))
    with pytest.raises(TransientError) as caught:
        Retrier(RetryPolicy(attempts=3), clock=clock)("put", request)
    assert request.num_calls == 3
    assert caught.value.context == {"reason": "throttled", "bucket": "b", "attempts": 3}
    assert "gave up after 3 attempts" in str(caught.value)
    assert "wait" in str(caught.value)


def test_no_attempt_begins_after_the_deadline_when_waits_are_long(clock: ManualClock) -> None:
    policy = RetryPolicy(attempts=1000, deadline_s=100, first_wait_s=8, max_wait_s=16)
    times: list[float] = []

    def request() -> None:
        times.append(clock.elapsed)
        raise _busy()

    with pytest.raises(TransientError):
        Retrier(policy, clock=clock, uniform=lambda low, high: high)("put", request)
    assert times == [0, 16, 32, 48, 64, 80, 96]
    assert clock.elapsed == 96, "a wait that can't lead to another attempt was waited"


def test_slow_requests_count_against_the_deadline_when_they_fail(clock: ManualClock) -> None:
    def request() -> None:
        clock.sleep(60)
        raise _busy()

    with pytest.raises(TransientError) as caught:
        Retrier(RetryPolicy(attempts=1000, deadline_s=100), clock=clock, uniform=lambda low, high: 1.0)("put", request)
    assert caught.value.context["attempts"] == 2


@pytest.mark.parametrize(("after_s", "waited_s"), [(5.0, 5.5), (300.0, 20.0)])
def test_the_servers_wish_is_respected_within_the_limit_when_it_has_one(
    clock: ManualClock, after_s: float, waited_s: float
) -> None:
    retrier = Retrier(RetryPolicy(max_wait_s=20), clock=clock, uniform=lambda low, high: 0.5)
    retrier("put", Script(_busy(retry_after_s=after_s)))
    assert clock.elapsed == waited_s


@pytest.mark.parametrize(
    "error",
    [
        NotFoundError("no"),
        NoStoreError("no"),
        CredentialsError("no"),
        CheckpointExistsError("no"),
        NoSpaceError("no"),
        StorageError("no"),
        IntegrityError("no"),
        ConfigError("no"),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_tried_again_when_it_cannot_help(clock: ManualClock, error: Exception) -> None:
    request = _always(error)
    with pytest.raises(type(error)) as caught:
        Retrier(clock=clock)("put", request)
    assert caught.value is error
    assert (request.num_calls, clock.elapsed) == (1, 0.0)


def test_attempts_add_up_to_one_budget_when_retriers_are_nested(clock: ManualClock) -> None:
    retrier = Retrier(RetryPolicy(attempts=4), clock=clock)
    request = _always(_busy())
    with pytest.raises(TransientError):
        retrier("put", lambda: retrier("part", request))
    assert request.num_calls == 4


def test_expired_credentials_get_one_more_try_at_once_when_met(clock: ManualClock) -> None:
    expired = TransientError("expired", reason="expired")
    assert Retrier(clock=clock)("get", Script(expired)) == "done"
    assert clock.elapsed == 0
    request = _always(expired)
    with pytest.raises(CredentialsError, match="renew"):
        Retrier(clock=clock)("get", request)
    assert request.num_calls == 2


class LossyStore(MemoryBlobStore):
    """Does what it is told; ``after`` may then make a failure of it, as a lost answer does."""

    after: Callable[[], None] | None = None

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        super().put(key, data, if_absent=if_absent)
        if self.after:
            after, self.after = self.after, None
            after()


def _lose() -> None:
    raise TransientError("reset", reason="cut_off")


@pytest.mark.parametrize("size", [0, 10, 9 << 20])
def test_a_lost_answer_is_a_success_when_our_bytes_are_there(clock: ManualClock, size: int) -> None:
    inner = LossyStore(f"lossy-{size}")
    inner.after = _lose
    store = RetryingBlobStore(inner, Retrier(clock=clock))
    store.put("k", bytes(size), if_absent=True)
    assert store.get("k") == bytes(size)


@pytest.mark.parametrize("theirs", [b"theirs", b"ourz", b"our", b""])
def test_a_lost_answer_is_a_conflict_when_other_bytes_are_there(clock: ManualClock, theirs: bytes) -> None:
    inner = LossyStore(f"lossy-{theirs!r}".replace("'", ""))

    def replace() -> None:
        MemoryBlobStore.put(inner, "k", theirs)
        _lose()

    inner.after = replace
    with pytest.raises(CheckpointExistsError):
        RetryingBlobStore(inner, Retrier(clock=clock)).put("k", b"ours", if_absent=True)
    assert inner.get("k") == theirs


def test_equal_bytes_that_were_there_before_are_a_conflict_when_no_answer_was_lost(clock: ManualClock) -> None:
    store = RetryingBlobStore(MemoryBlobStore("before"), Retrier(clock=clock))
    store.put("k", b"ours")
    with pytest.raises(CheckpointExistsError):
        store.put("k", b"ours", if_absent=True)


def test_close_reaches_the_inner_store_when_called() -> None:
    closed: list[bool] = []
    inner = MemoryBlobStore("closed")
    inner.close = lambda: closed.append(True)  # type: ignore[method-assign]
    RetryingBlobStore(inner).close()
    assert closed == [True]


def test_every_retried_error_of_ours_pickles_when_it_is_final(clock: ManualClock) -> None:
    import pickle

    with pytest.raises(CkptError) as caught:
        Retrier(RetryPolicy(attempts=2), clock=clock)("put", _always(_busy()))
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.context == caught.value.context
