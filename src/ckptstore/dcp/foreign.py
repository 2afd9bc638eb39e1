"""States of stock PyTorch: a DCP directory or a ``torch.save`` file as a ForeignState, and a checkpoint as such a file.

What runs code when it is read is refused unless the caller trusts it: ``.metadata`` is read by a reader of our own
(:mod:`ckptstore.dcp.foreign_pickle`), tensors and values with ``weights_only=True``.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptstore.dcp import torch_types as _torch_types  # noqa: F401  # registers torch's small types
from ckptstore.dcp.binder import bind
from ckptstore.dcp.boxes import Box, copyable, dtype_name, dtype_of, plain
from ckptstore.dcp.filler import Filler
from ckptstore.dcp.foreign_pickle import MAX_METADATA_BYTES, Item, Stored, read_metadata
from ckptstore.dcp.parts import Slot
from ckptstore.dcp.reading import read_state
from ckptstore.dcp.source import ChunkSource
from ckptstore.errors import ConfigError, FormatError, IncompleteCheckpointError, NotFoundError, StateError
from ckptstore.format import tree
from ckptstore.format.dtypes import itemsize
from ckptstore.format.foreign import ForeignState, ForeignTensor
from ckptstore.format.names import fqn

METADATA = ".metadata"
_TRUST = "--trust-pickle reads it all the same, and runs whatever code it holds"


@contextmanager
def open_dcp(path: Path, *, trust_pickle: bool = False) -> Iterator[ForeignState]:
    """A directory written by ``torch.distributed.checkpoint``; tensors are read one piece at a time.

    Args:
        path: the directory.
        trust_pickle: unpickle values that ``weights_only=True`` refuses.

    Raises:
        NotFoundError: no ``.metadata`` there.
        FormatError: damaged, or not of the kind it claims to be.
        ConfigError: values that can't be read without running code; names them.
    """
    try:
        if (path / METADATA).stat().st_size > MAX_METADATA_BYTES:
            raise FormatError(f"{path / METADATA} is too large to be one", path=str(path))
        items = read_metadata((path / METADATA).read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{path} holds no {METADATA}: it is no DCP checkpoint", path=str(path)) from None
    with ExitStack() as stack:
        # Names are looked up among what is there, never joined to a path.
        files = {entry.name: entry.path for entry in os.scandir(path) if entry.is_file()}
        fds: dict[str, int] = {}

        def read(stored: Stored, *, weights_only: bool = True) -> Any:
            if stored.file not in files:
                raise FormatError(f"{path / METADATA} names {stored.file!r}, which is not there", path=str(path))
            if stored.file not in fds:
                fds[stored.file] = os.open(files[stored.file], os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fds[stored.file])
            part = io.BufferedReader(_Part(fds[stored.file], stored.offset, stored.length))
            return torch.load(part, map_location="cpu", weights_only=weights_only)

        tensors = [
            ForeignTensor(item.name, item.dtype, item.shape, partial(_read_boxes, item, read))
            for item in items
            if item.dtype is not None
        ]
        nested, refused = _Nested(), []
        for item in items:
            value: Any = tree.TensorRef(item.name)
            if item.dtype is None:
                try:
                    value = read(item.stored[0])
                except pickle.UnpicklingError:
                    if not trust_pickle:
                        refused.append(item.name)
                        continue
                    value = read(item.stored[0], weights_only=False)
            nested.put(item.path, value)
        if refused:
            raise ConfigError(
                f"these values can't be read without running code from {path}: {', '.join(refused[:20])}", hint=_TRUST
            )
        collected = _Tensors({item.name for item in items})
        encoded = tree.encode(nested.value(), collected.leaf)
        yield ForeignState([*tensors, *collected.tensors], encoded, collected.aliases)


@contextmanager
def open_torch_file(path: Path, *, trust_pickle: bool = False) -> Iterator[ForeignState]:
    """A ``torch.save`` file, mapped rather than read where torch can do that.

    Raises:
        ConfigError: ``trust_pickle`` is not given.
        FormatError: torch can't read it.
        StateError: it holds something that can't be stored; names the key.
    """
    if not trust_pickle:
        raise ConfigError(f"{path} is a pickle, which can run code when it is read", hint=_TRUST)
    value: Any = None
    for weights_only, mapped in ((True, True), (True, False), (False, True), (False, False)):
        try:
            value = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mapped)
            break
        except FileNotFoundError:
            raise NotFoundError(f"there is no {path}", path=str(path)) from None
        except Exception as error:  # whatever its pickles raise
            failure = error
    else:
        raise FormatError(f"torch can't read {path}: {failure}", path=str(path))
    binding = bind(value if isinstance(value, dict) else {"state": value})
    tensors = [
        ForeignTensor(bound.name, bound.dtype, bound.shape, partial(_copy_out, local))
        for bound, local in zip(binding.tensors, binding.locals, strict=True)
    ]
    yield ForeignState(tensors, binding.tree, binding.aliases)


def save_torch_file(
    source: ChunkSource, path: Path, chosen: Sequence[tuple[str, str, str]] | None = None, *, threads: int = 4
) -> None:
    """Write a checkpoint as one ``torch.save`` file that ``torch.load(weights_only=True)`` reads where it can.

    The tensors are gathered in a file beside ``path`` rather than in memory, and vanish with it.

    Args:
        source: the checkpoint.
        path: must not exist.
        chosen: (name, stored tensor, dtype) of what goes into a flat dict; None: the whole state, nested as it was.

    Raises:
        StateError: a dtype that ``torch.save`` lacks (integers of less than 8 bits); names a tensor of it.
    """
    names = {meta.dtype: name for name, meta in source.tensors.items()}
    _check_dtypes(names if chosen is None else {dtype: name for name, _, dtype in chosen})
    sizes = [prod(meta.shape) * itemsize(meta.dtype) for meta in source.tensors.values()]
    if chosen is not None:
        sizes = [prod(source.tensors[stored].shape) * itemsize(dtype) for _, stored, dtype in chosen]
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        memory = _Memory(scratch.fileno(), sum(size + 64 for size in sizes))
        if chosen is None:
            state: Any = read_state(source, threads=threads, allocate=memory.tensor)
        else:
            state = {}
            slots = []
            for name, stored, dtype in chosen:
                shape = source.tensors[stored].shape
                state[name] = memory.tensor(shape, dtype_of(dtype))
                slots.append(Slot(name, stored, Box(state[name], shape, (0,) * len(shape), shape)))
            filler = Filler(source, slots)
            filler.plan()
            filler.run(threads)
        with path.open("xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def _check_dtypes(names: Mapping[str, str]) -> None:
    for dtype, name in names.items():
        try:
            torch.save(torch.empty(0, dtype=dtype_of(dtype), device="cpu"), io.BytesIO())
        except KeyError:
            raise StateError(
                f"{name!r} is {dtype}, which torch.save can't write",
                hint="leave it out with --only, or export a DCP directory",
                key=name,
            ) from None


class _Memory:
    """Tensors in a mapped file, each with a storage of its own."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._at = 0
        if size_bytes:
            os.posix_fallocate(fd, 0, size_bytes)
            self._bytes = np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)  # unmapped with the last tensor in it

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        part = self._bytes[self._at : self._at + size]
        self._at += -(-size // 64) * 64
        return torch.from_numpy(part).view(dtype).view(shape)


class _Part(io.RawIOBase):
    """A stretch of a file as a file; torch looks for the archive at its end."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self._length, self._at = fd, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = os.preadv(self._fd, [view[: max(0, self._length - self._at)]], self._start + self._at)
        self._at += count
        return count


def _read_boxes(item: Item, read: Any, out: memoryview) -> None:
    """Every stored box of a tensor into its row-major bytes."""
    assert item.dtype is not None
    dtype = dtype_of(item.dtype)
    whole = torch.from_numpy(np.frombuffer(out, np.uint8)).view(dtype).view(item.shape)
    covered = 0
    for stored in item.stored:
        try:
            part = read(stored)
        except FormatError:
            raise
        except Exception as error:  # whatever torch makes of damaged bytes
            raise FormatError(f"{item.name!r} is damaged: {error}", key=item.name) from None
        if not isinstance(part, torch.Tensor) or part.dtype != dtype or tuple(part.shape) != stored.shape:
            raise FormatError(f"{item.name!r} is not stored as .metadata says", key=item.name)
        place = whole[tuple(slice(o, o + n) for o, n in zip(stored.offsets, stored.shape, strict=True))]
        copyable(place).copy_(copyable(part))
        covered += part.numel()
    if covered != whole.numel():
        raise IncompleteCheckpointError(
            f"the stored boxes of {item.name!r} hold {covered} of its {whole.numel()} elements", key=item.name
        )


class _Nested:
    """Flat items put back into mappings and lists."""

    def __init__(self) -> None:
        self._root: dict[str | int, Any] = {}

    def put(self, path: tuple[str | int, ...], value: Any) -> None:
        below = self._root
        for key in path[:-1]:
            below = below.setdefault(key, _Level())
            if not isinstance(below, _Level):
                raise FormatError(f"{'.'.join(map(str, path))!r} lies below a value")
        below[path[-1]] = value

    def value(self) -> dict[Any, Any]:
        return {key: _plain(value) for key, value in self._root.items()}


class _Level(dict[Any, Any]):
    """A container being filled: a list if its keys are positions."""


def _plain(value: Any) -> Any:
    if not isinstance(value, _Level):
        return value
    if value and all(type(key) is int for key in value):
        return [_plain(value[key]) for key in sorted(value)]
    return {key: _plain(below) for key, below in value.items()}


class _Tensors:
    """Collects the tensors inside values; those that share memory are tied."""

    def __init__(self, taken: set[str]) -> None:
        self.tensors: list[ForeignTensor] = []
        self.aliases: dict[str, str] = {}
        self._taken = taken
        self._known: dict[object, str] = {}

    def leaf(self, path: tuple[Any, ...], value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        key = ".".join(map(str, path))
        value = plain(key, value.detach())
        name = fqn(path, self._taken)
        self._taken.add(name)
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        first = self._known.setdefault(memory, name)
        if first != name:
            self.aliases[name] = first
        else:
            shape = tuple(value.shape)
            self.tensors.append(ForeignTensor(name, dtype_name(value.dtype), shape, partial(_copy_out, value)))
        return tree.TensorRef(name)


def _copy_out(tensor: torch.Tensor, out: memoryview) -> None:
    tensor = tensor.detach()
    target = torch.from_numpy(np.frombuffer(out, np.uint8)).view(tensor.dtype).view(tensor.shape)
    copyable(target).copy_(copyable(tensor))
