"""How ranks and runs share the disk: a part of save.py, ``--only shares``.

The same bytes as one shard file, as several equal ones, and as unequal ones; a small save while another run's large one
is being written; two saves of one run at once. What a split takes is the agent's time from the first byte to the last
fsync; what a save takes, the time from its seal until it is on disk.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptstore import CheckpointStore, SaveHandle, StoreConfig, per_rank

#: Name -> how much each rank has.
SPLITS: dict[str, tuple[int, ...]] = {
    "one rank": (1,),
    "2 ranks": (1, 1),
    "4 ranks": (1, 1, 1, 1),
    "8 ranks": (1,) * 8,
    "8 ranks, one with ten times as much": (1,) * 7 + (10,),
}
SMALL_MIB = 10


def noted(store: CheckpointStore, save_id: str) -> dict[str, Any]:
    """Where a save's time went; the agent writes it down right after the commit."""
    from ckptstore.repo import timings
    from ckptstore.repo.local import LocalTier

    assert store.local is not None
    tier = LocalTier(store.local)
    while "ranks" not in (note := timings.read(tier, store.run, save_id)):
        time.sleep(0.01)
    return note


def split(store: CheckpointStore, weights: tuple[int, ...], mib: int, tidy: Callable[[], None]) -> list[float]:
    """Runs on each of several ranks: seconds for writing two saves, the first left out."""
    mine = (mib << 18) * weights[dist.get_rank()] // sum(weights)
    state = {"mine": per_rank(torch.rand(mine))}
    seconds = []
    for step in range(3):
        info = store.save(state, step).wait("local")
        seconds.append(noted(store, info.save_id)["write"])
        dist.barrier()
        if dist.get_rank() == 0:
            tidy()
        dist.barrier()
    return seconds[1:]


def shares(
    folder: Path, mib: int, rounds: int, in_ranks: Callable[[int, int], list[float]], tidy: Callable[[], None]
) -> dict[str, Any]:
    """Everything.

    Args:
        in_ranks: :func:`split` of the split of this number, by so many ranks.
        tidy: deletes what was saved, but for the newest of each run.
    """
    samples: dict[str, list[float]] = {name: [] for name in SPLITS}
    for round_number in range(rounds):
        for name in random.Random(round_number).sample(list(SPLITS), len(SPLITS)):
            samples[name] += in_ranks(list(SPLITS).index(name), len(SPLITS[name]))
    writes = {name: statistics.median(seconds) for name, seconds in samples.items()}
    result = runs(folder, mib, rounds, tidy)
    return {
        "parts": {name: {"write_seconds": writes[name], "samples": samples[name]} for name in SPLITS},
        **result,
        "ratios": {
            **{f"writing, {name}, vs one rank": seconds / writes["one rank"] for name, seconds in writes.items()},
            **result["ratios"],
        },
    }


class Saving:
    """A save from its seal on."""

    def __init__(self, handle: SaveHandle) -> None:
        self.handle = handle
        self._began = time.perf_counter()
        self._took: Future[float] = Future()
        handle.local.add_done_callback(lambda _: self._took.set_result(time.perf_counter() - self._began))

    def wait(self) -> float:
        """Seconds until it was on disk."""
        self.handle.wait("local")
        return self._took.result()


def runs(folder: Path, mib: int, rounds: int, tidy: Callable[[], None]) -> dict[str, Any]:
    """Three runs on one root, from one process."""
    sizes = {"small": SMALL_MIB, "large": mib, "larger": 2 * mib}
    stores = {
        name: CheckpointStore(folder / "runs", run=name, config=StoreConfig(generations=2 if name == "large" else 1))
        for name in sizes
    }
    states = {name: {"w": torch.rand(size << 18)} for name, size in sizes.items()}
    step = iter(range(1 << 30))
    seconds: dict[str, list[float]] = {}

    def clear() -> None:
        for store in stores.values():
            for info in store.checkpoints()[:-1]:
                store.delete(info.save_id)
        tidy()

    def save(name: str) -> Saving:
        return Saving(stores[name].save(states[name], next(step)))

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    try:
        for name in stores:
            save(name).wait()
        for _ in range(rounds):
            for name in stores:
                clear()
                note(f"{name} alone", save(name).wait())
            for name in ("large", "larger"):
                clear()
                other = save(name)
                while not other.handle.done("local"):
                    taken = save("small").wait()
                    if not other.handle.done("local"):
                        note(f"small beside {name}", taken)
                note(f"{name} beside small ones", other.wait())
            clear()
            older, newer = save("large"), save("large")
            note("older of two of a run", older.wait())
            note("newer of two of a run", newer.wait())
    finally:
        for store in stores.values():
            store.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "small_mib": SMALL_MIB,
        "runs": {name: {"durable_seconds": medians[name], "samples": seconds[name]} for name in seconds},
        "ratios": {
            "small beside large, of large's time": medians["small beside large"] / medians["large beside small ones"],
            "small beside larger, of larger's time": medians["small beside larger"]
            / medians["larger beside small ones"],
            "small beside larger vs beside large": medians["small beside larger"] / medians["small beside large"],
            "older of two of a run, vs alone": medians["older of two of a run"] / medians["large alone"],
        },
    }
