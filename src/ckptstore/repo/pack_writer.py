"""Frames into packs, and packs into a remote, a bounded number of them at a time."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from ckptstore.config import StoreConfig
from ckptstore.format.manifest import ShardManifest
from ckptstore.repo.chunk_encoder import EncodedChunk
from ckptstore.repo.packs import Chunk, PlacedFrame
from ckptstore.repo.progress import Meter
from ckptstore.repo.remote import RemoteTier


class PackWriter:
    """Fills packs and keeps a bounded number of them in flight; use as a context manager.

    Two packs are open at a time: settled chunks lie apart, so that their packs stay worth keeping as a whole.

    Args:
        remote: Where to.
        shard: Whose frames these are.
        config: ``pack_bytes`` and ``upload_concurrency`` are used.
        meter: Told what is sent.
        look_first, distrust, avoid: As :meth:`RemoteTier.put_pack` takes them.
    """

    def __init__(
        self,
        remote: RemoteTier,
        shard: ShardManifest,
        config: StoreConfig,
        meter: Meter,
        *,
        look_first: bool,
        distrust: Collection[str],
        avoid: Collection[str],
    ) -> None:
        self._remote = remote
        self._shard = shard
        self._pack_bytes = config.pack_bytes
        self._meter = meter
        self._look_first = look_first
        self._distrust = distrust
        self._avoid = avoid
        self._open: dict[bool, tuple[int, bytearray]] = {}
        self._sent: list[Future[str] | None] = []
        """By number of the pack; None while it is open."""
        self._slots = threading.Semaphore(config.upload_concurrency)
        self._pool = ThreadPoolExecutor(config.upload_concurrency, "ckptstore-upload")

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Wait for what is in flight: a request can't be called back, and a finished pack serves the next attempt."""
        self._pool.shutdown(cancel_futures=True)

    def add(self, encoded: EncodedChunk, chunk: Chunk) -> PlacedFrame:
        """Put one frame into an open pack; blocks while too many packs are in flight."""
        kind = encoded.is_settled
        if kind in self._open and len(self._open[kind][1]) + len(encoded.frame) > self._pack_bytes:
            self._send(kind)
        if kind not in self._open:
            self._open[kind] = (len(self._sent), bytearray())
            self._sent.append(None)
        number, buffer = self._open[kind]
        frame = PlacedFrame(
            pack=str(number),
            offset=len(buffer),
            length=len(encoded.frame),
            codec=encoded.codec,
            size_bytes=chunk.size_bytes,
            name=encoded.name,
            base=encoded.base,
        )
        buffer += encoded.frame
        return frame

    def finish(self) -> list[str]:
        """Send the rest and wait until every pack is confirmed; their keys, by number."""
        for kind in list(self._open):
            self._send(kind)
        return [future.result() for future in self._sent if future is not None]

    def _send(self, kind: bool) -> None:
        self._slots.acquire()
        for future in self._sent:
            if future is not None and future.done():
                future.result()  # stop at the first failure, not after the last chunk
        number, data = self._open.pop(kind)
        self._meter.add(waiting=len(data))
        self._sent[number] = self._pool.submit(self._put, data)

    def _put(self, data: bytearray) -> str:
        try:
            save_id, rank = self._shard.save_id, self._shard.rank
            key, sent = self._remote.put_pack(
                save_id, rank, data, look_first=self._look_first, distrust=self._distrust, avoid=self._avoid
            )
            self._remote.renew_intent(save_id)
            self._meter.add(sent=sent, waiting=-len(data))
            return key
        finally:
            self._slots.release()
