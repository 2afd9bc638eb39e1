"""`ckptctl restore|pull|export|import|drill` as a person or a script meets them."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Result, ckptctl, run_python
from safetensors.torch import load_file

from ckptstore import CheckpointStore, StoreConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two checkpoints in a local tier and a bucket."""
    folder = tmp_path_factory.mktemp("made")
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(folder / "store", remote=f"file://{folder}/bucket", run="bert", config=config) as store:
        for step in (100, 200):
            model = {"w": torch.full((300, 300), float(step)), "b": torch.zeros(3)}
            store.save({"model": model, "extra": {"big": torch.rand(1000, 1000)}, "n": step}, step)
    return folder


def bucket(made: Path) -> str:
    return f"file://{made}/bucket"


def test_only_some_tensors_are_restored_and_load_when_asked_for(made: Path, tmp_path: Path) -> None:
    result = ckptctl(
        "restore", bucket(made), "--to", tmp_path / "w", "--only", "model.*", "--step", "latest~1", "--json"
    )
    assert result.code == 0, result.err
    assert result.json["checkpoint"]["size_bytes"] == 300 * 300 * 4 + 3 * 4
    state = {"model": {"w": torch.zeros(300, 300), "b": torch.ones(3)}}
    store = CheckpointStore(tmp_path / "w", run="bert")
    store.load(state)
    assert state["model"]["w"][0, 0] == 100
    assert ckptctl("-s", tmp_path / "w", "verify", "--read-data").code == 0
    again = ckptctl("restore", bucket(made), "--to", tmp_path / "w", "--only", "model.*", "--step", "100")
    assert again.code == 0, "a container that starts anew repeats itself"
    assert "there already" in again.err
    for other in (["--only", "model.w", "--step", "100"], ["--only", "model.*"]):
        assert ckptctl("restore", bucket(made), "--to", tmp_path / "w", *other).code == 14
    both = CheckpointStore(tmp_path / "w", bucket(made), run="bert").checkpoints()
    assert both[-1].step == 200, "a part never outranks the whole"


def test_a_part_of_the_tensors_is_not_put_beside_whole_checkpoints(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "store", tmp_path / "store")
    assert ckptctl("restore", bucket(made), "--to", tmp_path / "store", "--only", "model.*").code == 14
    assert ckptctl("restore", bucket(made), "--to", tmp_path / "x", "--only", "model.*", "--part", "0/2").code == 2
    none = ckptctl("restore", bucket(made), "--to", tmp_path / "x", "--only", "nothing")
    assert none.code == 23
    assert "ckptctl show STEP lists the names" in none.err
    assert not (tmp_path / "x").exists()


def test_parts_make_a_whole_when_every_node_restores_its_own(made: Path, tmp_path: Path) -> None:
    first = ckptctl("restore", bucket(made), "--to", tmp_path / "x", "--part", "1/2")
    assert first.code == 0, first.err
    assert "still to come" in first.err
    assert ckptctl("restore", bucket(made), "--to", tmp_path / "x", "--part", "0/2").code == 0
    assert CheckpointStore(tmp_path / "x", run="bert").latest() is not None
    assert ckptctl("restore", bucket(made), "--to", tmp_path / "x", "--part", "2/2").code == 2


def test_two_buckets_are_both_read_when_their_schemes_are_the_same(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "bucket", tmp_path / "mirror")
    for pack in (made / "bucket").rglob("*.pack"):
        (tmp_path / "mirror" / pack.relative_to(made / "bucket")).unlink()
    mirror = f"file://{tmp_path}/mirror"  # it has the manifests alone
    for first, second in ((bucket(made), mirror), (mirror, bucket(made))):
        result = ckptctl("restore", first, "--remote", second, "--to", tmp_path / f"from-{first == mirror}")
        assert result.code == 0, result.err


def test_a_terminal_shows_the_rate_and_the_time_left(made: Path, tmp_path: Path) -> None:
    code = (
        "import io, sys\n"
        "class Screen(io.StringIO):\n"
        "    isatty = lambda self: True\n"
        "sys.stderr = screen = Screen()\n"
        "from ckptstore.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print(ascii(screen.getvalue()))\n"
    )
    drawn = run_python("-c", code, "restore", bucket(made), "--to", tmp_path / "x", TERM="xterm").out
    assert "restoring" in drawn
    assert re.search(r"[0-9.]+ MB/s", drawn), "the rate"
    assert re.search(r"[0-9]:[0-9]{2}:[0-9]{2}", drawn), "the time left"
    piped = ckptctl("restore", bucket(made), "--to", tmp_path / "y")
    assert "restoring" not in piped.err


def test_pull_brings_what_the_local_store_lacks(made: Path, tmp_path: Path) -> None:
    result = ckptctl("pull", tmp_path / "new", "--remote", bucket(made), "--all", "--json")
    assert result.code == 0, result.err
    assert [one["checkpoint"]["step"] for one in result.json["pulled"]] == [200, 100]
    again = ckptctl("pull", tmp_path / "new", "--remote", bucket(made), "--step", "100", "--json").json["pulled"]
    assert [one["was_there"] for one in again] == [True]
    assert ckptctl("pull", tmp_path / "new").code == 2


def test_drill_measures_a_recovery_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    result = ckptctl("drill", bucket(made), "--scratch", tmp_path, "--json")
    assert result.code == 0, result.err
    document = result.json
    assert document["checkpoint"]["step"] == 200
    assert document["restore_seconds"] > 0
    assert document["received_bytes"] > 1_000_000
    assert document["age_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "recovery time" in ckptctl("drill", bucket(made)).out
    assert ckptctl("drill", made / "store").code == 2


def test_drill_fails_when_the_bucket_is_damaged(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "bucket", tmp_path / "bucket")
    for pack in (tmp_path / "bucket").rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.write_bytes(data)
    assert ckptctl("drill", f"file://{tmp_path}/bucket").code == 20


@pytest.mark.parametrize("where", ["store", "bucket"])
def test_state_makes_a_round_trip_through_files(made: Path, tmp_path: Path, where: str) -> None:
    source = made / "store" if where == "store" else bucket(made)
    for kind, name in (("safetensors", "m.safetensors"), ("dcp", "dcp"), ("torch", "m.pt")):
        done = ckptctl("-s", source, "export", "200", "--format", kind, "-o", tmp_path / name)
        assert done.code == 0, done.err
        trust = ["--trust-pickle"] if kind == "torch" else []
        arguments = ["-s", tmp_path / "back", "--run", kind, "import", tmp_path / name, "--step", "7", *trust]
        taken = ckptctl(*arguments, "--json")
        assert taken.code == 0, taken.err
        assert taken.json["num_tensors"] == 3
        found, expected = (
            CheckpointStore(tmp_path / "back", run=kind).read(),
            CheckpointStore(made / "store", run="bert").read(),
        )
        assert found["n"] == 200
        assert torch.equal(found["extra"]["big"], expected["extra"]["big"])
        assert ckptctl(*arguments).code == 14, "the step is taken"
        assert ckptctl("-s", source, "export", "200", "--format", kind, "-o", tmp_path / name).code == 14


def test_exported_names_are_as_asked(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    options = ["--only", "model.*", "--strip-prefix", "model.", "--rename", "w=weight", "--dtype", "bfloat16"]
    assert ckptctl("-s", made / "store", "export", "latest~1", "--format", "safetensors", "-o", out, *options).code == 0
    loaded = load_file(out)
    assert loaded.keys() == {"weight", "b"}
    assert loaded["weight"].dtype == torch.bfloat16
    for wrong in (["--rename", "x"], ["--dtype", "int3"], ["--only", "nothing"]):
        result = ckptctl("-s", made / "store", "export", "200", "--format", "dcp", "-o", tmp_path / "x", *wrong)
        assert result.code == (23 if wrong[1] == "nothing" else 2)


def test_pickles_are_not_read_unless_trusted(made: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    result = ckptctl("-s", tmp_path / "s", "import", tmp_path / "m.pt", "--step", "1", "--json")
    assert result.code == 2
    assert "--trust-pickle" in result.error["hint"]
    assert ckptctl("-s", tmp_path / "s", "import", tmp_path / "absent", "--step", "1").code == 2
    assert ckptctl("-s", bucket(made), "import", tmp_path / "m.pt", "--step", "1", "--trust-pickle").code == 2


def test_torch_is_not_imported_unless_the_format_needs_it(made: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom ckptstore.cli import main\nmain(sys.argv[1:])\n"

    def without_torch(*arguments: object) -> Result:
        return run_python("-c", code, *arguments)

    store = made / "store"
    for kind, name in (("safetensors", "m.safetensors"), ("dcp", "dcp")):
        assert without_torch("-s", store, "export", "200", "--format", kind, "-o", tmp_path / name).code == 0
    assert without_torch("-s", tmp_path / "b", "import", tmp_path / "m.safetensors", "--step", "1").code == 0
    refused = without_torch("-s", store, "export", "200", "--format", "torch", "-o", tmp_path / "m.pt")
    assert refused.code == 2
    assert "PyTorch" in refused.err


#: Restores, counting what it reads of packs, and sends itself a signal at the n-th read.
_DYING = """
import os, signal, sys
from ckptstore.blob.local import LocalBlobStore
from ckptstore.cli import main
read, limit, number, count = LocalBlobStore.get, int(sys.argv[1]), int(sys.argv[2]), 0
def get(self, key, **options):
    global count
    count += key.endswith(".pack")
    if count == limit and key.endswith(".pack"):
        os.kill(os.getpid(), number)
    return read(self, key, **options)
LocalBlobStore.get = get
try:
    main(sys.argv[3:])
finally:
    print(count)
"""


@pytest.mark.crash
def test_restore_goes_on_where_it_was_killed_or_stopped(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    with CheckpointStore(tmp_path / "store", url, config=StoreConfig(pack_bytes=1 << 20)) as store:
        state: dict[str, Any] = {f"t{i}": torch.rand(1 << 18) for i in range(12)}
        store.save({"model": state}, 1)
    target = tmp_path / "target"
    arguments = ["restore", url, "--to", str(target), "--json"]
    assert run_python("-c", _DYING, 2, int(signal.SIGKILL), *arguments).code == -signal.SIGKILL
    stopped = run_python("-c", _DYING, 6, int(signal.SIGINT), *arguments)
    assert stopped.code == 130, "Ctrl-C"
    assert stopped.err.strip() == "ckptctl: interrupted"
    assert CheckpointStore(target).checkpoints() == [], "half a checkpoint is none"
    done = run_python("-c", _DYING, 1000, 0, *arguments)
    assert done.code == 0, done.err
    packs = list((tmp_path / "bucket").rglob("*.pack"))
    assert 0 < int(done.out.splitlines()[-1]) < len(packs), "what was there is not fetched again"
    original = next((tmp_path / "store" / "default").glob("step-*"))
    restored = next((target / "default").glob("step-*"))
    for file in original.iterdir():
        assert (restored / file.name).read_bytes() == file.read_bytes(), file.name
    assert not list((target / "default").glob(".staging-*"))
