"""From an image in memory to a shard file, on file systems of every temper."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptstore.agent import disk, writer
from ckptstore.agent.disk import Abandoned
from ckptstore.agent.protocol import SealRequest, layout_id_of
from ckptstore.agent.writer import Image, write_part
from ckptstore.clock import new_nonce
from ckptstore.errors import ConfigError, FormatError, NoSpaceError, StorageError
from ckptstore.format import stock
from ckptstore.format.manifest import Summary, digest
from ckptstore.format.stock import PieceSpec
from ckptstore.repo.local import LocalTier

CHUNK = 4096  # elements


def spec(fqn: str, elements: int, dtype: str = "float32") -> PieceSpec:
    return PieceSpec(fqn, dtype, (elements,), (0,), (elements,), True)


PIECES = (spec("big", 3_000_000), spec("half", 33, "bfloat16"), spec("none", 0), spec("odd", 100_001, "int8"))


@pytest.fixture(params=["disk", "memory"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalTier]:
    """A disk that takes O_DIRECT, and a tmpfs, of which older ones don't."""
    if request.param == "disk":
        root = tmp_path
    else:
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no tmpfs at /dev/shm")
        root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    tier = LocalTier(root / "root")
    tier.create()
    yield tier
    if request.param == "memory":
        shutil.rmtree(root)


def image(
    rank: int = 0, world_size: int = 1, pieces: tuple[PieceSpec, ...] = PIECES, nonce: str | None = None
) -> Image:
    save_id = f"{nonce or new_nonce()}-1"
    layout = stock.layout(pieces)
    memory = bytearray(layout.image_bytes + 4096)
    for offset, data in layout.segments:
        memory[offset : offset + len(data)] = data
    for piece, start in zip(pieces, layout.starts, strict=True):
        memory[start : start + piece.size_bytes] = hashlib.shake_128(piece.fqn.encode()).digest(piece.size_bytes)
    summary = Summary(
        run="run", save_id=save_id, timeline=1, step=7, created_at="2026-01-01T00:00:00.000Z", job="j",
        world_size=world_size,
    )  # fmt: skip
    request = SealRequest(
        save_id, 7, rank, world_size, 0, 1, tuple(range(world_size)), layout_id_of(pieces),
        summary if rank == 0 else None,
    )  # fmt: skip
    return Image(request, layout, pieces, memoryview(memory))


def write(tier: LocalTier, *images: Image) -> writer.Written:
    return write_part(tier, "run", images, chunk_elements=CHUNK, is_abandoned=lambda: False)


def check(tier: LocalTier, written: writer.Written, images: tuple[Image, ...]) -> None:
    assert written.root is not None
    [save] = tier.saves("run")
    assert save.path == written.path
    assert tier.root_manifest("run", save) == written.root
    for ref, made in zip(written.root.shards, images, strict=True):
        shard = tier.shard_manifest(save.path, ref)
        data = (save.path / shard.file).read_bytes()
        assert data == bytes(made.memory[: made.layout.image_bytes])
        for piece, expected in zip(shard.pieces, made.pieces, strict=True):
            payload = data[piece.start : piece.start + piece.size_bytes]
            step = CHUNK * expected.size_bytes // max(1, expected.shape[0])
            assert list(piece.digests) == [digest(payload[at : at + step]) for at in range(0, len(payload), step or 1)]
        assert digest(b"".join(run for _, run in stock.skeleton(shard))) == shard.skeleton_digest


def test_the_files_are_the_images(tier: LocalTier) -> None:
    nonce = new_nonce()
    images = tuple(image(rank, 2, nonce=nonce) for rank in (0, 1))
    check(tier, write(tier, *images), images)


def test_the_files_are_the_images_when_direct_writes_are_refused(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems refuse the flag, some take it and refuse the write, some write less than asked."""
    for refusal in ("flag", "write", "short"):
        with monkeypatch.context() as patch:
            if refusal == "flag":
                patch.setattr(disk, "_set_direct", lambda fd, wanted: False)
            else:
                patch.setattr(disk, "write_block", _refuser(refusal))
            made = image()
            written = write(tier, made)
        check(tier, written, (made,))
        tier.delete("run", made.request.save_id)


def _refuser(refusal: str) -> object:
    import fcntl

    def write_block(fd: int, block: memoryview, offset: int) -> int:
        is_direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        if is_direct and refusal == "write":
            raise OSError(errno.EINVAL, "no")
        if refusal == "short":
            return os.pwrite(fd, bytes(block[:1000]), offset) if not is_direct else os.pwrite(fd, block[:4096], offset)
        return os.pwrite(fd, block, offset)

    return write_block


def test_rank_0s_file_ends_with_the_stock_items(tier: LocalTier) -> None:
    from dataclasses import replace

    from ckptstore.format import tree

    made = image()
    encoded = tree.encode({"epoch": 3, "note": "x"}, lambda path, value: value)
    made = replace(made, request=replace(made.request, tree=encoded))
    written = write(tier, made)
    shard = written.shards[0]
    data = (written.path / shard.file).read_bytes()
    assert len(data) == shard.file_bytes > made.layout.image_bytes
    outside = b"".join(run for _, run in stock.skeleton(shard))
    assert digest(outside) == shard.skeleton_digest
    assert data.endswith(outside[-100:])


def test_pieces_of_one_tensor_that_contradict_each_other_are_refused(tier: LocalTier) -> None:
    pieces = (spec("a", 10), PieceSpec("a", "int8", (10,), (0,), (10,), True))
    with pytest.raises(FormatError, match="disagree"):
        write(tier, image(pieces=pieces))
    assert list((tier.root / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EDQUOT, NoSpaceError), (errno.EFBIG, StorageError)]
)
def test_nothing_is_left_when_the_disk_refuses(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    calls = []

    def write_block(fd: int, block: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return os.pwrite(fd, block, offset)

    monkeypatch.setattr(disk, "write_block", write_block)
    with pytest.raises(kind, match=errno.errorcode[number]) as info:
        write(tier, image())
    assert info.value.context["errno"] == errno.errorcode[number]
    assert len(calls) == 2, "it was tried again"
    assert list((tier.root / "run").iterdir()) == []


def test_the_part_is_written_anew_when_an_fsync_fails_once(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore.repo import durable

    genuine, failures = durable.fsync_file, [OSError(errno.EIO, "I/O error")]
    inodes = []

    def fsync_file(fd: int) -> None:
        inodes.append(os.fstat(fd).st_ino)
        if failures:
            raise failures.pop()
        genuine(fd)

    monkeypatch.setattr(durable, "fsync_file", fsync_file)
    made = image()
    check(tier, write(tier, made), (made,))
    assert len(inodes) > 2


def test_nothing_is_left_when_the_save_is_abandoned(tier: LocalTier) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Abandoned):
        write_part(tier, "run", [image()], chunk_elements=CHUNK, is_abandoned=lambda: next(answers, True))
    assert list((tier.root / "run").iterdir()) == []


def test_nothing_more_is_digested_for_a_part_that_fails(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, digested, genuine = threading.Event(), [], writer._digests

    def digests(image: Image, chunk_elements: int, is_unwanted: Callable[[], bool]) -> list[tuple[str, ...]]:
        begun.set()
        limit = time.monotonic() + 60
        while not is_unwanted() and time.monotonic() < limit:
            time.sleep(0.001)
        return genuine(image, chunk_elements, is_unwanted)

    def write_block(fd: int, block: memoryview, offset: int) -> int:
        assert begun.wait(60)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(writer, "_digests", digests)
    monkeypatch.setattr(writer, "digest", digested.append)
    monkeypatch.setattr(disk, "write_block", write_block)
    with pytest.raises(NoSpaceError):
        write(tier, image())
    assert not digested


def test_a_save_is_written_once(tier: LocalTier) -> None:
    made = image()
    write(tier, made)
    with pytest.raises((StorageError, ConfigError)):
        write(tier, made)
    assert len(tier.saves("run")) == 1
