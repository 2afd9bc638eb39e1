"""`export`: a checkpoint as files that other tools read, streaming, without torch: safetensors, or a DCP directory.

The output appears under its name when it is whole and durable, never before; nothing that exists is overwritten.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ckptstore.clock import new_nonce
from ckptstore.errors import CheckpointExistsError, CkptError, ConfigError, LoadMismatchError
from ckptstore.format import stock, tree
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import Json, Piece, ShardManifest, TensorMeta, root_of
from ckptstore.ops import safetensors
from ckptstore.ops.numbers import FLOATS, check_dtype
from ckptstore.ops.open import RunTiers
from ckptstore.ops.regions import Region, allocate, fill
from ckptstore.repo import durable, names
from ckptstore.repo.catalog import Record
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.progress import Meter, ProgressCallback
from ckptstore.repo.reader import CheckpointReader
from ckptstore.types import StepLike

#: A directory of safetensors files is cut into files of at most this size, as Hugging Face does.
SHARD_BYTES = 5_000_000_000
#: Key of the metadata under which a safetensors file keeps the values that are no tensors, for our own import.
STATE_KEY = "ckptstore.state"


@dataclass(frozen=True)
class Selection:
    """What to export, and under which names.

    Attributes:
        only: Globs of stored names; empty: everything.
        strip_prefix: Taken off names that begin with it.
        rename: Prefix -> prefix, after that.
        dtype: Floating-point tensors are converted to this one; None: left as they are.
    """

    only: tuple[str, ...] = ()
    strip_prefix: str = ""
    rename: Mapping[str, str] | None = None
    dtype: str | None = None

    @property
    def is_everything(self) -> bool:
        """Whether the export is the whole state as it is."""
        return not (self.only or self.strip_prefix or self.rename or self.dtype)

    def choose(self, reader: CheckpointReader) -> list[Chosen]:
        """The tensors, in stored order, aliases too.

        Raises:
            LoadMismatchError: nothing matches.
            ConfigError: two tensors would get one name, or the dtype is none to convert to.
        """
        wanted = check_dtype(self.dtype) if self.dtype is not None else None
        chosen: dict[str, Chosen] = {}
        for stored in (*reader.tensors, *reader.aliases):
            if self.only and not any(fnmatch.fnmatchcase(stored, glob) for glob in self.only):
                continue
            source = reader.aliases.get(stored, stored)
            meta = reader.tensors[source]
            name = self._rename(stored)
            if name in chosen:
                raise ConfigError(f"{stored!r} and {chosen[name].stored!r} would both be named {name!r}")
            dtype = wanted if wanted is not None and meta.dtype in FLOATS else meta.dtype
            chosen[name] = Chosen(name, stored, source, dtype, meta.shape)
        if not chosen and self.only:
            raise LoadMismatchError(
                f"nothing in the checkpoint matches {', '.join(self.only)}", hint="ckptctl show STEP lists the names"
            )
        return list(chosen.values())

    def _rename(self, name: str) -> str:
        name = name.removeprefix(self.strip_prefix)
        for old, new in sorted((self.rename or {}).items(), key=lambda pair: -len(pair[0])):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


@dataclass(frozen=True)
class Chosen:
    """One tensor to export; ``source`` is the stored name whose bytes it has."""

    name: str
    stored: str
    source: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        leaves_out: the ranks have values of their own, which were not written.
    """

    path: Path
    files: tuple[Path, ...]
    num_tensors: int
    size_bytes: int
    record: Record
    leaves_out: bool


def export_safetensors(
    tiers: RunTiers,
    step: StepLike,
    path: Path,
    selection: Selection,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: ProgressCallback | None = None,
) -> Exported:
    """One file if ``path`` ends in ``.safetensors``, else a directory of files of ``shard_bytes`` with an index.

    Tied tensors are written under each of their names. Values that aren't tensors go along as metadata that our own
    import reads, if the whole state is exported as it is.

    Raises:
        CheckpointExistsError: ``path`` exists.
        StateError: a dtype that the format lacks.
        CheckpointNotFoundError, IntegrityError, TransientError, StorageError: as for reading.
    """
    with _opened(tiers, step) as (record, reader):
        chosen = selection.choose(reader)
        is_file = path.suffix == ".safetensors"
        groups = [chosen] if is_file else _groups(chosen, shard_bytes)
        state = _state_text(reader) if selection.is_everything else None
        about = {"format": "pt", **({STATE_KEY: state} if state is not None and len(groups) == 1 else {})}
        meter = Meter(sum(_stored_bytes(reader, c) for c in chosen), progress)
        with published(path, is_directory=not is_file) as scratch:
            files = [scratch] if is_file else [scratch / name for name in _file_names(len(groups))]
            for file, group in zip(files, groups, strict=True):
                head, starts = safetensors.header([(c.name, c.dtype, c.shape) for c in group], about)
                regions = [Region(c.source, start, c.dtype) for c, start in zip(group, starts, strict=True)]
                with _new_file(file, len(head) + sum(c.size_bytes for c in group)) as fd:
                    durable.write_all(fd, head)
                    fill(fd, reader, regions, meter)
            if len(groups) > 1:
                weight_map = {c.name: file.name for file, group in zip(files, groups, strict=True) for c in group}
                totals: dict[str, object] = {"total_size": sum(c.size_bytes for c in chosen)}
                if state is not None:
                    totals[STATE_KEY] = state
                index = json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2).encode()
                durable.write_new(scratch / "model.safetensors.index.json", index)
        meter.add(stage="done")
    return _result(path, record, reader, chosen)


def export_dcp(
    tiers: RunTiers, step: StepLike, path: Path, selection: Selection, *, progress: ProgressCallback | None = None
) -> Exported:
    """A directory that stock ``torch.distributed.checkpoint`` loads: one data file and ``.metadata``.

    Whole states keep their nesting and all values that stock PyTorch can hold; a selection is a flat state of tensors.

    Raises:
        As :func:`export_safetensors`.
    """
    with _opened(tiers, step) as (record, reader):
        chosen = selection.choose(reader)
        first: dict[tuple[str, str], Chosen] = {}
        for one in chosen:
            first.setdefault((one.source, one.dtype), one)
        stored = list(first.values())
        aliases = {c.name: first[c.source, c.dtype].name for c in chosen if first[c.source, c.dtype] is not c}
        state = reader.tree if selection.is_everything else None
        if state is None:
            state = tree.encode({c.name: tree.TensorRef(c.name) for c in chosen})
        shard, skeleton = _stock_shard(reader, stored, aliases, state)
        meter = Meter(sum(piece.size_bytes for piece in shard.pieces), progress)
        with published(path, is_directory=True) as scratch:
            with _new_file(scratch / shard.file, shard.file_bytes) as fd:
                for offset, data in skeleton:
                    os.pwrite(fd, data, offset)
                places = zip(stored, shard.pieces, strict=True)
                fill(fd, reader, [Region(c.source, piece.start, c.dtype) for c, piece in places], meter)
            durable.write_new(scratch / names.STOCK_METADATA, stock.metadata(root_of([shard]), [shard]))
        meter.add(stage="done")
    return _result(path, record, reader, chosen)


def _stock_shard(
    reader: CheckpointReader, stored: Sequence[Chosen], aliases: dict[str, str], state: Json
) -> tuple[ShardManifest, Iterator[tuple[int, bytes]]]:
    """The state as if one rank had saved it, and every byte of its file that is no payload."""
    summary = reader.root.summary.model_copy(update={"world_size": 1, "num_nodes": 1})
    specs = [
        stock.PieceSpec(c.name, c.dtype, c.shape, (0,) * len(c.shape), c.shape, reader.tensors[c.source].requires_grad)
        for c in stored
    ]
    image = stock.layout(specs)
    appended, _ = stock.tail(stock.stock_items(state), image.image_bytes)
    shard = ShardManifest(
        save_id=summary.save_id,
        step=summary.step,
        rank=0,
        world_size=1,
        file=names.shard_file(0),
        file_bytes=image.image_bytes + len(appended),
        chunk_elements=1 << 20,
        pieces=tuple(
            Piece(fqn=s.fqn, offsets=s.offsets, shape=s.shape, start=start, size_bytes=s.size_bytes)
            for s, start in zip(specs, image.starts, strict=True)
        ),
        tensors={s.fqn: TensorMeta(dtype=s.dtype, shape=s.global_shape, requires_grad=s.requires_grad) for s in specs},
        summary=summary,
        tree=state,
        aliases=aliases,
    )
    return shard, stock.skeleton(shard)


@contextmanager
def _opened(tiers: RunTiers, step: StepLike) -> Iterator[tuple[Record, CheckpointReader]]:
    record = tiers.catalog().resolve(step)
    with CheckpointReader(record, tiers.local, tiers.remotes) as reader:
        yield record, reader


def _groups(chosen: Sequence[Chosen], shard_bytes: int) -> list[list[Chosen]]:
    if shard_bytes < 1:
        raise ConfigError("files need at least one byte each")
    groups: list[list[Chosen]] = [[]]
    size = 0
    for one in chosen:
        if groups[-1] and size + one.size_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.size_bytes
    return groups


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def _stored_bytes(reader: CheckpointReader, chosen: Chosen) -> int:
    return prod(chosen.shape) * itemsize(reader.tensors[chosen.source].dtype)


def _state_text(reader: CheckpointReader) -> str | None:
    return json.dumps(reader.tree, separators=(",", ":")) if reader.tree is not None else None


@contextmanager
def published(path: Path, *, is_directory: bool) -> Iterator[Path]:
    """A scratch path that becomes ``path``, durably, when the body ends well, and vanishes when it doesn't.

    Raises:
        CheckpointExistsError: ``path`` exists, now or at the end.
    """
    path = path.absolute()
    scratch = path.with_name(f".{path.name}.{new_nonce()}")
    try:
        _refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_directory:
            scratch.mkdir()
        try:
            yield scratch
            _open_up(scratch)
            if is_directory:
                durable.fsync_dir(scratch)
            _refuse_existing(path)
            os.rename(scratch, path)
            durable.fsync_parent(path)
        except BaseException:
            if is_directory:
                durable.remove_tree(scratch)
            else:
                scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        if isinstance(error, CkptError):
            raise
        raise_for_errno(error, f"can't write {path}")


def _open_up(written: Path) -> None:
    """Whoever may read what this user makes may read an export; only the store's own files are private."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in [written, *written.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointExistsError(f"{path} exists", hint="give another path, or remove it first", path=str(path))


@contextmanager
def _new_file(path: Path, size_bytes: int) -> Iterator[int]:
    fd = durable.create_file(path)
    try:
        allocate(fd, size_bytes)
        yield fd
        durable.fsync_file(fd)
    finally:
        os.close(fd)


def _result(path: Path, record: Record, reader: CheckpointReader, chosen: Sequence[Chosen]) -> Exported:
    files = tuple(sorted(path.iterdir())) if path.is_dir() else (path,)
    leaves_out = any(shard.per_rank is not None for shard in reader.shards.values())
    return Exported(path, files, len(chosen), sum(c.size_bytes for c in chosen), record, leaves_out)


#: Writes (reader, path, [(name, stored tensor, dtype)] or None for the whole state).
Writer = Callable[[CheckpointReader, Path, Sequence[tuple[str, str, str]] | None], None]


def export_with(
    tiers: RunTiers,
    step: StepLike,
    path: Path,
    selection: Selection,
    write: Writer,
    *,
    progress: ProgressCallback | None = None,
) -> Exported:
    """One file, written by somebody else's ``write`` (who has torch); the rest is as for the other formats."""
    with _opened(tiers, step) as (record, reader):
        chosen = selection.choose(reader)
        meter = Meter(sum(_stored_bytes(reader, c) for c in chosen), progress)
        with published(path, is_directory=False) as scratch:
            whole = None if selection.is_everything else [(c.name, c.source, c.dtype) for c in chosen]
            write(reader, scratch, whole)
        meter.add(plain=meter.plain_total, stage="done")
    return _result(path, record, reader, chosen)
