"""Shard files and a ``.metadata`` that stock ``torch.distributed.checkpoint`` opens, made without torch.

A shard file is one image: for every piece an envelope around its raw bytes, and in rank 0's file a tail with the values
that aren't tensors::

    zeros | head | payload of piece 0 | foot | zeros | head | payload of piece 1 | foot | ... | tail
                 ^ aligned: 4096 for payloads over 64 KiB, else 64

Head, payload and foot are together what ``torch.save`` would write for that piece. So memory laid out like this *is*
the file, and copying a tensor's bytes to their place is all the work of a save.

Every byte outside the payloads is a pure function of the manifest (:func:`skeleton`), as is ``.metadata``. Hence a
restored directory is byte-equal to the original, and nothing here ever reads what it wrote.

Not a word of any of it depends on the clock, the machine or torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptstore.errors import FormatError
from ckptstore.format.manifest import ShardManifest
from ckptstore.format.stock_items import stock_items
from ckptstore.format.stock_layout import Layout, PieceSpec, layout, specs_of, tail
from ckptstore.format.stock_metadata import metadata

__all__ = ["Layout", "PieceSpec", "layout", "metadata", "skeleton", "specs_of", "stock_items", "tail"]


def skeleton(shard: ShardManifest) -> Iterator[tuple[int, bytes]]:
    """Every byte of the shard file that is not payload, as (file offset, bytes) in file order, zeros included.

    Recomputed from the manifest alone: with the payloads in their places it makes the whole file.

    Raises:
        FormatError: the manifest's places are not those of its pieces. Nothing has been yielded then.
    """
    specs = specs_of(shard)
    image = layout(specs)
    appended = tail(stock_items(shard.tree), image.image_bytes)[0] if shard.tree is not None else b""
    expected = [(start, spec.size_bytes) for start, spec in zip(image.starts, specs, strict=True)]
    if [(piece.start, piece.size_bytes) for piece in shard.pieces] != expected:
        raise FormatError(f"the manifest of rank {shard.rank} places its pieces where no writer would", rank=shard.rank)
    if shard.file_bytes != image.image_bytes + len(appended):
        raise FormatError(
            f"the manifest of rank {shard.rank} says {shard.file_bytes} bytes for a file that has "
            f"{image.image_bytes + len(appended)}",
            rank=shard.rank,
        )
    return _runs(image, expected, appended)


def _runs(image: Layout, payloads: list[tuple[int, int]], appended: bytes) -> Iterator[tuple[int, bytes]]:
    """One run before each payload and one behind the last."""
    end, foot = 0, b""
    for (start, size), (head_offset, head), (_, next_foot) in zip(
        payloads, image.segments[::2], image.segments[1::2], strict=True
    ):
        yield end, foot + bytes(head_offset - end - len(foot)) + head
        end, foot = start + size, next_foot
    if foot or appended:
        yield end, foot + appended
