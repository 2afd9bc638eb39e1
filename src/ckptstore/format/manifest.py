"""What is on disk and in the bucket, as strict, canonical JSON.

Three documents::

    Summary         <= 4 KiB: what `list` shows of a save                      summary.json
    ShardManifest   what one rank wrote: pieces, bytes, digests                shard-00000.json
    RootManifest    the commit point: the summary and every shard's digest     manifest.json

The root manifest is a pure function of the shard manifests, so whoever holds all of them writes the same bytes, on
the local disk and in every remote. A remote shard manifest is the same document plus :class:`RemoteShard`, which says
where each chunk's frame lies.

Canonical: UTF-8, sorted keys, no spaces, no NaN, so equal documents are equal bytes and their digests can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import xxhash
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ckptstore.errors import ConfigError, FormatError, IncompleteCheckpointError

FORMAT = "ckptstore"
FORMAT_VERSION = 1

MAX_SUMMARY_BYTES = 64 * 1024
MAX_MANIFEST_BYTES = 256 * 1024 * 1024

RUN_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
SAVE_ID_PATTERN = r"[0-9a-f]{12}-[0-9]{1,9}"
#: Two digests: xxh3_128 (32 hex digits) finds damage in bulk bytes at disk speed; blake3 (64) names things.
XXH3_PATTERN = r"^[0-9a-f]{32}$"
BLAKE3_PATTERN = r"^[0-9a-f]{64}$"

Json = dict[str, Any]
M = TypeVar("M", bound="Document")


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3_128 as 32 hex digits: guards against damage and torn writes, not against an adversary."""
    return xxhash.xxh3_128_hexdigest(data)


def strong_digest(data: bytes | bytearray | memoryview) -> str:
    """blake3 as 64 hex digits: names chunks and pins manifests."""
    return blake3(data).hexdigest()


def canonical(value: Any) -> bytes:
    """The one byte string for this JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


class Document(BaseModel):
    """A frozen JSON document that forbids unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)

    def encode(self) -> bytes:
        """Canonical bytes."""
        return canonical(self.model_dump(mode="json"))

    @classmethod
    def decode(cls: type[M], data: bytes, *, what: str, max_bytes: int = MAX_MANIFEST_BYTES) -> M:
        """Parse and validate bytes from disk or network.

        Raises:
            FormatError: too large, not JSON, of a newer version, or not this document; ``what`` names it.
        """
        if len(data) > max_bytes:
            raise FormatError(f"{what} is larger than {max_bytes} bytes", key=what)
        try:
            value = json.loads(data, object_pairs_hook=_reject_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{what} is damaged: {error}", key=what) from None
        version = value.get("version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatError(
                f"{what} was written in format {version}; this ckptstore reads up to {FORMAT_VERSION}",
                hint="upgrade ckptstore",
                key=what,
            )
        try:
            return cls.model_validate(value)
        except (ValidationError, RecursionError) as error:
            detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "too deep"
            raise FormatError(f"{what} is damaged: {detail}", key=what) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Marker(Document):
    """What lies at the top of every store. Nothing is taken for granted: an empty document is somebody else's."""

    format: Literal["ckptstore"]
    version: int = Field(ge=1)

    @classmethod
    def ours(cls) -> Marker:
        """Of stores made now."""
        return cls(format="ckptstore", version=FORMAT_VERSION)


class Parent(Document):
    """The save a timeline continues from."""

    save_id: str
    timeline: int
    step: int


class Summary(Document):
    """One save in brief. Metric values are floats or the strings ``nan``, ``inf``, ``-inf``."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    run: str = Field(pattern=f"^{RUN_PATTERN}$")
    save_id: str = Field(pattern=f"^{SAVE_ID_PATTERN}$")
    timeline: int = Field(ge=1)
    parent: Parent | None = None
    step: int = Field(ge=0)
    epoch: int | None = None
    created_at: str
    job: str
    world_size: int = Field(ge=1)
    num_nodes: int = Field(default=1, ge=1)
    size_bytes: int = Field(default=0, ge=0)
    """Plain tensor bytes of all ranks, replicas once."""
    metrics: dict[str, float | str] = Field(default_factory=dict)
    tags: tuple[str, ...] = ()
    emergency: bool = False
    versions: dict[str, str] = Field(default_factory=dict)


class TensorMeta(Document):
    """The global tensor behind a stored name.

    ``dtype`` is torch's name without ``torch.``; ``requires_grad`` only informs stock readers.
    """

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool = False


class Piece(Document):
    """A box of one global tensor as one rank stored it: contiguous, row-major bytes in its shard file."""

    fqn: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    start: int = Field(ge=0)
    """First payload byte in the shard file."""
    size_bytes: int = Field(ge=0)
    digests: tuple[str, ...] = ()
    """xxh3_128 of each slice of ``chunk_elements`` elements, the last one shorter; none for an empty piece."""


class ShardManifest(Document):
    """What one rank wrote. Rank 0's carries what is global: summary, tensors, aliases, state tree."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    save_id: str = Field(pattern=f"^{SAVE_ID_PATTERN}$")
    step: int = Field(ge=0)
    rank: int = Field(ge=0)
    world_size: int = Field(ge=1)
    node: int = Field(default=0, ge=0)
    file: str = Field(pattern=r"^__[0-9]{1,6}_0\.distcp$")
    file_bytes: int = Field(ge=0)
    chunk_elements: int = Field(gt=0)
    """Elements per chunk, so that chunks of a bf16 tensor and of its fp32 master line up."""
    pieces: tuple[Piece, ...] = ()
    tensors: dict[str, TensorMeta] = Field(default_factory=dict)
    """Metadata of the tensors this rank stored a piece of."""
    skeleton_digest: str = ""
    """xxh3_128 over every byte of the shard file outside the payloads, in order: envelopes, padding, stock items."""
    per_rank: Json | None = None
    """Encoded tree of this rank's own values, see :mod:`ckptstore.format.tree`."""
    summary: Summary | None = None
    tree: Json | None = None
    """Encoded state tree; tensors are references by name."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Tied names -> the name whose bytes they share."""


class ShardRef(Document):
    """One shard as the root manifest pins it."""

    rank: int
    node: int = 0
    file: str
    file_bytes: int
    size_bytes: int
    """Plain tensor bytes among them."""
    manifest_digest: str = Field(pattern=BLAKE3_PATTERN)
    """blake3 of the shard manifest's canonical bytes."""


class RootManifest(Document):
    """The commit point. It exists under its final name if and only if the save is complete there."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    summary: Summary
    shards: tuple[ShardRef, ...]


class Frame(Document):
    """Where one chunk lies in a remote: ``length`` bytes at ``offset`` of pack ``pack`` (an index into ``packs``).

    ``base`` is the frame this one rests on, with its own place: of a delta the full one of its base chunk; of a derived
    one that of its master, which may be a delta.
    """

    pack: int = Field(ge=0)
    offset: int = Field(ge=0)
    length: int = Field(gt=0)
    codec: str
    size_bytes: int = Field(ge=0)
    name: str = Field(pattern=BLAKE3_PATTERN)
    """blake3 of the plain bytes: the chunk's name, the key of deduplication."""
    base: Frame | None = None


class RemoteShard(Document):
    """A shard manifest in a remote: the local document, and a frame for each of its chunks."""

    format: str = FORMAT
    version: int = FORMAT_VERSION
    shard: ShardManifest
    packs: tuple[str, ...]
    """Keys of packs, relative to the run's prefix; several belong to earlier saves when chunks are referenced."""
    frames: tuple[Frame, ...]
    """Each distinct frame once."""
    chunks: tuple[tuple[int, ...], ...]
    """For each piece of the shard, for each of its chunks: index into ``frames``."""
    stored_bytes: int = 0
    """Bytes this save added to the remote for this shard."""


def ref_of(shard: ShardManifest, encoded: bytes | None = None) -> ShardRef:
    """What the root manifest says of this shard; ``encoded``: its canonical bytes, if they are at hand."""
    return ShardRef(
        rank=shard.rank,
        node=shard.node,
        file=shard.file,
        file_bytes=shard.file_bytes,
        size_bytes=sum(piece.size_bytes for piece in shard.pieces),
        manifest_digest=strong_digest(shard.encode() if encoded is None else encoded),
    )


def root_from(summary: Summary, refs: Iterable[ShardRef]) -> RootManifest:
    """The root manifest of a save: a pure function, whoever computes it and in whichever order.

    Args:
        summary: The one in rank 0's shard manifest.
        refs: One per rank of the save.

    Raises:
        IncompleteCheckpointError: a rank is missing or there twice.
    """
    shards = tuple(sorted(refs, key=lambda ref: ref.rank))
    if [ref.rank for ref in shards] != list(range(summary.world_size)):
        have = sorted({ref.rank for ref in shards})
        raise IncompleteCheckpointError(
            f"save {summary.save_id} (step {summary.step}) has the parts of ranks {have} out of {summary.world_size}",
            step=summary.step,
            save_id=summary.save_id,
        )
    update = {"size_bytes": sum(ref.size_bytes for ref in shards), "num_nodes": len({ref.node for ref in shards})}
    return RootManifest(summary=summary.model_copy(update=update), shards=shards)


def root_of(shards: Sequence[ShardManifest], encoded: Sequence[bytes | None] = ()) -> RootManifest:
    """The root manifest of these shard manifests.

    Args:
        shards: One per rank of the save.
        encoded: Their canonical bytes, if they are at hand.

    Raises:
        IncompleteCheckpointError: a rank is missing or there twice.
        FormatError: shards of different saves are mixed, or rank 0 has no summary.
    """
    if len({(s.save_id, s.step, s.world_size) for s in shards}) > 1:
        raise FormatError("shard manifests of different saves can't be one checkpoint")
    head = next((s for s in shards if s.rank == 0), None)
    if head is None:
        raise IncompleteCheckpointError("the part of rank 0 is missing")
    if head.summary is None or (head.summary.save_id, head.summary.step) != (head.save_id, head.step):
        raise FormatError(f"rank 0's shard manifest of save {head.save_id} lacks the summary of its save")
    return root_from(head.summary, [ref_of(*pair) for pair in zip_longest(shards, encoded)])


def check_run_name(run: str) -> str:
    """The run name itself, or ConfigError."""
    if not re.fullmatch(RUN_PATTERN, run):
        raise ConfigError(
            f"run name {run!r} is not allowed",
            hint="use letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit",
        )
    return run
