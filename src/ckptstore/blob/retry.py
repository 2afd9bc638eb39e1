"""A store that tries again: full jitter, bounded in attempts and in time, and only where trying again can help.

One policy serves whole operations (:class:`RetryingBlobStore`) and the single requests within them (parts, pages,
batches: :class:`Retrier` is an :class:`~ckptstore.blob.base.Attempts`). An error that a Retrier has given up on carries
``context['attempts']`` and is final for every Retrier above it, so attempts never multiply.
"""

from __future__ import annotations

import builtins
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying
from tenacity.retry import retry_if_exception

from ckptstore.blob.base import BlobStore, Buffer, ObjectInfo, Trait
from ckptstore.clock import SYSTEM_CLOCK, Clock
from ckptstore.errors import CheckpointExistsError, CredentialsError, TransientError

log = logging.getLogger(__name__)

T = TypeVar("T")
_COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again.

    Attributes:
        attempts: Most attempts at one operation, the first included.
        deadline_s: No attempt begins later than this after the first.
        first_wait_s: The wait before attempt n+1 is random between 0 and ``first_wait_s * 2**n``, ...
        max_wait_s: ... but at most this; a server's Retry-After counts as the least wait, up to this as well.
    """

    attempts: int = 6
    deadline_s: float = 120.0
    first_wait_s: float = 0.25
    max_wait_s: float = 20.0


@dataclass(frozen=True)
class Retry:
    """One failure that is about to be tried again; given to ``on_retry`` for logs and metrics."""

    op: str
    reason: str
    attempt: int
    wait_s: float
    error: TransientError


class Retrier:
    """Makes requests as a policy says. Thread-safe; without state between calls.

    Args:
        policy: When and how often.
        clock: Its ``sleep`` waits, its ``monotonic`` measures.
        on_retry: Called before each wait, on the thread that waits.
        uniform: ``uniform(0, a)``, for the jitter.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        on_retry: Callable[[Retry], None] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self._clock = clock
        self._on_retry = on_retry
        self._uniform = uniform

    def __call__(self, op: str, request: Callable[[], T]) -> T:
        """Make the request until it succeeds, can't be helped, or the budget is spent.

        Raises:
            TransientError: the last failure, with ``context['attempts']``.
            CredentialsError: the credentials had expired and reading them anew did not help.
        """
        begun = self._clock.monotonic()
        expiries = 0

        def worth_it(error: BaseException) -> bool:
            nonlocal expiries
            if not isinstance(error, TransientError) or "attempts" in error.context:
                return False
            if _reason(error) == "expired":
                expiries += 1
                return expiries == 1
            return True

        def is_spent(state: RetryCallState) -> bool:
            ends = self._clock.monotonic() - begun + state.upcoming_sleep
            return state.attempt_number >= self.policy.attempts or ends > self.policy.deadline_s

        def give_up(state: RetryCallState) -> T:
            raise self._final(state, self._clock.monotonic() - begun)

        def tell(state: RetryCallState) -> None:
            error = _error(state)
            if isinstance(error, TransientError):
                log.debug("%s; trying again in %.1f s", error.message, state.upcoming_sleep)
                if self._on_retry:
                    self._on_retry(Retry(op, _reason(error), state.attempt_number, state.upcoming_sleep, error))

        loop = Retrying(
            retry=retry_if_exception(worth_it),
            stop=is_spent,
            wait=self._wait_s,
            sleep=self._clock.sleep,
            before_sleep=tell,
            retry_error_callback=give_up,
        )
        try:
            return loop(request)
        except TransientError as error:
            if _reason(error) == "expired":
                raise CredentialsError(
                    error.message,
                    hint="renew them; what was uploaded is kept and `ckptctl push` goes on",
                    **error.context,
                ) from error
            raise

    def _wait_s(self, state: RetryCallState) -> float:
        policy = self.policy
        error = _error(state)
        if isinstance(error, TransientError) and _reason(error) == "expired":
            return 0.0
        jitter = self._uniform(0.0, min(policy.max_wait_s, policy.first_wait_s * 2.0**state.attempt_number))
        least = error.context.get("retry_after_s", 0.0) if isinstance(error, TransientError) else 0.0
        return min(policy.max_wait_s, max(jitter, float(least) + jitter if least else jitter))

    def _final(self, state: RetryCallState, elapsed_s: float) -> BaseException:
        error = _error(state)
        if not isinstance(error, TransientError):  # pragma: no cover - only these are tried again
            return error or RuntimeError("no outcome")
        tried = state.attempt_number
        final = TransientError(
            f"{error.message}; gave up after {tried} attempt{'s' if tried > 1 else ''} in {elapsed_s:.0f} s",
            hint=error.hint,
            **{**error.context, "attempts": tried},
        )
        final.__cause__ = error
        return final


class RetryingBlobStore(BlobStore):
    """A store whose operations are tried again.

    ``put(if_absent=True)`` settles lost answers: if an attempt failed without a verdict and the next finds the object
    there, its bytes are read back, and equal ones are success.

    Args:
        inner: Closed with this one.
        attempts: How; for stores that take an Attempts themselves, pass them the same.
    """

    def __init__(self, inner: BlobStore, attempts: Retrier | None = None) -> None:
        self.inner = inner
        self._attempts = attempts or Retrier()
        self.url = inner.url
        self.scheme = inner.scheme
        self.capabilities = inner.capabilities

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        is_uncertain = False

        def request() -> None:
            nonlocal is_uncertain
            try:
                self.inner.put(key, data, if_absent=if_absent)
            except CheckpointExistsError:
                if not is_uncertain or not self._holds(key, data):
                    raise
            except TransientError:
                is_uncertain = True
                raise

        self._attempts("put", request)

    def get(self, key: str, *, start: int = 0, length: int | None = None, max_bytes: int | None = None) -> bytes:
        return self._attempts("get", lambda: self.inner.get(key, start=start, length=length, max_bytes=max_bytes))

    def head(self, key: str) -> ObjectInfo | None:
        return self._attempts("head", lambda: self.inner.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As the inner store lists; a listing that breaks is begun again, and no object is yielded twice."""
        seen: set[str] = set()
        pending = self.inner.list(prefix)
        is_broken = False

        def following() -> ObjectInfo | None:
            nonlocal pending, is_broken
            if is_broken:
                pending, is_broken = self.inner.list(prefix), False
            try:
                return next((info for info in pending if info.key not in seen), None)
            except TransientError:
                is_broken = True
                raise

        while (info := self._attempts("list", following)) is not None:
            seen.add(info.key)
            yield info

    def delete(self, keys: Sequence[str]) -> None:
        self._attempts("delete", lambda: self.inner.delete(keys))

    def abort_uploads(self, prefix: str, older_than: datetime) -> int:
        return self._attempts("abort_uploads", lambda: self.inner.abort_uploads(prefix, older_than))

    def deletion_rules(self) -> builtins.list[str]:
        return self._attempts("deletion_rules", self.inner.deletion_rules)

    def traits(self, key: str) -> builtins.list[Trait]:
        return self._attempts("traits", lambda: self.inner.traits(key))

    def close(self) -> None:
        self.inner.close()

    def _holds(self, key: str, data: Buffer) -> bool:
        """Whether the object has these bytes. Looking is tried again by itself: a body isn't sent anew for that."""
        body = memoryview(data).cast("B")
        info = self.head(key)
        if info is None or info.size_bytes != len(body):
            return False
        for start in range(0, len(body), _COMPARE_BYTES):
            piece = body[start : start + _COMPARE_BYTES]
            # Comparing with a view is 40 times slower than a copy.
            if self.get(key, start=start, length=len(piece)) != bytes(piece):
                return False
        return True


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _reason(error: TransientError) -> str:
    return str(error.context.get("reason", "unreachable"))
