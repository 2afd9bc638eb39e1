"""A DataLoader that remembers its place in the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset

from ckptstore.errors import StateError
from ckptstore.manager.workers import outlive_signals


class ResumableLoader:
    """Iterates like the loader it is given, and goes on in mid-epoch after a resume, with the batches not yet seen.

    Skipped batches are never loaded: only the sampler runs through them. Shuffling is the same as in the uninterrupted
    run, with a ``generator=`` of the loader's own, with torch's global one, and with DistributedSampler. Batches that
    workers had prefetched count as not seen. Random transforms *inside worker processes* are seeded anew at the resumed
    batch. Workers are started for each epoch; signals to the whole job leave them alone, so that the trainer decides.

    Track it: ``loader = ResumableLoader(DataLoader(...)); manager.track(dataloader=loader)``.

    Raises:
        StateError: the loader has no sampler to run through (an IterableDataset).
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise StateError(
                "ResumableLoader needs a map-style dataset with batches",
                hint="for an IterableDataset use torchdata's StatefulDataLoader, which has state of its own",
            )
        self.loader = loader
        self._seen = 0
        self._begun: dict[str, Any] | None = None
        self._resumes = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        skip, self._resumes = (self._seen if self._resumes else 0), False
        if skip and self._begun is not None:
            order, seed = self._as_begun(self._begun)
        else:
            self._begun, skip = self._randomness(), 0
            order, seed = self._order()
        self._seen = skip
        loader = _loader_like(self.loader, islice(order, skip, None), seed + skip)
        batches = iter(loader)  # with a name it outlives what comes finally: torch ends its workers when it goes
        try:
            for batch in batches:
                self._seen += 1
                yield batch
        finally:
            if isinstance(loader.worker_init_fn, outlive_signals):
                loader.worker_init_fn.let_go()
        self._begun, self._seen = None, 0

    @property
    def sampler(self) -> Any:
        """The loader's own; libraries look here for a ``set_epoch``."""
        return self.loader.sampler

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, where it wants to know (DistributedSampler)."""
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Place in the epoch: batches handed out, the random state its order came from, and the loader's own now."""
        own = [generator.get_state() for generator in self._generators()[1:]]
        return {"seen": self._seen, "begun": self._begun, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next ``iter()``."""
        self._seen, self._begun = int(state["seen"]), state["begun"]
        for generator, own in zip(self._generators()[1:], state["own"], strict=True):
            generator.set_state(own)
        self._resumes = self._seen > 0

    # -- the order of an epoch ------------------------------------------------------------------------------------

    def _order(self) -> tuple[Iterator[list[Any]], int]:
        """This epoch's batches of indices, drawn from the generators as they are now, and the workers' seed."""
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator).item())
        batches = iter(self.loader.batch_sampler or ())
        first = next(batches, None)  # samplers draw their order at the first batch
        return chain([] if first is None else [first], batches), seed % (1 << 62)

    def _as_begun(self, begun: dict[str, Any]) -> tuple[Iterator[list[Any]], int]:
        """The same as it was when the epoch began; the generators stay where they are now."""
        if begun["epoch"] is not None:
            self.set_epoch(begun["epoch"])
        generators = self._generators()
        now = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, begun["generators"], strict=True):
            generator.set_state(state)
        try:
            return self._order()
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)

    def _randomness(self) -> dict[str, Any]:
        return {
            "generators": [generator.get_state() for generator in self._generators()],
            "epoch": getattr(self.loader.sampler, "epoch", None),
        }

    def _generators(self) -> list[torch.Generator]:
        """Every generator an order may be drawn from."""
        own = (self.loader.generator, getattr(self.loader.sampler, "generator", None))
        return [torch.default_generator, *dict.fromkeys(each for each in own if each is not None)]


def _loader_like(loader: DataLoader[Any], batches: Iterator[list[Any]], seed: int) -> DataLoader[Any]:
    """A loader for these batches; what it draws itself comes from a generator of its own."""
    return DataLoader(
        loader.dataset,
        batch_sampler=cast(Any, batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=outlive_signals(loader.worker_init_fn) if loader.num_workers else None,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=loader.prefetch_factor,
    )
