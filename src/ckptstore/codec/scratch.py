"""Buffers and zstd contexts that one thread reuses: fresh memory costs as much as the coding itself."""

from __future__ import annotations

import threading

import numpy as np
import zstandard

from ckptstore.codec.arrays import WORD, Words

#: A slot larger than this is given back to the system after use, so that one huge chunk doesn't pin memory for good.
_KEEP_BYTES = 16 * 1024 * 1024


def _parameters(**fields: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        write_checksum=True, write_content_size=True, write_dict_id=False, threads=0, **fields
    )


class Scratch(threading.local):
    """One thread's buffers and contexts. Never hand a buffer to a caller: the next chunk overwrites it."""

    def __init__(self) -> None:
        self._slots: dict[str, np.ndarray] = {}
        # Huffman coding and runs, no search for matches: split floats have none. Higher levels are slower and worse.
        self.entropy = zstandard.ZstdCompressor(
            compression_params=_parameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=17,
                hash_log=6,
                chain_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
            )
        )
        # For bytes that do repeat.
        self.match = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()

    def words(self, slot: str, count: int, width: int) -> Words:
        """``count`` words of ``width`` bytes with undefined content, valid until the next call for this slot."""
        size = count * width
        buffer = self._slots.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
            if size <= _KEEP_BYTES:
                self._slots[slot] = buffer
        return buffer[:size].view(WORD[width])


SCRATCH = Scratch()
