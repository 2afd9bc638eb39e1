"""The few words ranks exchange around a save or a load, with one treatment of everything that can go wrong.

An :class:`Agreement` owns a gloo group of its own, made at the first use and never registered with
``torch.distributed``, so a store neither depends on the job's backend nor adds to its list of groups. Every wait has
the deadline. A peer that died, hangs or is late becomes a :class:`~ckptstore.errors.SaveFailedError` naming its rank on
every survivor; what the backend raised is only its cause. After that the group is made anew, so the next save works:
ranks may have failed at different moments and a different number of times, so they first meet in the job's store.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch.distributed import distributed_c10d

from ckptstore.errors import CkptError, SaveFailedError

T = TypeVar("T")

#: How long survivors of a lost peer wait for each other's sign of life before they say who is missing.
_ROLL_CALL_S = 2.0
_VOTES_MULTIPLE = 128
#: How long a closing agreement waits for the answer to a question that is under way.
_ANSWER_S = 1.0
#: Where gloo wants its tensors, whatever the job has for a default device.
_HOST = torch.device("cpu")
_ABSENT = torch.iinfo(torch.int64).min
#: What becomes of a meeting; whoever says so first decides it for all.
_MET, _MISSED = "met", "missed"

_instances: dict[tuple[int, ...], int] = {}
_instances_lock = threading.Lock()
_left_open: list[Any] = []


class _MissingError(Exception):
    """These ranks have not come to a meeting."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"ranks {ranks} have not come")
        self.ranks = ranks


@dataclass(frozen=True)
class Outcome:
    """What all ranks' votes amount to; the same on every rank.

    Attributes:
        differing: names of the values that are not equal on all ranks.
        raised: names of the flags that at least one rank raised.
        unequal_sets: indexes of the partial values that differ among the ranks that gave one.
    """

    differing: frozenset[str]
    raised: frozenset[str]
    unequal_sets: tuple[int, ...]


class Agreement:
    """The ranks of one store. Collective: every rank makes the same calls in the same order.

    Args:
        group: the ranks that take part; None: all, or this process alone without ``torch.distributed``.
        deadline_s: longest wait for a peer in any one call.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, deadline_s: float = 30.0) -> None:
        self.deadline_s = deadline_s
        self._ranks: tuple[int, ...] = (0,)
        self.rank = 0
        if dist.is_available() and dist.is_initialized():
            self._ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            self.rank = self._ranks.index(dist.get_rank())
        self.world_size = len(self._ranks)
        self._pg: Any = None
        self._begun: Any = None
        self._lock = threading.RLock()
        self._attempt = 0
        self._calls = 0
        self._name = ""

    @classmethod
    def alone(cls) -> Agreement:
        """One rank that agrees with itself, whatever ``torch.distributed`` says."""
        agreement = cls.__new__(cls)
        agreement.deadline_s = 0.0
        agreement._ranks, agreement.rank, agreement.world_size = (0,), 0, 1
        return agreement

    # -- the words ------------------------------------------------------------------------------------------------

    def agree(self, *, same: Mapping[str, int], flags: Mapping[str, bool], sets: Sequence[int | None] = ()) -> Outcome:
        """One all-reduce: are these values equal everywhere, did anybody raise a flag? Collective.

        Args:
            same: values that should be equal on all ranks; |value| < 2**63.
            flags: raised if any rank raises them.
            sets: values that should be equal among the ranks that give one; None from the others. As many on each rank.

        Raises:
            SaveFailedError: a peer was lost.
        """
        names, flag_names = sorted(same), sorted(flags)
        votes = [v for name in names for v in (same[name], -same[name])]
        votes += [int(flags[name]) for name in flag_names]
        votes += [v for value in sets for v in ((_ABSENT, _ABSENT) if value is None else (value, -value))]
        # Ranks that were torn apart by a failure may have different numbers of sets; the reduction must still fit.
        votes += [0] * (-len(votes) % _VOTES_MULTIPLE)
        if self.world_size > 1:
            votes = self._guarded("agreeing on the save", lambda pg: _max(pg, votes))
        top = iter(votes)
        differing = frozenset(name for name in names if next(top) != -next(top))
        raised = frozenset(name for name in flag_names if next(top))
        unequal = tuple(i for i in range(len(sets)) if _differ(next(top), next(top)))
        return Outcome(differing, raised, unequal)

    def begin_max(self, values: Sequence[int], *, timeout_s: float) -> Callable[[], list[int]]:
        """Start finding the largest of each value over the ranks, and go on. Collective, as is calling the result.

        Args:
            values: as many on each rank.
            timeout_s: how long peers may be apart.

        Returns:
            A function that waits for the peers and gives the largest values; it raises SaveFailedError if one was lost.
        """
        if self.world_size == 1:
            return lambda: list(values)
        tensor = torch.tensor(list(values), dtype=torch.int64, device=_HOST)
        options: Any = dist.AllreduceOptions()
        options.reduceOp, options.timeout = dist.ReduceOp.MAX, timedelta(seconds=timeout_s)
        work = self._guarded("asking the ranks for news", lambda pg: pg.allreduce([tensor], options))
        self._begun = work

        def result() -> list[int]:
            self._guarded("asking the ranks for news", lambda _: work.wait())
            return [int(value) for value in tensor.tolist()]

        return result

    @property
    def calls(self) -> int:
        """How many collective calls this rank has made; ranks that are at the same place have made as many."""
        return self._calls

    def gather(self, value: T, *, what: str = "gathering") -> list[T]:
        """Every rank's value, by rank. Collective.

        Raises:
            SaveFailedError: a peer was lost.
        """
        if self.world_size == 1:
            return [value]
        data = pickle.dumps(value)
        return [pickle.loads(part) for part in self._guarded(what, lambda pg: _all_bytes(pg, data))]  # noqa: S301  # our own peers

    def broadcast(self, value: T, *, what: str = "broadcasting", src: int = 0) -> T:
        """Rank ``src``'s value on every rank. Collective.

        Raises:
            SaveFailedError: a peer was lost.
        """
        return self.gather(value if self.rank == src else None, what=what)[src]  # type: ignore[return-value]

    def trade(self, give: torch.Tensor, given: Sequence[int], take: torch.Tensor, taken: Sequence[int]) -> None:
        """Bytes from every rank to every rank. Collective.

        Args:
            give: what this rank has for the others, by rank, back to back.
            given: bytes for each rank.
            take: filled with what the others have for this rank, by rank.
            taken: bytes from each rank; rank r's ``given`` for this one.

        Raises:
            SaveFailedError: a peer was lost.
        """

        def move(pg: Any) -> None:
            pg.alltoall_base(take, give, list(taken), list(given), dist.AllToAllOptions()).wait()

        self._guarded("exchanging bytes", move)

    def together(self, error: CkptError | None, *, what: str) -> None:
        """Return if no rank has an error, else raise the same one everywhere. Collective.

        Raises:
            CkptError: the lowest failing rank's error, naming the ranks that failed.
            SaveFailedError: a peer was lost.
        """
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        if self.agree(same={}, flags={"failed": error is not None}).raised:
            self.raise_together(error, what=what)

    def raise_together(self, error: CkptError | None, *, what: str) -> None:
        """Every rank knows that some rank failed: raise that rank's error everywhere. Collective."""
        errors = self.gather(error, what=what)
        failed = [rank for rank, each in enumerate(errors) if each is not None]
        first = next((each for each in errors if each is not None), None)
        if first is None:
            return
        if self.world_size > 1:
            context = {"rank": failed[0], **first.context, "ranks": failed}
            where = "every rank" if len(failed) == self.world_size else f"rank {', '.join(map(str, failed))}"
            combined = type(first)(f"{where}: {first.message}", hint=first.hint, **context)
            raise combined from error
        raise first

    def job_store(self) -> Any:
        """A client of its own to the job's key-value store, for one thread. Local; needs ``torch.distributed``."""
        return _job_store(self.deadline_s)

    def close(self) -> None:
        """Let go of the group, before the interpreter ends and finds its threads. Local.

        A question that is still open is answered within moments where all ranks have asked it. Where some haven't, the
        group stays: ending it would wait for them.
        """
        with self._lock:
            begun, self._begun = self._begun, None
            until = time.monotonic() + _ANSWER_S
            while begun is not None and not begun.is_completed() and time.monotonic() < until:
                time.sleep(0.01)
            if begun is not None and not begun.is_completed():
                _left_open.append(self._pg)
            self._pg = None

    # -- the group and its failures -----------------------------------------------------------------------------------

    def _guarded(self, what: str, action: Callable[[Any], T]) -> T:
        with self._lock:
            self._calls += 1
            try:
                if self._pg is None:
                    self._pg = self._connect()
                return action(self._pg)
            except Exception as error:
                self._pg = None
                missing, note = (error.ranks, "") if isinstance(error, _MissingError) else self._roll_call()
                raise _lost(what, missing, note, self.deadline_s) from error
            except BaseException:
                # Told to stop in the middle: the peers' next question is not to be taken for this one.
                self._pg = None
                raise

    def _connect(self) -> Any:
        if not self._name:
            with _instances_lock:
                number = _instances[self._ranks] = _instances.get(self._ranks, 0) + 1
            ranks = xxhash.xxh3_64_hexdigest(repr(self._ranks).encode())
            self._name = f"ckptstore/{ranks}/{number}"
        store = distributed_c10d.PrefixStore(self._name, _job_store(self.deadline_s))
        self._meet(store)
        store = distributed_c10d.PrefixStore(str(self._attempt), store)
        return dist.ProcessGroupGloo(store, self.rank, self.world_size, timedelta(seconds=self.deadline_s))

    def _meet(self, store: Any) -> None:
        """Go to the first attempt at which all ranks are; an attempt that any of them has given up is over for all.

        Raises:
            _MissingError: not all came in time.
        """
        until = time.monotonic() + self.deadline_s
        while True:
            self._attempt += 1
            place = distributed_c10d.PrefixStore(f"{self._attempt}/meeting", store)
            place.set(str(self.rank), "here")
            outcome = _MET
            if place.add("count", 1) < self.world_size:
                try:
                    place.wait(["outcome"], timedelta(seconds=max(0.01, until - time.monotonic())))
                except RuntimeError:
                    outcome = _MISSED
            if place.compare_set("outcome", "", outcome).decode() == _MET:
                return
            if time.monotonic() >= until:
                raise _MissingError([rank for rank in range(self.world_size) if not place.check([str(rank)])])

    def _roll_call(self) -> tuple[list[int], str]:
        """Ranks that gave no sign of life after a failure, and a note if the job's store is gone too."""
        found: list[list[int]] = []
        prefix = f"{self._name}/{self._attempt}/alive"

        def call() -> None:
            store = _job_store(_ROLL_CALL_S)
            store.set(f"{prefix}/{self.rank}", "1")
            until = time.monotonic() + _ROLL_CALL_S
            while True:
                absent = [r for r in range(self.world_size) if not store.check([f"{prefix}/{r}"])]
                if not absent or time.monotonic() > until:
                    found.append(absent)
                    return
                time.sleep(0.05)

        def quietly() -> None:
            with suppress(Exception):  # the store may have gone with its host: said below
                call()

        thread = threading.Thread(target=quietly, name="ckptstore-roll-call", daemon=True)
        thread.start()
        thread.join(_ROLL_CALL_S * 2)
        if found:
            return found[0], ""
        return ([0], "the job's store, which rank 0 hosts, does not answer") if self.rank else ([], "")


def _job_store(timeout_s: float) -> Any:
    store: Any = distributed_c10d._get_default_store()
    try:
        store = store.clone()  # threads on one client wait for each other
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _lost(what: str, missing: list[int], note: str, deadline_s: float) -> SaveFailedError:
    names = ", ".join(map(str, missing))
    if len(missing) == 1:
        problem = f"rank {names} is gone or took longer than {deadline_s:g} s"
    elif missing:
        problem = f"ranks {names} are gone or took longer than {deadline_s:g} s"
    else:
        problem = "the connection between the ranks broke, though all of them are alive"
    return SaveFailedError(
        f"{what}: {problem}{'; ' + note if note else ''}",
        hint="earlier checkpoints are untouched; if the rank is only slow, raise StoreConfig(deadline_s=...)",
        rank=missing[0] if missing else None,
        ranks=missing,
    )


def _differ(top: int, negated_bottom: int) -> bool:
    return top != _ABSENT and top != -negated_bottom


def _max(pg: Any, votes: list[int]) -> list[int]:
    tensor = torch.tensor(votes, dtype=torch.int64, device=_HOST)
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX
    pg.allreduce([tensor], options).wait()
    return [int(v) for v in tensor.tolist()]


def _all_bytes(pg: Any, data: bytes) -> list[bytes]:
    world_size = pg.size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=_HOST) for _ in range(world_size)]
    pg.allgather([sizes], [torch.tensor([len(data)], dtype=torch.int64, device=_HOST)]).wait()
    longest = max(int(size) for size in sizes)
    mine = torch.zeros(max(longest, 1), dtype=torch.uint8, device=_HOST)
    mine[: len(data)] = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
    parts = [torch.zeros_like(mine) for _ in range(world_size)]
    pg.allgather([parts], [mine]).wait()
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
