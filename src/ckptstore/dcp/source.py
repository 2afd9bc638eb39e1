"""What loading needs of a checkpoint, wherever that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ckptstore.format.manifest import Json, Piece, RootManifest, TensorMeta


class Chunk(Protocol):
    """One chunk of a stored piece."""

    @property
    def size_bytes(self) -> int:
        """Plain bytes."""

    @property
    def digest(self) -> str:
        """Of the plain bytes."""


class ChunkSource(Protocol):
    """What loading needs of a checkpoint; ``repo.reader.CheckpointReader`` is one."""

    @property
    def tensors(self) -> Mapping[str, TensorMeta]:
        """Stored tensors by name, without aliases."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied name -> stored name."""

    @property
    def tree(self) -> Json | None:
        """The encoded state."""

    @property
    def root(self) -> RootManifest:
        """The root manifest."""

    def per_rank(self, rank: int) -> Json | None:
        """A rank's own values, encoded."""

    def pieces(self, fqn: str) -> Sequence[tuple[int, int, Piece]]:
        """(rank, number of the piece, piece) of a tensor."""

    def chunks(self, rank: int, piece_index: int) -> Sequence[Chunk]:
        """The chunks of a piece."""

    def read_batch(self, wanted: Sequence[tuple[int, int, int, memoryview]]) -> list[str]:
        """Verified plain bytes of chunks into their ``out``; returns the name of each one's source.

        Each is (rank, number of the piece, number of the chunk, out).
        """

    def read_nearby(self, wanted: Sequence[tuple[int, int, int, memoryview]]) -> list[str | None]:
        """The same from this node alone; None for each chunk that is not whole here."""

    def repair(self, rank: int, piece_index: int, chunk_index: int, good: memoryview) -> None:
        """Replace this node's damaged bytes of a chunk, as far as that is possible."""
