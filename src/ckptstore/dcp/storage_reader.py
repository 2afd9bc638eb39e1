"""A checkpoint as a ``StorageReader``, for people who call ``dcp.load`` themselves.

Every byte is verified, and comes from the nearest tier that has it whole. Nothing is unpickled from the store: values
that aren't tensors are decoded and handed to the planner in the form it expects.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptstore.dcp.boxes import Box, dtype_of
from ckptstore.dcp.filler import Filler
from ckptstore.dcp.parts import Slot
from ckptstore.dcp.source import ChunkSource
from ckptstore.errors import FormatError
from ckptstore.format import stock
from ckptstore.format.stock_items import named_leaves


class OpenSource(ChunkSource, Protocol):
    """A checkpoint that is kept from being deleted until it is closed."""

    def close(self) -> None:
        """Idempotent."""


#: Opens a save: the one asked for, or with a save_id that very one.
Opener = Callable[[str | None], OpenSource]


class CheckpointStorageReader(StorageReader):
    """Reads one checkpoint for ``dcp.load(state, storage_reader=...)``; made by ``CheckpointStore.reader``.

    Which checkpoint that is, every rank finds out for itself when the load begins; should ranks disagree (one lists the
    bucket a moment later), all read the coordinator's.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._source: OpenSource | None = None

    @property
    def source(self) -> OpenSource:
        """The open checkpoint."""
        if self._source is None:
            self._source = self._opener(None)
        return self._source

    @property
    def save_id(self) -> str:
        """The save being read."""
        return self.source.root.summary.save_id

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins: look anew which checkpoint is meant. ``checkpoint_id`` has no meaning here."""
        del checkpoint_id
        self._close()

    def __del__(self) -> None:
        self._close()  # a load may have ended before anything was read

    def _close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What stock planners need to know of the checkpoint."""
        del args, kwargs
        source = self.source
        if source.tree is None:
            raise FormatError("the checkpoint has no state tree")
        described: dict[str, Any] = {}
        paths: dict[str, Any] = {}
        items = stock.stock_items(source.tree)
        for leaf in named_leaves(source.tree):
            if leaf.tensor is not None:
                described[leaf.name] = self._describe(leaf.tensor)
            elif leaf.name in items:
                described[leaf.name] = BytesStorageMetadata()
            else:
                continue
            paths[leaf.name] = leaf.path
        return Metadata(state_dict_metadata=described, planner_data=paths, storage_data={})

    def _describe(self, name: str) -> TensorStorageMetadata:
        stored = self.source.aliases.get(name, name)
        meta = self.source.tensors[stored]
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype_of(meta.dtype), requires_grad=meta.requires_grad),
            size=torch.Size(meta.shape),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.shape))
                for _, _, piece in self.source.pieces(stored)
            ],
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Runs on the coordinator: every rank is told which save it has chosen."""
        return [replace(plan, storage_data=self.save_id) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for; blocks. Each stored chunk is read once, whatever the plan's items share.

        That ends the load: the checkpoint is closed.
        """
        try:
            return self._read(plan, planner)
        finally:
            self._close()

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if isinstance(plan.storage_data, str) and plan.storage_data != self.save_id:
            self._close()
            self._source = self._opener(plan.storage_data)
        names, items = self._names()
        slots: list[Slot] = []
        filled: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(items[name]))
                continue
            target = planner.resolve_tensor(item).detach()
            filled.append((item, target))
            slots.append(Slot(item.dest_index.fqn, names[name], _box(item, target, self._shape(names[name]))))
        filler = Filler(self.source, slots)
        filler.plan()
        filler.run(max(4, min(8, os.cpu_count() or 4)))
        for item, target in filled:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _names(self) -> tuple[dict[str, str], dict[str, bytes]]:
        """Stock name -> stored tensor, and the bytes of the values that aren't tensors."""
        tree = self.source.tree
        if tree is None:
            raise FormatError("the checkpoint has no state tree")
        tensors = {leaf.name: leaf.tensor for leaf in named_leaves(tree) if leaf.tensor is not None}
        aliases = self.source.aliases
        return {name: aliases.get(stored, stored) for name, stored in tensors.items()}, stock.stock_items(tree)

    def _shape(self, stored: str) -> Sequence[int]:
        return self.source.tensors[stored].shape

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by a path or URL: it is made by a store."""
        del checkpoint_id
        return False


def _box(item: ReadItem, target: torch.Tensor, global_shape: Sequence[int]) -> Box:
    first = item.storage_index.offset or (0,) * len(global_shape)
    offsets = tuple(a + b for a, b in zip(first, item.storage_offsets, strict=True))
    shape = tuple(item.lengths)
    if prod(shape) != target.numel():
        raise FormatError(f"the planner gave {target.numel()} elements of memory for {prod(shape)}")
    return Box(target.view(shape) if target.shape != shape else target, tuple(global_shape), offsets, shape)
