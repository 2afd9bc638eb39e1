"""The C kernels: copying exactly, and doing without where they can't be had."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptstore import codec, native
from ckptstore.dcp.portions import Copy, run
from ckptstore.dcp.stage import _is_plain, _portions
from ckptstore.native import build
from ckptstore.ops.doctor import kernels

ROOM = 1 << 20


def test_the_kernels_are_there() -> None:
    assert native.is_available()
    assert kernels().state == "ok"


@pytest.mark.parametrize(
    "size", [0, 1, 15, 63, 64, 65, 4095, (32 << 10) - 1, 32 << 10, (32 << 10) + 1, 100_001, 524_288]
)
def test_copy_moves_these_bytes_and_no_others(size: int) -> None:
    source = np.random.default_rng(size).integers(0, 256, ROOM, np.uint8)
    for to, at in ((0, 0), (1, 0), (0, 3), (17, 63), (64, 64), (4095, 1)):
        target = np.zeros(ROOM, np.uint8)
        native.copy([target.ctypes.data + to], [source.ctypes.data + at], [size])
        assert np.array_equal(target[to : to + size], source[at : at + size])
        assert not target[:to].any()
        assert not target[to + size :].any()


def test_copy_takes_many_at_once() -> None:
    sources = [np.full(size, i + 1, np.uint8) for i, size in enumerate([1, 100_000, 0, 33_000, 7])]
    targets = [np.zeros(len(s) + 1, np.uint8) for s in sources]
    native.copy([t.ctypes.data for t in targets], [s.ctypes.data for s in sources], [len(s) for s in sources])
    for source, target in zip(sources, targets, strict=True):
        assert np.array_equal(target[:-1], source)
        assert target[-1] == 0


def _odd_sources() -> list[torch.Tensor]:
    """Everything that a plain copy of memory would get wrong, and long and short tensors that it gets right."""
    torch.manual_seed(0)
    complex_ = torch.randn(300, 70, dtype=torch.complex64)
    return [
        torch.randn(3_000_000),
        torch.randn(40, 50).t(),
        torch.randn(2000, 1000)[:, ::2],
        torch.randn(2_000_000)[1:],
        complex_.conj(),
        complex_.conj().imag,
        torch.randn(700, 900).expand(2, 700, 900),
        torch.tensor(3.5),
        torch.randn(0, 7),
        torch.randn(1, 2_500_000),
        torch.randint(0, 255, (1_000_003,), dtype=torch.uint8),
    ]


def test_memory_of_a_device_is_left_to_torch() -> None:
    assert _is_plain(torch.empty(3))
    assert not _is_plain(torch.empty(3, device="meta"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_stage_copies_any_strided_tensor(with_kernels: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_kernels:
        monkeypatch.setattr(native, "_kernels", None)
    sources = _odd_sources()
    targets = [torch.empty(s.shape, dtype=s.dtype) for s in sources]
    run(_portions([Copy(t, s, t.nbytes) for t, s in zip(targets, sources, strict=True)]), threads)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("int ckptstore_abi(void) { return 0; }", "another version"),
        ("int ckptstore_something(void) { return 0; }", "no version"),
        (None, "not built"),
        ("damaged", "damaged"),
    ],
)
def test_what_cannot_be_used_is_left_alone(source: str | None, why: str, tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    if source == "damaged":
        library.write_bytes(b"\x7fELF" + bytes(100))
    elif source is not None:
        (tmp_path / "other.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    assert native._load(library) is None, why


def test_a_host_may_do_without(tmp_path: Path) -> None:
    code = (
        "from ckptstore import native; from ckptstore.ops.doctor import kernels; import sys\n"
        "print(native.is_available(), kernels().state, kernels().detail)\n"
        "native.copy([], [], [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "CKPTSTORE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "False ok switched off by CKPTSTORE_NATIVE=0\n"
    assert "RuntimeError: the C kernels are not available here" in done.stderr


def test_doctor_warns_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernels", None)
    check = kernels()
    assert check.state == "warning"
    assert check.fix is not None


def test_building_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(b"of an older source")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    assert build.compile_kernels(library) == "there is no C compiler (no-such-compiler)"
    monkeypatch.setenv("CC", "false")
    assert build.compile_kernels(library) == "false failed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiler", [c for c in ("cc", "cc -DPLAIN", "clang") if shutil.which(c.split()[0])])
def test_any_build_does_the_same(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.random.default_rng(1).standard_normal(300_001).astype(np.float32)
    base = plain + np.float32(1e-4)
    kept = [codec.encode(plain.tobytes(), dtype="float32", base=b) for b in (None, base.tobytes())]
    monkeypatch.setenv("CC", compiler)
    library = tmp_path / "kernels.so"
    assert build.compile_kernels(library) is None
    monkeypatch.setattr(native, "_kernels", native._load(library))
    assert native.is_available()
    for encoded, against in zip(kept, (None, base.tobytes()), strict=True):
        assert codec.encode(plain.tobytes(), dtype="float32", base=against) == encoded
        assert codec.decode(encoded.frame, size_bytes=plain.nbytes, base=against) == plain.tobytes()
