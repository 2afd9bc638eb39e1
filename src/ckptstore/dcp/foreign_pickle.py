"""DCP's ``.metadata`` without running it: a pickle whose every class is a lifeless stand-in.

Unpickling runs what the file names, so nothing it names is looked up: the few classes that such a file consists of are
played by objects that only keep what they are given, made anew for each file, and any other name is refused. What
comes out is data, which is then checked like any other.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

from ckptstore.errors import FormatError
from ckptstore.format.dtypes import DTYPES

#: Larger ones are refused before they are read.
MAX_METADATA_BYTES = 1 << 30

_CLASSES = frozenset(
    {
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.PosixPath",
        "pathlib.WindowsPath",
    }
)


@dataclass(frozen=True)
class Stored:
    """Where one item lies: ``length`` bytes at ``offset`` of ``file``; for a tensor the box it holds."""

    file: str
    offset: int
    length: int
    offsets: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Item:
    """One flat name.

    Attributes:
        path: keys of mappings as str, positions in lists as int.
        dtype: torch's name without ``torch.``; None: a value that is no tensor.
    """

    name: str
    path: tuple[str | int, ...]
    dtype: str | None
    shape: tuple[int, ...]
    stored: tuple[Stored, ...]


def read_metadata(data: bytes) -> list[Item]:
    """The items that a ``.metadata`` describes, checked for shape and bounds.

    Raises:
        FormatError: it is no such file, or names anything else than such a file consists of.
    """
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        return _items(metadata)
    except FormatError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise FormatError(f".metadata is damaged: {type(error).__name__}: {error}") from None


class _Inert:
    """Keeps what it is given."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        """A field of the dataclass this stands for."""
        state = self.__dict__.get("state")
        return state.get(field) if isinstance(state, dict) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "torch.Size":
            return _size
        if module == "torch" and name in DTYPES:
            return name
        if full not in _CLASSES:
            raise FormatError(
                f".metadata names {full!r}, which no checkpoint of torch.distributed.checkpoint does",
                hint="if you trust its origin, convert it with torch.distributed.checkpoint.format_utils first",
            )
        if full not in self._made:
            self._made[full] = type(name, (_Inert,), {})
        return self._made[full]

    def persistent_load(self, pid: Any) -> Any:
        raise FormatError(".metadata refers to something outside itself")


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise FormatError(f".metadata is damaged: {values!r:.80} is not a shape")
    return values


def _items(metadata: Any) -> list[Item]:
    described, paths = metadata.get("state_dict_metadata"), metadata.get("planner_data")
    places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    for index, info in metadata.get("storage_data").items():
        if info.get("transform_descriptors"):
            raise FormatError("the items of this checkpoint are transformed (compressed), which is not supported")
        offset = index.get("offset")
        start, length = _numbers((info.get("offset"), info.get("length")))
        place = str(info.get("relative_path")), start, length
        places[str(index.get("fqn")), None if offset is None else _numbers(offset)] = place
    items = []
    for name, meta in described.items():
        path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        if not isinstance(name, str) or not all(type(key) in (str, int) for key in path):
            raise FormatError(f".metadata is damaged: {name!r:.80} is not a name")
        if type(meta).__name__ == "BytesStorageMetadata":
            items.append(Item(name, tuple(path), None, (), (Stored(*places[name, None]),)))
            continue
        dtype, shape = meta.get("properties").state[0], _numbers(meta.get("size"))
        if dtype not in DTYPES:
            raise FormatError(f"{name!r} has the dtype {dtype!r:.40}, which can't be stored", key=name)
        boxes = []
        for chunk in meta.get("chunks"):
            offsets, extent = _numbers(chunk.get("offsets")), _numbers(chunk.get("sizes"))
            if len(offsets) != len(shape) or any(o + n > s for o, n, s in zip(offsets, extent, shape, strict=True)):
                raise FormatError(f".metadata is damaged: a box of {name!r} leaves the tensor", key=name)
            boxes.append(Stored(*places[name, offsets], offsets, extent))
        items.append(Item(name, tuple(path), dtype, shape, tuple(boxes)))
    return items
