"""Codec chain: the plain bytes of one chunk in, a self-describing bounded frame out, and back.

Owns: which chain suits a chunk, the frame layout, its bounds.
Must not know: files, manifests, remotes, torch.
"""

from typing import TYPE_CHECKING, Any

from ckptstore.codec.base import CHUNK_BYTES, MAX_CHUNK_BYTES, Buffer, CodecName, Encoded

if TYPE_CHECKING:
    from ckptstore.codec.chain import decode, derive, encode, rounded

__all__ = ["CHUNK_BYTES", "MAX_CHUNK_BYTES", "Buffer", "CodecName", "Encoded", "decode", "derive", "encode", "rounded"]


def __getattr__(name: str) -> Any:
    # The chain needs NumPy, which `ckptctl list` should not have to import.
    if name in ("decode", "derive", "encode", "rounded"):
        from ckptstore.codec import chain

        return getattr(chain, name)
    raise AttributeError(f"module 'ckptstore.codec' has no attribute {name!r}")
