"""One checkpoint: where its time went, what it holds, and what of it was new when it was uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptstore.dashboard.source import RunView
from ckptstore.errors import CheckpointNotFoundError, CkptError
from ckptstore.format.manifest import Json, RemoteShard
from ckptstore.ops.open import RunTiers
from ckptstore.ops.provenance import kind_of
from ckptstore.repo.reader import CheckpointReader
from ckptstore.repo.record import Record

#: A tensor takes part in the treemap if it is among the largest so many; the others are one box.
MAX_BOXES = 1500
#: A name is cut into at most so many folders.
MAX_FOLDERS = 32
#: Steps of a rank's save, in the order they happen.
RANK_STAGES = ("reserve", "plan", "copy", "hand_over")
NODE_STAGES = ("queued", "write", "fsync", "commit")


@dataclass(frozen=True)
class Bar:
    """One span of the waterfall, in seconds after the save began."""

    row: str
    stage: str
    start_s: float
    length_s: float


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; ``sent`` says how it came to the remote: "unchanged", "derived", "delta", "full", "mixed"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    stored_bytes: int | None = None
    sent: str | None = None


def waterfall(notes: Mapping[str, Any]) -> list[Bar]:
    """Bars of what the notes tell. Ranks go side by side; the node writes when the last has copied."""
    bars: list[Bar] = []
    sealed = 0.0
    ranks = notes.get("ranks")
    for rank, spans in sorted((ranks if isinstance(ranks, dict) else {}).items(), key=lambda item: _rank(item[0])):
        if not isinstance(spans, dict):
            continue
        at = 0.0
        known = [name for name in RANK_STAGES if name in spans]
        for name in (*known, *(name for name in spans if name not in RANK_STAGES)):
            length = _seconds(spans[name])
            if length is not None:
                bars.append(Bar(f"rank {rank}", name, at, length))
                at += length
        sealed = max(sealed, at)
    at = sealed
    for name in NODE_STAGES:
        length = _seconds(notes.get(name))
        if length is not None:
            if name == "write":  # fsync is a part of it
                length = max(0.0, length - (_seconds(notes.get("fsync")) or 0.0))
            bars.append(Bar("node", name, at, length))
            at += length
    for name, spans in notes.items():
        lag = _seconds(spans.get("lag")) if name.startswith("remote ") and isinstance(spans, dict) else None
        if lag is not None:
            row, left = name.removeprefix("remote "), max(0.0, lag - at)
            encode = min(_seconds(spans.get("encode_seconds")) or 0.0, left)
            if encode:
                bars.append(Bar(row, "encode", at, encode))
            bars.append(Bar(row, "upload", at + encode, left - encode))
    return bars


def _rank(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (1 << 30, text)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        return None
    return float(value)


def tensors(tiers: RunTiers, record: Record) -> tuple[list[Tensor], str | None]:
    """Every tensor of a checkpoint, largest first, and why it can't be told how they were sent.

    Raises:
        CkptError: no tier's manifests can be read.
    """
    with CheckpointReader(record, tiers.local, tiers.remotes) as reader:
        sizes = {name: sum(p.size_bytes for _, _, p in reader.pieces(name)) for name in reader.tensors}
        metas = dict(reader.tensors)
    sent: dict[str, _Sent] = {}
    trouble: str | None = None
    for remote in tiers.remotes:
        if remote.name not in record.remote:
            continue
        try:
            root = remote.root_manifest(record.remote[remote.name])
            for ref in root.shards:
                _count(remote.cached_shard(record.save_id, ref), record.save_id, sent)
            trouble = None
            break
        except CkptError as error:
            sent, trouble = {}, error.message
    found = [
        Tensor(
            name,
            metas[name].dtype,
            metas[name].shape,
            size,
            sent[name].stored_bytes if name in sent else None,
            sent[name].word if name in sent else None,
        )
        for name, size in sizes.items()
    ]
    found.sort(key=lambda tensor: (-tensor.size_bytes, tensor.name))
    return found, trouble


@dataclass
class _Sent:
    """How the chunks of one tensor are kept, and the bytes this save added for them."""

    kinds: set[str] = field(default_factory=set)
    stored_bytes: int = 0

    @property
    def word(self) -> str:
        return "mixed" if len(self.kinds) > 1 else next(iter(self.kinds), "unchanged")


def _count(document: RemoteShard, save_id: str, sent: dict[str, _Sent]) -> None:
    """Add up a shard's chunks by tensor."""
    own = [pack.startswith(f"packs/{save_id}/") for pack in document.packs]
    counted: set[int] = set()
    for piece, indexes in zip(document.shard.pieces, document.chunks, strict=True):
        row = sent.setdefault(piece.fqn, _Sent())
        for index in indexes:
            frame = document.frames[index]
            is_ours = own[frame.pack]
            row.kinds.add(kind_of(frame.codec) if is_ours else "unchanged")
            if is_ours and index not in counted:
                counted.add(index)
                row.stored_bytes += frame.length


@dataclass
class _Box:
    """A part of a dotted name; a tensor has no children."""

    label: str
    size_bytes: int = 0
    kind: str = ""
    children: dict[str, _Box] = field(default_factory=dict)


def treemap(found: list[Tensor]) -> dict[str, list[Any]]:
    """Boxes for a treemap over the dotted names: parents before children, the smallest tensors as one box.

    A folder with one thing in it is that thing; a folder is of a kind if all in it is.
    """
    root = _Box("all")
    for tensor in found[:MAX_BOXES]:
        parent = root
        *folders, last = tensor.name.split(".", MAX_FOLDERS)
        for folder in folders:
            # A folder's key can't be a tensor's, which may have the same name.
            parent = parent.children.setdefault(f"+{folder}", _Box(folder))
        parent.children[f"={last}"] = _Box(last, tensor.size_bytes, tensor.sent or "stored")
    rest = found[MAX_BOXES:]
    if rest:
        root.children["rest"] = _Box(f"{len(rest)} smaller tensors", sum(t.size_bytes for t in rest), "stored")
    for key, child in root.children.items():
        root.children[key] = _gathered(child)
    root.size_bytes = sum(child.size_bytes for child in root.children.values())
    boxes: dict[str, list[Any]] = {"id": [], "parent": [], "label": [], "value": [], "kind": []}
    stack = [("0", "", root)]
    while stack:
        name, parent_name, box = stack.pop()
        row = (name, parent_name, box.label, box.size_bytes, box.kind)
        for column, value in zip(boxes.values(), row, strict=True):
            column.append(value)
        stack += [(f"{name}.{i}", name, child) for i, child in enumerate(box.children.values())]
    return boxes


def _gathered(box: _Box) -> _Box:
    """Sizes and kinds added up, lonely folders joined with what is in them."""
    if not box.children:
        return box
    children = {key: _gathered(child) for key, child in box.children.items()}
    if len(children) == 1:
        (child,) = children.values()
        return replace(child, label=f"{box.label}.{child.label}")
    kinds = {child.kind for child in children.values()}
    size = sum(child.size_bytes for child in children.values())
    return _Box(box.label, size, kinds.pop() if len(kinds) == 1 else "", children)


def find(view: RunView, save_id: str) -> Record:
    """The save of this id.

    Raises:
        CheckpointNotFoundError: the run has none.
    """
    record = view.by_id.get(save_id)
    if record is None:
        raise CheckpointNotFoundError(
            f"run {view.run!r} has no checkpoint {save_id}", run=view.run, hint="it may have been deleted meanwhile"
        )
    return record


def state_tree(tiers: RunTiers, record: Record) -> Json | None:
    """The encoded state tree of a checkpoint.

    Raises:
        CkptError: its manifests can't be read.
    """
    with CheckpointReader(record, tiers.local, tiers.remotes) as reader:
        return reader.tree
