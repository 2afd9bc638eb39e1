"""What a codec chain promises: plain bytes in, a self-describing bounded frame out, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

#: Name of the chain that made a frame, as stored in shard manifests.
#: ``delta`` needs the plain bytes of its base, ``derived`` those of its fp32 master, to be decoded.
CodecName: TypeAlias = Literal["raw", "zstd", "planes", "delta", "derived"]
CODECS: tuple[CodecName, ...] = ("raw", "zstd", "planes", "delta", "derived")

#: Plain bytes of one chunk at most; a decoder refuses more before it allocates. Chunks are cut by the writer.
CHUNK_BYTES = 4 * 1024 * 1024
MAX_CHUNK_BYTES = 128 * 1024 * 1024

#: Numbers treated at once: intermediate arrays of this length stay in the outer cache; shorter ones lose more to calls.
BLOCK = 1 << 18

#: Floating-point dtypes by torch's name -> bytes of one number (of one of the two of a complex number). Those of more
#: than a byte are sign, exponent, fraction from the high end down. Any other dtype is opaque bytes here.
FLOAT_BYTES: dict[str, int] = {
    "float4_e2m1fn_x2": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "bfloat16": 2,
    "float16": 2,
    "complex32": 2,
    "float32": 4,
    "complex64": 4,
    "float64": 8,
    "complex128": 8,
}


@dataclass(frozen=True)
class Encoded:
    """A frame and the name of the chain that made it."""

    codec: CodecName
    frame: Buffer
