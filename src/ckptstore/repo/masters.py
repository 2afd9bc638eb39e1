"""Which fp32 piece of a shard a bf16 piece is the rounding of: found by what they hold, not by what they are called.

Mixed-precision training keeps fp32 master weights somewhere in its state: in the optimizer's, in a dictionary of their
own, under whatever name. A bf16 copy that equals its master rounded costs nothing to store, so each bf16 piece is
compared with the fp32 pieces of as many elements, on a sample of both. This only proposes; whoever encodes a chunk
compares all of it.
"""

from __future__ import annotations

import os
from collections import defaultdict

from ckptstore import codec
from ckptstore.format.manifest import Piece, ShardManifest

#: bf16 bytes below which a copy is not worth a look.
MIN_BYTES = 512

_RUNS = 8
_RUN_ELEMENTS = 16


def find_masters(shard: ShardManifest, fd: int) -> dict[int, int]:
    """Number of each bf16 piece that looks derived -> number of its likely master.

    Args:
        shard: What the file holds.
        fd: The open shard file. What can't be read has no master; whoever reads it for good will say why.
    """
    dtypes = [shard.tensors[piece.fqn].dtype for piece in shard.pieces]
    halves = [n for n, p in enumerate(shard.pieces) if dtypes[n] == "bfloat16" and p.size_bytes >= MIN_BYTES]
    sizes = {2 * shard.pieces[n].size_bytes for n in halves}
    masters: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, piece in enumerate(shard.pieces):
        if dtypes[number] == "float32" and piece.size_bytes in sizes:
            masters[piece.size_bytes, codec.rounded(_sample(fd, piece, 4))].append(number)
    found = {}
    for number in halves:
        piece = shard.pieces[number]
        candidates = masters.get((2 * piece.size_bytes, _sample(fd, piece, 2)), [])
        if candidates:
            # Constant tensors look alike: prefer the one whose name says that it is about the same parameter.
            found[number] = max(candidates, key=lambda c: _common_parts(piece.fqn, shard.pieces[c].fqn))
    return found


def _sample(fd: int, piece: Piece, width: int) -> bytes:
    """Some elements of the piece, the same ones for every piece of as many."""
    count = piece.size_bytes // width
    last = max(0, count - _RUN_ELEMENTS)
    starts = sorted({last * run // (_RUNS - 1) for run in range(_RUNS)})
    size = _RUN_ELEMENTS * width
    try:
        runs = [os.pread(fd, size, piece.start + start * width) for start in starts]
    except OSError:
        return b""
    return b"".join(runs) if all(len(run) == size for run in runs) else b""


def _common_parts(one: str, other: str) -> int:
    return len(set(one.split(".")) & set(other.split(".")))
