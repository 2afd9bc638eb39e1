"""Where a rank's pieces lie in its shard file.

Fixed forever by the golden files in ``tests/compat/stock_v1``: a change of one byte would need a new format version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ckptstore.errors import FormatError
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import ShardManifest
from ckptstore.format.stock_envelope import ALIGNMENT, tensor_envelope

PAGE_BYTES = 4096
#: Payloads above this start on a page of their own: they can be written with O_DIRECT and mapped.
PAGED_ABOVE_BYTES = 64 * 1024
#: What torch can hold: 64 dimensions; and what a zip can, with elements of up to 16 bytes.
MAX_NDIM, MAX_ELEMENTS = 64, 1 << 58


@dataclass(frozen=True)
class PieceSpec:
    """A box of one global tensor that a rank will write: everything about it but its bytes.

    Attributes:
        requires_grad: of the live tensor; only informs stock readers, stored payloads never require grad.
    """

    fqn: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    requires_grad: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Where everything of a shard file lies.

    Attributes:
        starts: first payload byte of each piece.
        segments: (file offset, bytes) of the envelopes, ascending; what is neither segment nor payload is zeros.
        image_bytes: where the tail begins.
    """

    starts: tuple[int, ...]
    segments: tuple[tuple[int, bytes], ...]
    image_bytes: int


def layout(pieces: Sequence[PieceSpec]) -> Layout:
    """Place the pieces in their order: pure and deterministic.

    Raises:
        FormatError: a dtype is unknown.
    """
    starts: list[int] = []
    segments: list[tuple[int, bytes]] = []
    end = 0
    for piece in pieces:
        head, foot = tensor_envelope(piece.dtype, piece.shape)
        size = piece.size_bytes
        alignment = PAGE_BYTES if size > PAGED_ABOVE_BYTES else ALIGNMENT
        start = -(-(end + len(head)) // alignment) * alignment
        starts.append(start)
        segments.append((start - len(head), head))
        segments.append((start + size, foot))
        end = start + size + len(foot)
    return Layout(tuple(starts), tuple(segments), end)


def tail(items: Mapping[str, bytes], image_bytes: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes that follow the image in rank 0's file, and (file offset, length) of each item in the file.

    The order is that of the names, so that it doesn't depend on where the mapping came from.
    """
    out = bytearray()
    places: dict[str, tuple[int, int]] = {}
    for name in sorted(items):
        data = items[name]
        out += bytes(-(image_bytes + len(out)) % ALIGNMENT)
        places[name] = (image_bytes + len(out), len(data))
        out += data
    return bytes(out), places


def specs_of(shard: ShardManifest) -> list[PieceSpec]:
    """The specs that :func:`layout` was given when this shard was written.

    Raises:
        FormatError: a piece's tensor is not described, or its shape is none, or not as large as the piece says.
    """
    specs = []
    for piece in shard.pieces:
        tensor = shard.tensors.get(piece.fqn)
        if tensor is None:
            raise FormatError(f"the manifest of rank {shard.rank} does not describe {piece.fqn!r}", rank=shard.rank)
        spec = PieceSpec(piece.fqn, tensor.dtype, tensor.shape, piece.offsets, piece.shape, tensor.requires_grad)
        if not _is_shape(piece.shape) or spec.size_bytes != piece.size_bytes:
            raise FormatError(
                f"the manifest of rank {shard.rank} gives {piece.fqn!r} {piece.size_bytes} bytes for a shape of "
                f"{list(piece.shape)[:MAX_NDIM]}",
                rank=shard.rank,
            )
        specs.append(spec)
    return specs


def _is_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) <= MAX_NDIM and all(0 <= size < MAX_ELEMENTS for size in shape) and prod(shape) < MAX_ELEMENTS
