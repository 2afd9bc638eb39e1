"""What the codec chain stores and what it costs, on genuine training states, against zstd-3, zipnn and DCP's own zstd.

::

    python benchmarks/codec.py [--width 1024 --layers 2 --steps 120] [--rounds 5] [--cache FILE]

Trains the states itself (:mod:`training_states`, a few CPU minutes; ``--cache`` keeps them), stores every tensor in
chunks of 2^20 elements, checks that each chunk comes back, prints a table and writes ``results/codec.json``. Sizes
include frame headers. Throughput is plain bytes per second of one core's CPU time with an xxh3_128 digest of each
chunk included for every contender; contenders take turns within a round, and ratios are medians over the rounds.
zipnn takes part when it is installed (``pip install zipnn``); DCP's ``ZStandard`` stream extension is run as its writer
runs it, one stream a tensor, here a chunk, without the writer around it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are imported
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import xxhash
import zstandard
from torch.distributed.checkpoint._extension import ZStandard
from training_states import Size, State, load_or_make

from ckptstore.codec import decode, encode

CHUNK_ELEMENTS = 1 << 20
WIDTH = {"bfloat16": 2, "float32": 4}
RESULTS = Path(__file__).parent / "results" / "codec.json"


@dataclass(frozen=True)
class Chunk:
    """One chunk of a state and what it may be encoded against."""

    kind: str
    dtype: str
    row: int
    plain: bytes
    base: bytes | None
    master: bytes | None


@dataclass(frozen=True)
class Row:
    """One line of the table; ``must`` and ``aim`` are upper bounds, lower ones when ``more_is_better``."""

    name: str
    value: float
    must: float | None = None
    aim: float | None = None
    more_is_better: bool = False
    note: str = ""

    def verdict(self) -> str:
        """aim, must, missed, or nothing for figures without a bound."""
        if self.must is None or self.aim is None:
            return ""
        sign = -1 if self.more_is_better else 1
        if sign * self.value <= sign * self.aim:
            return "aim"
        return "must" if sign * self.value <= sign * self.must else "MISSED"


def chunks(states: dict[str, State], scenario: str, rows: dict[str, int]) -> Iterator[Chunk]:
    """The chunks of a state, with the state ten steps before as base where there is one."""
    earlier = states.get(scenario.removesuffix("+10"), {}) if scenario.endswith("+10") else {}
    state = states[scenario]
    for name, (dtype, data) in state.items():
        kind = name.rpartition(".")[2] if name.startswith("optim.") else name.partition(".")[0]
        step = CHUNK_ELEMENTS * WIDTH[dtype]
        master = state.get("master." + name.removeprefix("model.")) if name.startswith("model.") else None
        for at in range(0, len(data), step):
            yield Chunk(
                kind,
                dtype,
                rows.get(name, 0),
                data[at : at + step].tobytes(),
                earlier[name][1][at : at + step].tobytes() if name in earlier else None,
                None if master is None or dtype == "float32" else master[1][2 * at : 2 * (at + step)].tobytes(),
            )


def stored(chunk: Chunk, *, with_base: bool = False, with_master: bool = False) -> int:
    """Bytes a remote would take for the chunk; 0 when it equals its base. Checks that it comes back."""
    base = chunk.base if with_base else None
    if base == chunk.plain:
        return 0
    encoded = encode(
        chunk.plain, dtype=chunk.dtype, base=base, master=chunk.master if with_master else None, row=chunk.row
    )
    against = chunk.master if encoded.codec == "derived" else base
    assert decode(encoded.frame, size_bytes=len(chunk.plain), base=against) == chunk.plain
    return len(encoded.frame)


class Figures:
    """Sizes over the chunks of one scenario."""

    def __init__(self, states: dict[str, State], scenario: str, rows: dict[str, int]) -> None:
        self.chunks = list(chunks(states, scenario, rows))

    def _sum(self, size: Callable[[Chunk], int], kind: str | None) -> int:
        return sum(size(c) for c in self.chunks if kind in (None, c.kind))

    def plain(self, kind: str | None = None) -> int:
        """Plain bytes."""
        return self._sum(lambda c: len(c.plain), kind)

    def ours(self, kind: str | None = None, **options: bool) -> int:
        """Stored bytes."""
        return self._sum(lambda c: stored(c, **options), kind)

    def zstd(self, kind: str | None = None) -> int:
        """Bytes under zstd-3."""
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        return self._sum(lambda c: len(compressor.compress(c.plain)), kind)


def sizes(states: dict[str, State], rows: dict[str, int], zipnn: Any) -> list[Row]:
    """The rows about bytes."""
    mixed, mixed10 = Figures(states, "mixed", rows), Figures(states, "mixed+10", rows)
    fp32, fp3210 = Figures(states, "fp32", rows), Figures(states, "fp32+10", rows)
    table = [
        Row("bf16 weights, no base", mixed.ours("model") / mixed.plain("model"), 0.675, 0.66),
        Row("fp32 weights, no base", fp32.ours("model") / fp32.plain("model"), 0.840, 0.83),
        Row("mixed AdamW state, no base", mixed.ours(with_master=True) / mixed.plain(), 0.72, 0.70),
        Row("mixed AdamW state, +10", mixed10.ours(with_base=True, with_master=True) / mixed.plain(), 0.66, 0.63),
    ]
    for scenario, name, must, aim in (
        ("mixed+10", "lr 6e-5", 1 / 2.3, 1 / 2.7),
        ("tune-1e-5+10", "lr 1e-5", 1 / 3.5, 1 / 5),
        ("tune-1e-6+10", "lr 1e-6", 1 / 10, 1 / 15),
    ):
        figures = Figures(states, scenario, rows)
        ours, theirs = figures.ours("model", with_base=True), figures.zstd("model")
        note = f"1/{theirs / ours:.2f}; {ours / figures.plain('model'):.4f} of plain"
        table.append(Row(f"bf16 weights +10, {name}, vs zstd-3", ours / theirs, must, aim, note=note))
    for scenario in ("lora", "frozen"):
        later = Figures(states, f"{scenario}+10", rows)
        full, upload = later.ours(), later.ours(with_base=True)
        note = f"1/{full / upload:.0f} of our own full upload"
        table.append(Row(f"{scenario}, upload +10 vs full", upload / full, 1 / 28, 1 / 50, note=note))
    moments = ("exp_avg", "exp_avg_sq")
    table += [Row(f"{kind}, no base", mixed.ours(kind) / mixed.plain(kind)) for kind in moments]
    table += [
        Row(f"{kind}, +10", mixed10.ours(kind, with_base=True) / mixed.plain(kind)) for kind in ("master", *moments)
    ]
    table.append(Row("fp32 AdamW state, no base", fp32.ours() / fp32.plain()))
    table.append(Row("fp32 AdamW state, +10", fp3210.ours(with_base=True) / fp3210.plain()))
    sparse = Figures(states, "sparse+10", rows)
    table.append(Row("sparse embedding state, +10", sparse.ours(with_base=True) / sparse.plain()))
    table.append(Row("zstd-3: mixed AdamW state", mixed.zstd() / mixed.plain()))
    table.append(Row("zstd-3: fp32 AdamW state", fp32.zstd() / fp32.plain()))
    table.append(
        Row("DCP zstd extension: mixed AdamW state", sum(len(by_dcp(c.plain)) for c in mixed.chunks) / mixed.plain())
    )
    if zipnn is not None:
        size = sum(len(zipnn[c.dtype].compress(bytearray(c.plain))) for c in mixed.chunks if len(c.plain) > 64)
        table.append(Row("zipnn: mixed AdamW state", size / mixed.plain()))
    return table


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def throughput(states: dict[str, State], rows: dict[str, int], zipnn: Any, rounds: int) -> list[Row]:
    """The rows about CPU time, on the fp32 AdamW state without its scalars."""
    work = [c for c in chunks(states, "fp32", rows) if len(c.plain) > 4096]
    total = sum(len(c.plain) for c in work)
    zstd, unzstd = zstandard.ZstdCompressor(level=3, write_checksum=True), zstandard.ZstdDecompressor()
    out = bytearray(max(len(c.plain) for c in work))

    digest = xxhash.xxh3_128_hexdigest
    encoders: dict[str, Callable[[Chunk, Any, str | None], Any]] = {
        "ours": lambda c, plain, known: encode(plain, dtype=c.dtype, row=c.row, digest=known).frame,
        "zstd-3": lambda c, plain, known: zstd.compress(plain),
        "DCP zstd": lambda c, plain, known: by_dcp(plain),
    }
    decoders: dict[str, Callable[[Chunk, Any], Any]] = {
        "ours": lambda c, f: decode(f, size_bytes=len(c.plain), out=memoryview(out)[: len(c.plain)]),
        "zstd-3": lambda c, f: unzstd.decompress(f),
        "DCP zstd": lambda c, f: _DCP.transform_from(io.BytesIO(f)).read(),
    }
    if zipnn is not None:
        encoders["zipnn"] = lambda c, plain, known: zipnn[c.dtype].compress(plain)
        decoders["zipnn"] = lambda c, f: zipnn[c.dtype].decompress(f)
    seconds: dict[tuple[str, str], list[float]] = {}

    # Whoever stores a chunk checks it against its digest first, and a reader what comes out.
    # Results are dropped one by one, as an uploader does, so that the allocator can reuse their memory.
    def encode_all(name: str, plains: list[bytearray]) -> None:
        for c, plain in zip(work, plains, strict=True):
            encoders[name](c, plain, digest(plain))

    def decode_all(name: str, frames: list[Any]) -> None:
        for c, frame in zip(work, frames, strict=True):
            decoders[name](c, frame)
            digest(c.plain)

    for _ in range(rounds):
        for name in encoders:
            # Everyone gets copies: zipnn shuffles the bytes of its input in place.
            copies = [bytearray(c.plain) for c in work]
            spent = _cpu(lambda name=name, copies=copies: encode_all(name, copies))
            seconds.setdefault((name, "encode"), []).append(spent)
            frames = [encoders[name](c, bytearray(c.plain), None) for c in work]
            spent = _cpu(lambda name=name, frames=frames: decode_all(name, frames))
            seconds.setdefault((name, "decode"), []).append(spent)

    def ratio(other: str, way: str) -> float:
        pairs = zip(seconds[other, way], seconds["ours", way], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    table = [
        Row(f"{name}: {way}, GB/s per core", total / statistics.median(spent) / 1e9)
        for (name, way), spent in seconds.items()
    ]
    table.append(Row("encode vs zstd-3", ratio("zstd-3", "encode"), 1.2, 2.5, more_is_better=True))
    table.append(Row("encode vs DCP zstd", ratio("DCP zstd", "encode")))
    table.append(Row("decode vs DCP zstd", ratio("DCP zstd", "decode")))
    if zipnn is not None:
        table.append(Row("encode vs zipnn", ratio("zipnn", "encode"), 1.5, 3.0, more_is_better=True))
        table.append(Row("decode vs zipnn", ratio("zipnn", "decode")))
    table.append(Row("decode vs zstd-3", ratio("zstd-3", "decode"), 0.8, 1.5, more_is_better=True))
    return table


_DCP = ZStandard()


class _Kept(io.BytesIO):
    """What DCP's stream writes to: closing the stream must not throw it away."""

    def close(self) -> None:
        """Stay open."""


def by_dcp(plain: bytes | bytearray) -> bytes:
    """The bytes that stock DCP stores for this much of a tensor, with its compression switched on."""
    kept = _Kept()
    stream = _DCP.transform_to(kept)
    stream.write(plain)
    stream.close()
    return kept.getvalue()


def _zipnn() -> Any:
    """dtype -> a zipnn coder of one thread, or None."""
    try:
        import zipnn
    except ImportError:
        return None
    return {d: zipnn.ZipNN(bytearray_dtype=d, input_format="byte", threads=1) for d in WIDTH}


def _rows(size: Size) -> dict[str, int]:
    """Elements of each tensor's last dimension, by stored name; a checkpoint's manifest knows the shapes."""
    from training_states import GPT, LoRA

    model = GPT(size)
    shapes = {n: p.shape[-1] for n, p in model.named_parameters()}
    for index, block in enumerate(model.blocks):
        for part in ("q", "v"):
            shapes |= {f"blocks.{index}.{part}.{n}": p.shape[-1] for n, p in LoRA(block.q).named_parameters()}
    shapes["weight"] = 64
    names = {f"{prefix}.{n}": row for prefix in ("model", "master") for n, row in shapes.items()}
    return names | {f"optim.{n}.{k}": row for k in ("exp_avg", "exp_avg_sq") for n, row in shapes.items()}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, value in asdict(Size()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    size = Size(**{field: getattr(options, field) for field in asdict(Size())})
    states = load_or_make(size, options.cache)
    zipnn, rows = _zipnn(), _rows(size)
    table = sizes(states, rows, zipnn) + throughput(states, rows, zipnn, options.rounds)
    print(f"{'':44} {'value':>8} {'must':>7} {'aim':>7}")
    for row in table:
        bounds = "".join(f" {'' if b is None else f'{b:.3f}':>7}" for b in (row.must, row.aim))
        print(f"{row.name:44} {row.value:8.4f}{bounds}  {row.verdict():6} {row.note}")
    document = {
        "benchmark": "codec",
        "machine": {"cpus": os.cpu_count(), "arch": platform.machine(), "python": platform.python_version()},
        "versions": {"numpy": np.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))},
        "arguments": asdict(size) | {"rounds": options.rounds},
        "rows": [asdict(row) | {"verdict": row.verdict()} for row in table],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
