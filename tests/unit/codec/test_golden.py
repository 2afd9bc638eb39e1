"""Frames written by earlier versions decode to the same bytes for ever.

``golden_frames.json`` holds one frame for each chain and kind of plane. It is never regenerated for an existing frame
version: a failing case means that stored checkpoints became unreadable. ``python test_golden.py`` adds missing cases.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent / "golden_frames.json"

if __name__ == "__main__":
    sys.path.insert(0, str(PATH.parent))

from chunks import chunk, noise, stepped, words  # noqa: E402

from ckptstore.codec import decode, encode  # noqa: E402
from ckptstore.codec.frame import EVEN, NARROW, RAW, ZSTD  # noqa: E402


def _rows() -> bytes:
    high = (np.arange(900, dtype="<u4") // 40 % 20 * 11 + noise(900, 5).astype("<u4") % 2) << 23
    return (words("weights", 4, 900, 3) & np.uint32(0x007FFFFF) | high).tobytes()


def _halves() -> bytes:
    master = words("weights", 4, 900, 4)
    return ((master + 0x7FFF + (master >> 16 & 1)) >> 16).astype("<u2").tobytes()


#: name -> (dtype, plain bytes, base or master)
CASES: dict[str, tuple[str, bytes, bytes | None]] = {
    "raw-random": ("float32", chunk("random", 4, 100), None),
    "raw-empty": ("float32", b"", None),
    "zstd-int64": ("int64", np.arange(300, dtype="<i8").tobytes(), None),
    "planes-float8": ("float8_e4m3fn", chunk("weights", 1, 2000), None),
    "planes-bfloat16": ("bfloat16", chunk("weights", 2, 1000), None),
    "planes-float16": ("float16", chunk("weights", 2, 1000, 1), None),
    "planes-float32": ("float32", chunk("weights", 4, 600), None),
    "planes-float32-tail": ("float32", chunk("weights", 4, 600, tail=3), None),
    "planes-float64": ("float64", chunk("weights", 8, 400), None),
    "planes-complex64": ("complex64", chunk("weights", 4, 600), None),
    "planes-even": ("float32", chunk("positive", 4, 700), None),
    "planes-narrow": ("bfloat16", chunk("sparse", 2, 4000), None),
    "planes-lag": ("float32", _rows(), None),
    "delta-bfloat16": ("bfloat16", chunk("weights", 2, 1500), stepped(chunk("weights", 2, 1500), 2, 1, 2)),
    "delta-float16": ("float16", chunk("weights", 2, 1500, 1), stepped(chunk("weights", 2, 1500, 1), 2, 1, 9)),
    "delta-float32": ("float32", chunk("weights", 4, 900), stepped(chunk("weights", 4, 900), 4, 1, 300)),
    "delta-float64": ("float64", chunk("weights", 8, 500), stepped(chunk("weights", 8, 500), 8, 1)),
    "derived": ("bfloat16", _halves(), words("weights", 4, 900, 4).tobytes()),
}
FRAMES: dict[str, str] = json.loads(PATH.read_text()) if PATH.exists() else {}


@pytest.mark.parametrize("name", CASES)
def test_frame_decodes_when_an_earlier_version_wrote_it(name: str) -> None:
    _, plain, base = CASES[name]
    assert bytes(decode(base64.b64decode(FRAMES[name]), size_bytes=len(plain), base=base)) == plain


@pytest.mark.parametrize("name", CASES)
def test_case_covers_its_chain_when_read_from_the_file(name: str) -> None:
    dtype, plain, base = CASES[name]
    master = base if name == "derived" else None
    encoded = encode(plain, dtype=dtype, base=base, master=master)
    assert encoded.codec == name.split("-")[0]
    # Same layout: equal up to what another zstd release may do to its payloads.
    assert encoded.frame[:8] == base64.b64decode(FRAMES[name])[:8]


def test_file_holds_a_frame_for_every_case_and_every_kind_of_plane() -> None:
    assert FRAMES.keys() == CASES.keys()
    frames = {name: base64.b64decode(text) for name, text in FRAMES.items()}
    entries = {n: [struct.unpack_from("<BBHII", f, 20 + 12 * i) for i in range(f[7])] for n, f in frames.items()}
    assert {mode for table in entries.values() for mode, *_ in table} == {RAW, ZSTD, NARROW, EVEN}
    assert any(mode == NARROW for mode, *_ in entries["planes-narrow"])
    assert any(lag for *_, lag, _ in entries["planes-lag"])


def _main() -> None:
    for name, (dtype, plain, base) in CASES.items():
        if name not in FRAMES:
            master = base if name == "derived" else None
            frame = encode(plain, dtype=dtype, base=base, master=master).frame
            FRAMES[name] = base64.b64encode(frame).decode()
    PATH.write_text(json.dumps(FRAMES, indent=1) + "\n")


if __name__ == "__main__":
    _main()
