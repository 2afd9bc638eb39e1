"""A loader that goes on in mid-epoch sees exactly what it would have seen."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

from ckptstore.errors import StateError
from ckptstore.manager import ResumableLoader

DATA = TensorDataset(torch.arange(20))


def loaders() -> dict[str, Any]:
    return {
        "global": lambda: DataLoader(DATA, batch_size=3, shuffle=True),
        "own generator": lambda: DataLoader(DATA, 3, shuffle=True, generator=torch.Generator().manual_seed(4)),
        "in order": lambda: DataLoader(DATA, batch_size=3),
        "distributed": lambda: DataLoader(DATA, 3, sampler=DistributedSampler(DATA, 2, 1, seed=1)),
        "weighted": lambda: DataLoader(DATA, 3, sampler=WeightedRandomSampler(torch.ones(20), 20)),
        "workers": lambda: DataLoader(DATA, 3, shuffle=True, num_workers=2),
    }


def epochs(loader: ResumableLoader, count: int, first: int = 0) -> list[Any]:
    seen = []
    for epoch in range(first, first + count):
        if not loader._resumes:
            loader.set_epoch(epoch)
        for (batch,) in loader:
            seen.append((batch.tolist(), torch.rand(1).item()))
    return seen


@pytest.mark.parametrize("kind", loaders())
def test_the_rest_of_the_epoch_and_the_next_ones_are_the_same_after_a_resume(kind: str) -> None:
    make = loaders()[kind]
    torch.manual_seed(1)
    straight = epochs(ResumableLoader(make()), 3)
    torch.manual_seed(1)
    first, seen = ResumableLoader(make()), []
    for (batch,) in first:
        seen.append((batch.tolist(), torch.rand(1).item()))
        if len(seen) == 2:
            break
    state, random = first.state_dict(), torch.get_rng_state()
    torch.manual_seed(99)
    second = ResumableLoader(make())
    second.load_state_dict(state)
    torch.set_rng_state(random)
    seen += epochs(second, 3)
    assert seen == straight


def test_skipped_batches_are_never_loaded() -> None:
    touched: list[int] = []

    class Slow(Dataset[int]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> int:
            touched.append(index)
            return index

    loader = ResumableLoader(DataLoader(Slow(), batch_size=3))
    iterator = iter(loader)
    next(iterator), next(iterator), next(iterator)
    again = ResumableLoader(DataLoader(Slow(), batch_size=3))
    again.load_state_dict(loader.state_dict())
    touched.clear()
    assert [batch.tolist() for batch in again] == [[9, 10, 11]]
    assert touched == [9, 10, 11]


def test_a_finished_epoch_starts_the_next_one_from_its_first_batch() -> None:
    loader = ResumableLoader(DataLoader(DATA, batch_size=5))
    assert len(list(loader)) == 4
    again = ResumableLoader(DataLoader(DATA, batch_size=5))
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == 4


def test_an_iterable_dataset_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(StateError, match="map-style"):
        ResumableLoader(DataLoader(Stream()))


class Stuck(Dataset[int]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        time.sleep(600 * index)
        return index


def test_a_stuck_worker_ends_when_its_epoch_is_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # torch's patience
    batches = iter(ResumableLoader(DataLoader(Stuck(), num_workers=1)))
    next(batches)
    (worker,) = multiprocessing.active_children()
    del batches
    worker.join(60)
    is_left = worker.is_alive()
    worker.kill()
    assert not is_left
