"""What a codec chain promises: plain bytes in, a self-describing bounded frame out, and back."""

from __future__ import annotations

from typing import Literal, Union

Buffer = Union[bytes, bytearray, memoryview]

#: Name of the chain that made a frame, as stored in shard manifests.
CodecName = Literal["raw", "zstd", "planes", "delta"]

#: Plain bytes of one chunk at most; a decoder refuses more before it allocates. Chunks are cut by the writer.
CHUNK_BYTES = 4 * 1024 * 1024
MAX_CHUNK_BYTES = 64 * 1024 * 1024
