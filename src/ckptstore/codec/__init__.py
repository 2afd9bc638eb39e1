"""Codec chain: the plain bytes of one chunk in, a self-describing bounded frame out, and back.

Owns: which chain suits a chunk, the frame layout, its bounds.
Must not know: files, manifests, remotes, torch.
"""

from ckptstore.codec.base import CHUNK_BYTES, MAX_CHUNK_BYTES, Buffer, CodecName, Encoded
from ckptstore.codec.chain import decode, derive, encode, rounded

__all__ = ["CHUNK_BYTES", "MAX_CHUNK_BYTES", "Buffer", "CodecName", "Encoded", "decode", "derive", "encode", "rounded"]
