"""The ``.metadata`` file: DCP's index of a checkpoint, as a pickle written without importing DCP.

It holds ``torch.distributed.checkpoint.metadata.Metadata`` as ``FileSystemWriter`` and ``DefaultSavePlanner`` of torch
2.13 would leave it: what each name is, where each box of it lies, and the path of each name in the nested state. Two
things differ on purpose: ``storage_meta`` has no path (the directory can be restored elsewhere, byte for byte), and the
names come in the order of the state whatever the world size.

Source: ``torch/distributed/checkpoint/{metadata,filesystem,default_planner}.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ckptstore.errors import FormatError
from ckptstore.format.dtypes import dtype_of
from ckptstore.format.manifest import RootManifest, ShardManifest, TensorMeta
from ckptstore.format.pickling import Call, Global, PickleWriter, integer, integers
from ckptstore.format.stock_envelope import tensor_envelope
from ckptstore.format.stock_items import Path, named_leaves, stock_items
from ckptstore.format.stock_layout import layout, specs_of, tail

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA = Global(_MODULE, "Metadata")
_TENSOR = Global(_MODULE, "TensorStorageMetadata")
_PROPERTIES = Global(_MODULE, "TensorProperties")
_CHUNK = Global(_MODULE, "ChunkStorageMetadata")
_BYTES = Global(_MODULE, "BytesStorageMetadata")
_INDEX = Global(_MODULE, "MetadataIndex")
_STORAGE_META = Global(_MODULE, "StorageMeta")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
_DCP_VERSION = "1.0.0"

#: After a class: a new instance of it and its state begun; after the state's items: the state given to the instance.
_NEW, _BUILD = b")\x81}(", b"ub"
#: After a callable and a tuple: the callable called with that one argument.
_CALL = b"\x85R"


class _Place(NamedTuple):
    """A byte range of a shard file that is a ``torch.save`` archive."""

    file: str
    offset: int
    length: int


class _Box(NamedTuple):
    """A stored box of a tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: _Place


class _Entry(NamedTuple):
    """One name of the checkpoint: a tensor with its boxes, or a value with its place."""

    name: str
    path: Path
    tensor: TensorMeta | None
    boxes: tuple[_Box, ...]
    place: _Place | None


def metadata(root: RootManifest, shards: Sequence[ShardManifest]) -> bytes:
    """The bytes of ``.metadata`` for these shards, in any order.

    Raises:
        FormatError: rank 0's shard is not among them, or a tensor of the state has no piece in any.
    """
    ordered = sorted(shards, key=lambda shard: shard.rank)
    if not ordered or ordered[0].rank != 0:
        raise FormatError("the shard manifest of rank 0 is needed for .metadata")
    return _pickle(_entries(ordered), root.summary.save_id)


def _entries(shards: Sequence[ShardManifest]) -> list[_Entry]:
    """Every name that stock readers shall see, in the order of the state; by name where there is no tree."""
    first = shards[0]
    tensors = {name: tensor for shard in reversed(shards) for name, tensor in shard.tensors.items()}
    boxes = {name: _boxes(found, tensors[name]) for name, found in _boxes_by_name(shards).items()}

    def tensor_entry(name: str, path: Path, source: str) -> _Entry:
        stored = first.aliases.get(source, source)
        if not boxes.get(stored):
            raise FormatError(f"no shard has a piece of {stored!r}", fqn=stored)
        return _Entry(name, path, tensors[stored], boxes[stored], None)

    if first.tree is None:
        return [tensor_entry(name, (name,), name) for name in sorted({*boxes, *first.aliases})]
    places = _item_places(first)
    entries = []
    for leaf in named_leaves(first.tree):
        if leaf.tensor is not None:
            entries.append(tensor_entry(leaf.name, leaf.path, leaf.tensor))
        elif leaf.name in places:
            entries.append(_Entry(leaf.name, leaf.path, None, (), places[leaf.name]))
    return entries


def _boxes_by_name(shards: Iterable[ShardManifest]) -> dict[str, list[_Box]]:
    found: dict[str, list[_Box]] = {}
    for shard in shards:
        for spec, piece in zip(specs_of(shard), shard.pieces, strict=True):
            head, foot = tensor_envelope(spec.dtype, spec.shape)
            place = _Place(shard.file, piece.start - len(head), len(head) + piece.size_bytes + len(foot))
            found.setdefault(spec.fqn, []).append(_Box(piece.offsets, piece.shape, place))
    return found


def _boxes(found: list[_Box], tensor: TensorMeta) -> tuple[_Box, ...]:
    """Each box once (replicas kept per node are several), and none that holds nothing of a tensor that has elements.

    An empty box may share its offsets with a full one, and DCP finds boxes by their offsets.
    """
    kept: dict[tuple[int, ...], _Box] = {}
    for box in found:
        if prod(box.shape) or not prod(tensor.shape):
            kept.setdefault(box.offsets, box)
    return tuple(kept.values())


def _item_places(first: ShardManifest) -> dict[str, _Place]:
    items = stock_items(first.tree) if first.tree is not None else {}
    _, places = tail(items, layout(specs_of(first)).image_bytes)
    return {name: _Place(first.file, offset, length) for name, (offset, length) in places.items()}


def _pickle(entries: Sequence[_Entry], save_id: str) -> bytes:
    writer = PickleWriter()
    writer.instance(_METADATA)
    writer.op(b"}(")
    writer.text("state_dict_metadata")
    _push_state_dict_metadata(writer, entries)
    writer.text("planner_data")
    writer.value({entry.name: entry.path for entry in entries})
    writer.text("storage_data")
    _push_storage_data(writer, entries)
    writer.text("storage_meta")
    _push(writer, _STORAGE_META, {"checkpoint_id": None, "save_id": save_id, "load_id": None, "modules": []})
    writer.text("version")
    writer.text(_DCP_VERSION)
    writer.op(b"ub")
    return writer.finish()


def _push(writer: PickleWriter, cls: Global, state: Mapping[str, Any] | tuple[Any, ...]) -> None:
    """Push an instance with this state."""
    writer.instance(cls)
    writer.value(state)
    writer.op(b"b")


def _push_state_dict_metadata(writer: PickleWriter, entries: Iterable[_Entry]) -> None:
    size = writer.fetch(_SIZE)
    chunk = writer.fetch(_CHUNK) + _NEW + writer.fetch("offsets") + size
    sizes = _CALL + writer.fetch("sizes") + size
    writer.op(b"}(")
    for entry in entries:
        writer.text(entry.name)
        if entry.tensor is None:
            _push(writer, _BYTES, {})
            continue
        dtype = Global("torch", dtype_of(entry.tensor.dtype).stock_dtype)
        writer.instance(_TENSOR)
        writer.op(b"}(")
        writer.text("properties")
        _push(writer, _PROPERTIES, (dtype, _STRIDED, entry.tensor.requires_grad, _CONTIGUOUS, False))
        writer.text("size")
        writer.value(Call(_SIZE, (entry.tensor.shape,)))
        writer.text("chunks")
        writer.op(b"](")
        for box in entry.boxes:
            writer.op(chunk + integers(box.offsets) + sizes + integers(box.shape) + _CALL + _BUILD)
        writer.op(b"eub")
    writer.op(b"u")


def _push_storage_data(writer: PickleWriter, entries: Iterable[_Entry]) -> None:
    new = writer.fetch(_INDEX) + _NEW + writer.fetch("fqn")
    hint = writer.fetch("index")
    offset = writer.fetch("offset") + writer.fetch(_SIZE)
    writer.op(b"}(")
    for entry in entries:
        start = new + writer.fetch(entry.name) + hint
        if entry.place is not None:
            writer.op(start + b"N" + _BUILD)
            _push_place(writer, entry.place)
        for index, box in enumerate(entry.boxes):
            writer.op(start + integer(index) + offset + integers(box.offsets) + _CALL + _BUILD)
            _push_place(writer, box.place)
    writer.op(b"u")


def _push_place(writer: PickleWriter, place: _Place) -> None:
    fetch = writer.fetch
    start = fetch(_INFO) + _NEW + fetch("relative_path") + fetch(place.file)
    writer.op(start + fetch("offset") + integer(place.offset) + fetch("length") + integer(place.length) + _BUILD)
