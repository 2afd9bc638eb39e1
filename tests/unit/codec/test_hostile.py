"""A frame is bytes from a stranger: it decodes to the exact chunk or raises IntegrityError, within bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from chunks import chunk, stepped, words
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.codec import MAX_CHUNK_BYTES, Encoded, decode, encode
from ckptstore.codec.frame import EVEN, NARROW, RAW, ZSTD, Plane, build
from ckptstore.errors import IntegrityError

COUNT = 3000


def _samples() -> Iterator[tuple[str, bytes, bytes | None, Encoded]]:
    """One frame for each codec and each kind of plane: (name, plain, what decode needs as base, encoded)."""
    weights, positive, sparse = (chunk(k, 4, COUNT, 1, tail=3) for k in ("weights", "positive", "sparse"))
    yield "raw", chunk("random", 4, COUNT), None, encode(chunk("random", 4, COUNT), dtype="float32")
    yield "zstd", bytes(COUNT), None, encode(bytes(COUNT), dtype="uint8")
    yield "planes", weights, None, encode(weights, dtype="float32")
    yield "even", positive, None, encode(positive, dtype="float32")
    yield "narrow", sparse, None, encode(sparse, dtype="float32")
    old = stepped(weights, 4, 2)
    yield "delta", weights, old, encode(weights, dtype="float32", base=old)
    rows = words("weights", 4, COUNT, 3) & np.uint32(0x007FFFFF) | (np.arange(COUNT, dtype="<u4") // 40 % 250) << 23
    yield "lag", rows.tobytes(), None, encode(rows.tobytes(), dtype="float32", row=8)
    master = words("weights", 4, COUNT, 4)
    half = (master & 0xFFFF0000) >> 16
    half = half.astype("<u2").tobytes()
    wide = (master & np.uint32(0xFFFF0000)).tobytes()
    yield "derived", half, wide, encode(half, dtype="bfloat16", master=wide)
    yield "empty", b"", None, encode(b"", dtype="float32")


SAMPLES = {name: rest for name, *rest in _samples()}


def _decode_or_none(frame: bytes, plain: bytes, base: bytes | None) -> bytes | None:
    try:
        return bytes(decode(frame, size_bytes=len(plain), base=base))
    except IntegrityError:
        return None


def test_samples_cover_every_codec_and_every_kind_of_plane() -> None:
    codecs = {encoded.codec for _, _, encoded in SAMPLES.values()}
    assert codecs == {"raw", "zstd", "planes", "delta", "derived"}
    entries = [
        struct.unpack_from("<BBHII", encoded.frame, 20 + 12 * i)
        for _, _, encoded in SAMPLES.values()
        for i in range(encoded.frame[7])
    ]
    assert {mode for mode, *_ in entries} == {RAW, ZSTD, NARROW, EVEN}
    assert any(lag for *_, lag, _ in entries)


@settings(max_examples=1500, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    near_head=st.booleans(),
)
def test_exact_bytes_or_integrity_error_when_bytes_are_flipped(
    name: str, edits: list[tuple[float, int]], near_head: bool
) -> None:
    plain, base, encoded = SAMPLES[name]
    frame = bytearray(encoded.frame)
    for where, mask in edits:
        frame[int(where * (min(len(frame), 90) if near_head else len(frame) - 1)) % len(frame)] ^= mask
    assert _decode_or_none(bytes(frame), plain, base) in (None, plain)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_integrity_error_when_cut_anywhere_or_followed_by_anything(name: str) -> None:
    plain, base, encoded = SAMPLES[name]
    frame = bytes(encoded.frame)
    for length in {*range(min(len(frame), 120)), *range(0, len(frame), 97), len(frame) - 1}:
        assert _decode_or_none(frame[:length], plain, base) is None
    for extra in (b"\0", frame, b"\xff" * 100):
        assert _decode_or_none(frame + extra, plain, base) is None


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_single_flipped_bit_is_caught_when_it_lies_in_the_first_bytes(name: str) -> None:
    plain, base, encoded = SAMPLES[name]
    for bit in range(8 * min(len(encoded.frame), 200)):
        frame = bytearray(encoded.frame)
        frame[bit // 8] ^= 1 << bit % 8
        assert _decode_or_none(bytes(frame), plain, base) in (None, plain)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2000))
def test_integrity_error_when_bytes_are_random(data: bytes, size: int) -> None:
    with pytest.raises(IntegrityError):
        decode(data, size_bytes=size)


@settings(max_examples=800, deadline=None)
@given(
    codec=st.integers(0, 6),
    width=st.sampled_from([0, 1, 2, 3, 4, 8, 255]),
    size=st.integers(0, 70),
    table=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from([0, 1, 2, 4, 8, 9]),
            st.integers(0, 1),
            st.integers(0, 80),
            st.integers(0, 70),
        ),
        max_size=9,
    ),
    body=st.binary(max_size=120),
    exact=st.booleans(),
)
def test_integrity_error_when_headers_are_well_formed_nonsense(
    codec: int, width: int, size: int, table: list[tuple[int, ...]], body: bytes, exact: bool
) -> None:
    frame = struct.pack("<4sBBBBIQ", b"CKPF", 1, codec, width, len(table), size, 1)
    frame += b"".join(struct.pack("<BBHII", *entry) for entry in table)
    if exact and width:
        need = sum(entry[-1] for entry in table) + size % width
        body = (body * (need // max(1, len(body)) + 1))[:need] if body else bytes(need)
    with pytest.raises(IntegrityError):
        decode(frame + body, size_bytes=size, base=bytes(size))


@pytest.mark.parametrize("name", ["delta", "derived"])
@pytest.mark.parametrize("base", ["none", "wrong", "short", "long", "empty"])
def test_integrity_error_when_the_base_is_not_the_right_one(name: str, base: str) -> None:
    plain, right, encoded = SAMPLES[name]
    assert right is not None
    given_base = {
        "none": None,
        "wrong": bytes([right[0] ^ 0x80, *right[1:-1], right[-1] ^ 0x80]) if name == "delta" else bytes(len(right)),
        "short": right[:-1],
        "long": right + b"\0",
        "empty": b"",
    }[base]
    with pytest.raises(IntegrityError):
        decode(encoded.frame, size_bytes=len(plain), base=given_base)


@pytest.mark.parametrize("name", sorted(SAMPLES))
@pytest.mark.parametrize("off", [-1, 1, 1 << 40])
def test_integrity_error_when_the_size_is_not_the_expected_one(name: str, off: int) -> None:
    plain, base, encoded = SAMPLES[name]
    with pytest.raises(IntegrityError):
        decode(encoded.frame, size_bytes=abs(len(plain) + off), base=base)


def test_integrity_error_names_the_version_when_the_frame_is_newer() -> None:
    plain, base, encoded = SAMPLES["planes"]
    newer = bytes([*encoded.frame[:4], 2, *encoded.frame[5:]])
    with pytest.raises(IntegrityError, match="version 2"):
        decode(newer, size_bytes=len(plain), base=base)


# --- bombs


def _peak(frame: bytes, size_bytes: int) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            decode(frame, size_bytes=size_bytes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _bomb(size: int, *, content_size: bool, checksum: bool = True) -> bytes:
    """A zstd frame of ``size`` zeros in a few kilobytes."""
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=content_size, write_checksum=checksum)
    stream = compressor.compressobj(size=size) if content_size else compressor.compressobj()
    block = bytes(1 << 20)
    parts = [stream.compress(block) for _ in range(size >> 20)]
    return b"".join([*parts, stream.flush()])


@pytest.mark.parametrize("codec,mode,width", [("zstd", ZSTD, 1), ("planes", ZSTD, 1), ("planes", NARROW, 1)])
@pytest.mark.parametrize("content_size", [True, False])
def test_little_memory_is_used_when_a_plane_is_a_bomb(codec: str, mode: int, width: int, content_size: bool) -> None:
    bomb = _bomb(256 << 20, content_size=content_size)
    if mode == NARROW:
        bomb = struct.pack("<BBBBII", 1, ZSTD, RAW, 0, len(bomb), 0) + bomb
    frame = build(codec, word_bytes=width, size_bytes=4096, check=0, planes=[Plane(mode, 1, bomb)])  # type: ignore[arg-type]
    assert _peak(frame, 4096) < 1 << 20


@pytest.mark.parametrize("field", ["misfits", "packed"])
def test_little_memory_is_used_when_a_narrow_plane_lies_about_its_sizes(field: str) -> None:
    lie = 0xFFFFFFFF
    head = struct.pack("<BBBBII", 1, RAW, RAW, 0, lie if field == "packed" else 512, lie if field == "misfits" else 0)
    frame = build("planes", word_bytes=1, size_bytes=4096, check=0, planes=[Plane(NARROW, 1, head + bytes(512))])
    assert _peak(frame, 4096) < 1 << 20


def test_nothing_is_allocated_when_the_header_claims_more_than_a_chunk_may_hold() -> None:
    size = MAX_CHUNK_BYTES + 1
    frame = build("planes", word_bytes=1, size_bytes=size, check=0, planes=[Plane(ZSTD, 1, b"x")])
    assert _peak(frame, size) < 1 << 20


@pytest.mark.parametrize("flaw", ["no checksum", "no size", "two frames", "trailing", "skippable", "cut"])
def test_integrity_error_when_a_plane_is_not_exactly_one_checked_zstd_frame(flaw: str) -> None:
    plain = bytes(1000)
    good = zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    bad = {
        "no checksum": zstandard.ZstdCompressor(write_checksum=False).compress(plain),
        "no size": zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(plain),
        "two frames": good + zstandard.ZstdCompressor(write_checksum=True).compress(b""),
        "trailing": good + b"\0",
        "skippable": struct.pack("<II", 0x184D2A50, 1000) + plain,
        "cut": good[:-1],
    }[flaw]
    # The digest of the plain bytes is right, so only the plane itself can give it away.
    check = struct.unpack_from("<Q", encode(plain, dtype="uint8").frame, 12)[0]
    assert bytes(decode(_single(good, check), size_bytes=1000)) == plain
    with pytest.raises(IntegrityError):
        decode(_single(bad, check), size_bytes=1000)


def _single(payload: bytes, check: int) -> bytes:
    return build("zstd", word_bytes=1, size_bytes=1000, check=check, planes=[Plane(ZSTD, 1, payload)])


def test_plain_digest_catches_it_when_a_raw_plane_is_damaged() -> None:
    plain, base, encoded = SAMPLES["raw"]
    for at in range(40, len(encoded.frame), 211):
        frame = bytearray(encoded.frame)
        frame[at] ^= 0x10
        with pytest.raises(IntegrityError, match="digest"):
            decode(bytes(frame), size_bytes=len(plain), base=base)


@pytest.mark.parametrize("num_misfits", [0, 2, 3, 9])
def test_integrity_error_when_a_narrow_plane_has_another_number_of_misfits(num_misfits: int) -> None:
    # Four of 64 one-bit elements are escapes, so exactly four values must follow.
    packed, misfits = bytes([0b1111, *bytes(7)]), bytes(num_misfits)
    payload = struct.pack("<BBBBII", 1, RAW, RAW, 0, len(packed), len(misfits)) + packed + misfits
    frame = build("planes", word_bytes=1, size_bytes=64, check=0, planes=[Plane(NARROW, 1, payload)])
    with pytest.raises(IntegrityError, match="misfits"):
        decode(frame, size_bytes=64)


def test_little_memory_is_used_when_the_misfits_are_a_bomb() -> None:
    size, packed = 256 << 20, bytes([1, *bytes(511)])
    payload = struct.pack("<BBBBII", 1, RAW, ZSTD, 0, len(packed), size) + packed + _bomb(size, content_size=True)
    frame = build("planes", word_bytes=1, size_bytes=4096, check=0, planes=[Plane(NARROW, 1, payload)])
    assert _peak(frame, 4096) < 1 << 20


@pytest.mark.parametrize("groups", [(1, 2, 1), (4,), (1, 1), (2, 2, 2), (1, 1, 1, 1, 1)])
def test_integrity_error_when_planes_do_not_fit_the_word(groups: tuple[int, ...]) -> None:
    planes = [Plane(RAW, size, bytes(16 * size)) for size in groups]
    frame = build("planes", word_bytes=4, size_bytes=64, check=0, planes=planes)
    with pytest.raises(IntegrityError):
        decode(frame, size_bytes=64)
