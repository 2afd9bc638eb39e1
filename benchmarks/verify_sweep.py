"""How much of all damage `verify --read-data` finds, and how much `--repair` puts right.

Two saves of two ranks, the second with deltas and references to the first, in a local tier and a bucket. Every file of
either is damaged in every way, one at a time. Writes results/verify_sweep.json.

    python benchmarks/verify_sweep.py [--flips 40]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from ckptstore.config import StoreConfig
from ckptstore.ops.findings import Depth
from ckptstore.ops.open import Place, open_place
from ckptstore.ops.repair import repair
from ckptstore.ops.verify import verify
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import new_save_id, write_checkpoint
from ckptstore.testing.damage import damages

RUN = "run"
FOLDERS = {"commits", "summaries", "shards", "packs"}


def make(folder: Path) -> Place:
    """A local tier and a bucket that hold the same two saves."""
    (folder / "cloud").mkdir(parents=True)
    place = open_place(str(folder / "local"), f"file://{folder}/cloud/bucket", must_exist=False)
    assert isinstance(place.local, LocalTier)
    rng = np.random.default_rng(0)
    state = {f"layer{n}": rng.normal(size=(64, 64)).astype("float32") for n in range(4)}
    remote = RemoteTier(place.blobs["file"], RUN, "file")
    for step in (1, 2):
        path = write_checkpoint(place.local, state, run=RUN, step=step, world_size=2, save_id=new_save_id(step))
        push(place.local, path, RUN, remote, config=StoreConfig())
        state["layer0"] = state["layer0"] * np.float32(1 + 1e-4)
        state["layer1"] = rng.normal(size=(64, 64)).astype("float32")
    return place


def files(folder: Path) -> list[Path]:
    """Every file that belongs to a checkpoint."""
    local = [f for f in (folder / "local" / RUN).glob("step-*/*") if f.is_file()]
    bucket = folder / "cloud" / "bucket" / "runs" / RUN
    return sorted(local) + sorted(f for kind in FOLDERS for f in (bucket / kind).rglob("*") if f.is_file())


def kind_of(file: Path) -> str:
    """``local shard file``, ``remote packs``, ..."""
    if "bucket" in file.parts:
        return "remote " + next(part for part in file.parts if part in FOLDERS)
    return "local " + {".distcp": "shard file"}.get(file.suffix, file.name.rstrip("0123456789"))


def sweep(folder: Path, flips: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Counters ``made``, ``found``, ``repaired`` by "kind of file: kind of damage"."""
    place, rng = make(folder), random.Random(seed)
    tiers = place.tiers(RUN)
    clean = verify(tiers, None, everything=True, read_data=True)
    assert clean.is_clean, clean.findings
    table: dict[str, Counter[str]] = {}
    every = files(folder)
    whole = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    for file in every:
        original = whole[file]
        mates = [f for f in every if f != file and kind_of(f) == kind_of(file) and f.suffix == file.suffix]
        other = whole[mates[0]] if mates else None
        for name, data in damages(original, other, rng, flips=flips):
            count = table.setdefault(f"{kind_of(file)}: {name}", Counter())
            count["made"] += 1
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            found = verify(tiers, None, everything=True, read_data=True)
            count["found"] += found.is_damaged
            if found.is_damaged:
                repair(tiers, found, Depth(read_data=True))
                is_whole = not found.is_damaged and ("bucket" in file.parts or file.read_bytes() == original)
                count["repaired"] += is_whole
                if not is_whole:
                    print(f"not repaired: {kind_of(file)}, {name}: {[f.what for f in found.findings]}")
            else:
                print(f"NOT FOUND: {file}: {name}")
            put_back(folder, whole)
    return table


def put_back(folder: Path, whole: dict[Path, bytes]) -> None:
    """Exactly the files there were: a repair may have sent new packs."""
    for file in [f for f in folder.rglob("*") if f.is_file() and f not in whole]:
        file.unlink()
    for file, data in whole.items():
        if not file.exists() or file.read_bytes() != data:
            file.unlink(missing_ok=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=40, help="single-bit flips per file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = sweep(Path(folder), args.flips)
    total: Counter[str] = Counter()
    for name, count in sorted(table.items()):
        print(f"{name:<40} {count['found']:>5} of {count['made']:>5} found, {count['repaired']:>5} repaired")
        total.update(count)
    print(f"{'together':<40} {total['found']:>5} of {total['made']:>5} found, {total['repaired']:>5} repaired")
    results = {"flips_per_file": args.flips, "total": total, "by_kind": dict(sorted(table.items()))}
    file = Path(__file__).parent / "results" / "verify_sweep.json"
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
