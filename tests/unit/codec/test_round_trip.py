"""Whatever goes in comes out, bit for bit, through whichever chain was taken."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import xxhash
from chunks import KINDS, OPAQUE, WIDTHS, base_of, chunk, stepped, words
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.codec import MAX_CHUNK_BYTES, decode, derive, encode, rounded
from ckptstore.codec.base import BLOCK

DTYPES = (*WIDTHS, *OPAQUE)
COUNTS = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 4097, 20_000]))


@settings(max_examples=250, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    count=COUNTS,
    tail=st.integers(0, 7),
    seed=st.integers(0, 50),
    base=st.sampled_from(["none", "equal", "near", "far", "other size"]),
    row=st.sampled_from([0, 1, 7, 64, 100_000]),
    compress=st.booleans(),
)
def test_bytes_come_back_when_encoded_in_any_way(
    dtype: str, kind: str, count: int, tail: int, seed: int, base: str, row: int, compress: bool
) -> None:
    width = WIDTHS.get(dtype, 4)
    plain = chunk(kind, width, count, seed, tail)
    old = base_of(base, plain, kind, width, count, seed, tail)
    encoded = encode(plain, dtype=dtype, base=old, row=row, compress=compress)
    assert bytes(decode(encoded.frame, size_bytes=len(plain), base=old)) == plain
    assert len(encoded.frame) <= len(plain) + 32
    known = xxhash.xxh3_128_hexdigest(plain)
    assert encode(plain, dtype=dtype, base=old, row=row, digest=known, compress=compress) == encoded


@settings(max_examples=150, deadline=None)
@given(plain=st.binary(max_size=3000), base=st.binary(max_size=3000), dtype=st.sampled_from(DTYPES))
def test_bytes_come_back_when_they_are_arbitrary(plain: bytes, base: bytes, dtype: str) -> None:
    old = (base * (len(plain) // max(1, len(base)) + 1))[: len(plain)] if base else None
    encoded = encode(plain, dtype=dtype, base=old)
    assert bytes(decode(encoded.frame, size_bytes=len(plain), base=old)) == plain


@pytest.mark.parametrize("width,dtype", [(1, "float8_e5m2"), (2, "bfloat16"), (4, "float32"), (8, "float64")])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_pattern_comes_back_when_stepped_across_zero_nan_and_infinity(
    width: int, dtype: str, kind: str
) -> None:
    plain = chunk(kind, width, 70_000, 3)
    old = stepped(plain, width, 4, spread=2)
    encoded = encode(plain, dtype=dtype, base=old)
    assert encoded.codec == "delta" or kind not in ("random", "weights", "positive")
    assert bytes(decode(encoded.frame, size_bytes=len(plain), base=old)) == plain


@pytest.mark.parametrize("width,dtype", [(1, "float8_e5m2"), (2, "bfloat16"), (4, "float32"), (8, "float64")])
@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_bytes_come_back_when_a_chunk_ends_near_a_block(width: int, dtype: str, count: int) -> None:
    plain = chunk("weights", width, count, 2, tail=width - 1)
    for old in (None, stepped(plain, width, 1)):
        encoded = encode(plain, dtype=dtype, base=old)
        assert bytes(decode(encoded.frame, size_bytes=len(plain), base=old)) == plain


def test_all_bf16_patterns_come_back_when_delta_meets_each_other() -> None:
    every = np.arange(65_536, dtype="<u2")
    for shift in (1, 0x7FFF, 0x8000):
        old = (every + np.uint16(shift)).tobytes()
        encoded = encode(every.tobytes(), dtype="bfloat16", base=old)
        assert bytes(decode(encoded.frame, size_bytes=2 * 65_536, base=old)) == every.tobytes()


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_serves_when_it_is_contiguous(wrap: type) -> None:
    plain, old = chunk("weights", 4, 5000), chunk("weights", 4, 5000, 0)
    encoded = encode(wrap(plain), dtype="float32", base=wrap(old))
    assert bytes(decode(wrap(encoded.frame), size_bytes=len(plain), base=wrap(old))) == plain


def test_typed_memoryviews_serve_when_lengths_are_not_bytes() -> None:
    numbers = np.frombuffer(chunk("weights", 4, 5000), np.float32)
    encoded = encode(numbers.data, dtype="float32", base=numbers.data)
    assert encoded.codec == "delta"
    assert bytes(decode(encoded.frame, size_bytes=numbers.nbytes, base=numbers.data)) == numbers.tobytes()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("kind", ["weights", "random", "positive"])
def test_decodes_in_place_when_out_is_given_at_any_alignment(kind: str, offset: int) -> None:
    plain = chunk(kind, 4, 10_000)
    arena = bytearray(len(plain) + 8)
    out = memoryview(arena)[offset : offset + len(plain)]
    got = decode(encode(plain, dtype="float32").frame, size_bytes=len(plain), out=out)
    assert got is out
    assert bytes(arena[offset : offset + len(plain)]) == plain
    assert not any(arena[:offset])
    assert not any(arena[offset + len(plain) :])


@pytest.mark.parametrize("count", [1000, (1 << 18) + 77])
def test_delta_is_undone_where_its_base_lies_when_both_are_one_memory(count: int) -> None:
    base = np.frombuffer(chunk("weights", 4, count), np.float32)
    plain = (base * np.float32(1 + 1e-6)).tobytes()
    encoded = encode(plain, dtype="float32", base=base.tobytes())
    assert encoded.codec == "delta"
    memory = memoryview(bytearray(base.tobytes()))
    decode(encoded.frame, size_bytes=len(plain), base=memory, out=memory)
    assert bytes(memory) == plain


@pytest.mark.parametrize("bad", ["short", "long", "read-only", "strided"])
def test_out_is_refused_when_it_does_not_fit(bad: str) -> None:
    plain = chunk("weights", 4, 1000)
    out = {
        "short": memoryview(bytearray(3999)),
        "long": memoryview(bytearray(4001)),
        "read-only": memoryview(bytes(4000)),
        "strided": memoryview(bytearray(8000))[::2],
    }[bad]
    with pytest.raises(ValueError, match="out must be"):
        decode(encode(plain, dtype="float32").frame, size_bytes=4000, out=out)


def test_encode_refuses_when_the_chunk_is_too_large() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode(memoryview(bytearray(MAX_CHUNK_BYTES + 1)), dtype="uint8", compress=False)


@pytest.mark.parametrize("size", [1, 239, 240, 241, 242, 1000])
def test_frame_is_the_same_when_the_digest_is_known(size: int) -> None:
    plain = chunk("random", 1, size)
    known = xxhash.xxh3_128_hexdigest(plain)
    assert encode(plain, dtype="uint8", digest=known) == encode(plain, dtype="uint8")


def test_result_stays_when_the_thread_encodes_and_decodes_more() -> None:
    first = chunk("positive", 4, 40_000, 1)
    frame = encode(first, dtype="float32").frame
    copy = bytes(frame)
    got = decode(frame, size_bytes=len(first))
    for seed in range(2, 5):
        other = chunk("weights", 4, 40_000, seed)
        decode(encode(other, dtype="float32", base=first).frame, size_bytes=len(other), base=first)
    assert frame == copy
    assert bytes(got) == first


def test_threads_do_not_disturb_each_other_when_coding_at_once() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(15):
            width = (2, 4, 8)[(seed + i) % 3]
            plain = chunk(KINDS[(seed + i) % len(KINDS)], width, 30_000 + 1000 * seed, seed * 31 + i)
            old = stepped(plain, width, i) if i % 2 else None
            encoded = encode(plain, dtype={2: "bfloat16", 4: "float32", 8: "float64"}[width], base=old)
            if bytes(decode(encoded.frame, size_bytes=len(plain), base=old)) != plain:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bf16_is_derived_when_it_is_its_master_rounded() -> None:
    master = words("weights", 4, BLOCK + 1, 2)
    # Round to nearest even, said another way than the code says it.
    half, odd = master & 0xFFFF, master >> 16 & 1
    up = (half > 0x8000) | ((half == 0x8000) & (odd == 1))
    plain = ((master >> 16) + up).astype("<u2").tobytes()
    encoded = encode(plain, dtype="bfloat16", master=master.tobytes())
    assert encoded.codec == "derived"
    assert len(encoded.frame) < 32
    assert bytes(decode(encoded.frame, size_bytes=len(plain), base=master.tobytes())) == plain


@pytest.mark.parametrize("at", [0, BLOCK])
def test_bf16_is_not_derived_when_one_number_differs(at: int) -> None:
    master = words("weights", 4, BLOCK + 1, 2) & np.uint32(0xFFFF0000)
    numbers = (master >> 16).astype("<u2")
    numbers[at] ^= 1
    encoded = encode(numbers.tobytes(), dtype="bfloat16", master=master.tobytes())
    assert encoded.codec == "planes"
    assert bytes(decode(encoded.frame, size_bytes=numbers.nbytes)) == numbers.tobytes()


def test_rounding_agrees_with_torch_when_numbers_are_not_nan() -> None:
    torch = pytest.importorskip("torch")
    master = np.concatenate([words("random", 4, 50_000, 5), words("special", 4, 1000, 6), words("weights", 4, 1000, 7)])
    master = master[np.isfinite(master.view("<f4")) | (master & 0x7FFFFF == 0)]
    tie = (master & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    master = np.concatenate([master, tie[np.isfinite(tie.view("<f4"))]])
    plain = torch.from_numpy(master.view("<f4").copy()).bfloat16().view(torch.uint8).numpy().tobytes()
    assert encode(plain, dtype="bfloat16", master=master.tobytes()).codec == "derived"


@pytest.mark.parametrize("kind", ["positive", "sparse", "weights"])
def test_bytes_come_back_when_the_sample_misses_what_differs(kind: str) -> None:
    numbers = words(kind, 4, 300_000, 1)
    for at in (500, 5000, 123_456):  # between the sampled runs
        numbers[at] = 0xFFC12345
    encoded = encode(numbers.tobytes(), dtype="float32")
    assert bytes(decode(encoded.frame, size_bytes=numbers.nbytes)) == numbers.tobytes()


def test_derive_takes_only_what_rounds_to_the_bit() -> None:
    master = np.random.default_rng(5).normal(size=70_000).astype("float32")
    plain = rounded(master.tobytes())
    encoded = derive(plain, master.tobytes())
    assert encoded is not None
    assert encoded.codec == "derived"
    assert decode(encoded.frame, size_bytes=len(plain), base=master.tobytes()) == plain
    assert derive(plain, master.tobytes(), digest=xxhash.xxh3_128_hexdigest(plain)) == encoded
    odd = bytearray(plain)
    odd[-1] ^= 1
    assert derive(bytes(odd), master.tobytes()) is None
    assert derive(plain[:-2], master.tobytes()) is None
    assert derive(b"", b"") is None
