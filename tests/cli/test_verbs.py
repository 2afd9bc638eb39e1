"""`ckptctl` as a person or a script meets it: text, JSON, exit codes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ckptctl, run_python

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.policy import Retention
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier
from ckptstore.testing.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two checkpoints in a local tier and a bucket."""
    folder = tmp_path_factory.mktemp("made")
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(folder / "store", remote=f"file://{folder}/bucket", run="bert", config=config) as store:
        for step in (100, 200):
            state = {"model": {"w": torch.full((300, 300), float(step)), "b": torch.zeros(3)}, "n": step}
            store.save(state, step, epoch=step // 100, metrics={"val/loss": 1 / step}, tags=["demo"])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def bucket(folder: Path) -> str:
    return f"file://{folder}/bucket"


def test_list_shows_steps_tiers_and_metrics(folder: Path) -> None:
    text = ckptctl("list", folder / "store", "--remote", bucket(folder))
    assert text.code == 0
    header, first, second = text.out.splitlines()
    assert header.split()[:5] == ["STEP", "EPOCH", "AGE", "SIZE", "LOCAL"]
    assert first.split()[0] == "100"
    assert "val/loss=0.005" in second
    document = ckptctl("--json", "list", "-s", folder / "store").json
    assert [c["step"] for c in document["checkpoints"]] == [100, 200]
    assert document["checkpoints"][0]["tiers"] == {"local": "complete"}
    assert [c["step"] for c in ckptctl("list", bucket(folder), "--json").json["checkpoints"]] == [100, 200]


def test_list_tells_which_rule_keeps_what(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    for step in (1, 2, 3):
        write_checkpoint(tier, {"x": np.ones(8, np.float32)}, run="r", step=step, save_id=f"{'a' * 12}-{step}")
    assert "the rules are not known here" in ckptctl("list", tier.root, "--why").out
    rules = asdict(Retention(keep_last=2, keep_best=0))
    journal.append(tier, "r", "rules", [{"time": "2026-01-01T00:00:00.000Z", "local": rules, "remote": rules}])
    said = ckptctl("list", tier.root, "--why").out.splitlines()[-3:]
    assert [line.split(maxsplit=1) for line in said] == [
        ["1", "every tier  no rule keeps it"],
        ["2", "every tier  one of the last 2"],
        ["3", "every tier  one of the last 2"],
    ]
    found = ckptctl("list", tier.root, "--why", "--json").json["checkpoints"]
    assert [each["kept_why"] for each in found][1] == {"local": ["one of the last 2"]}
    # A remote keeps more, and lacks it: the manager won't remove it here before it is there.
    more = asdict(Retention(keep_last=3, keep_best=0))
    record = {"time": "2026-01-01T00:00:01.000Z", "local": rules, "remote": more, "remotes": ["file"]}
    journal.append(tier, "r", "rules", [record])
    found = ckptctl("list", tier.root, "--why", "--json").json["checkpoints"]
    assert found[0]["kept_why"] == {"local": ["no rule keeps it once the remote has it"]}
    found = ckptctl("list", tier.root, "--remote", bucket(tmp_path), "--why", "--json").json["checkpoints"]
    assert found[0]["kept_why"] == {"local": ["still needed"]}


def test_options_stand_before_or_after_the_verb_and_come_from_the_environment(folder: Path) -> None:
    store = folder / "store"
    expected = ckptctl("-s", store, "--json", "list").out
    assert ckptctl("list", "--json", "-s", store).out == expected
    assert ckptctl("list", "--json", CKPTSTORE_LOCAL=str(store)).out == expected


def test_show_lists_tensors(folder: Path) -> None:
    document = ckptctl("-s", folder / "store", "show", "latest", "--json").json
    assert {t["name"]: t["shape"] for t in document["tensors"]} == {"model.w": [300, 300], "model.b": [3]}
    text = ckptctl("-s", folder / "store", "show", "100", "--only", "*.w")
    assert "300x300" in text.out
    assert "model.b" not in text.out


def test_restore_is_byte_equal_and_may_be_repeated(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "fresh"
    first = ckptctl("restore", bucket(folder), "--to", target, "--step", "latest~1", "--json")
    assert first.code == 0, first.err
    assert first.json["checkpoint"]["step"] == 100
    path = Path(first.json["path"])
    original = folder / "store" / "bert" / path.name
    assert {f.name: f.read_bytes() for f in path.iterdir()} == {f.name: f.read_bytes() for f in original.iterdir()}
    assert ckptctl("restore", bucket(folder), "--to", target, "--step", "100", "--json").json["was_there"]
    state = {"model": {"w": torch.zeros(300, 300), "b": torch.ones(3)}, "n": 0}
    with CheckpointStore(target, run="bert") as store:
        store.load(state)
    assert state["n"] == 100


def test_restore_refuses_a_foreign_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = ckptctl("restore", bucket(folder), "--to", tmp_path / "mine")
    assert result.code == 14
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_verify_finds_a_flipped_bit_and_names_the_tensor(folder: Path) -> None:
    store = folder / "store"
    assert ckptctl("-s", store, "--remote", bucket(folder), "verify", "--all", "--read-data").code == 0
    shard = next((store / "bert").glob("step-0000000200*/__0_0.distcp"))
    data = bytearray(shard.read_bytes())
    data[bytes(data).index(torch.full((64,), 200.0).numpy().tobytes()) + 7] ^= 1
    shard.write_bytes(data)
    assert ckptctl("-s", store, "verify").code == 0, "sizes and manifests are fine"
    found = ckptctl("-s", store, "verify", "--read-data", "--json")
    assert found.code == 20
    assert [(f["step"], f["tier"], f["key"]) for f in found.json["findings"]] == [(200, "local", "model.w")]
    shard.write_bytes(data[:-1])
    assert ckptctl("-s", store, "verify", "--all").code == 20


def test_verify_finds_a_missing_pack(folder: Path) -> None:
    next((folder / "bucket").rglob("*.pack")).unlink()
    result = ckptctl("-s", bucket(folder), "verify", "--all")
    assert result.code == 20
    assert "missing" in result.out


def test_push_sends_what_the_remote_lacks_and_then_nothing(folder: Path, tmp_path: Path) -> None:
    other = f"file://{tmp_path}/other"
    first = ckptctl("push", folder / "store", "--remote", other, "--all", "--json")
    assert first.code == 0, first.err
    assert [p["step"] for p in first.json["pushed"]] == [200, 100]
    assert all(p["is_committed"] for p in first.json["pushed"])
    assert ckptctl("push", folder / "store", "--remote", other, "--all", "--json").json["pushed"] == []
    assert ckptctl("push", folder / "store").code == 2


def test_status_says_what_would_be_lost(folder: Path, tmp_path: Path) -> None:
    document = ckptctl("-s", folder / "store", "--remote", f"file://{tmp_path}/empty", "status", "--json").json
    assert [s["step"] for s in document["safety"]] == [200, None]
    assert document["waiting_uploads"] == 2
    text = ckptctl("status", folder / "store", "--remote", bucket(folder))
    assert text.code == 0
    assert "200" in text.out


def test_doctor_tries_each_thing_and_leaves_nothing_behind(folder: Path) -> None:
    result = ckptctl("doctor", folder / "store", "--remote", bucket(folder), "--json")
    assert result.code == 0, result.out
    states = {check["name"]: check["state"] for check in result.json["checks"]}
    assert states["local: commit"] == "ok"
    assert states["file: conditional create"] == "ok"
    assert not list((folder / "bucket").rglob("doctor/*"))
    broken = ckptctl("doctor", "file:///proc/nowhere", "--json")
    assert broken.code == 3
    assert any(check["fix"] for check in broken.json["checks"])


def test_version_needs_no_store() -> None:
    assert ckptctl("version", "--json").json["versions"]["format"] == 1


@pytest.mark.parametrize(
    ("args", "code"),
    [
        pytest.param(["list", "/nowhere/at/all"], 10, id="no store"),
        pytest.param(["list", "file:///nowhere/at/all"], 10, id="no bucket"),
        pytest.param(["-s", "{store}", "show", "300"], 13, id="no such step"),
        pytest.param(["-s", "{store}", "--run", "other", "show"], 13, id="no such run"),
        pytest.param(["-s", "{store}", "show", "newest"], 2, id="no step at all"),
        pytest.param(["list", "ftp://x/y"], 2, id="unknown scheme"),
        pytest.param(["list"], 2, id="no store named"),
        pytest.param(["lsit"], 2, id="no such verb"),
        pytest.param(["restore", "{bucket}", "--to", "x", "--part", "4/2"], 2, id="bad part"),
        pytest.param(["list", "s3://b/p?endpoint=http://127.0.0.1:9"], 12, id="no credentials"),
    ],
)
def test_exit_code_and_json_error(folder: Path, args: list[str], code: int) -> None:
    args = [a.format(store=folder / "store", bucket=bucket(folder)) for a in args]
    result = ckptctl("--json", *args)
    assert result.code == code, result.err
    error = result.error
    assert (error["message_type"], error["code"]) == ("exit_error", code)
    assert error["message"]
    assert "Traceback" not in result.err


def test_several_runs_must_be_told_apart(folder: Path) -> None:
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(folder / "store", run="gpt", config=config) as store:
        store.save({"n": 1}, 1)
    result = ckptctl("-s", folder / "store", "show")
    assert result.code == 2
    assert "bert" in result.err
    assert "gpt" in result.err
    assert {c["run"] for c in ckptctl("list", folder / "store", "--json").json["checkpoints"]} == {"bert", "gpt"}


def test_empty_store_lists_nothing_and_shows_nothing(tmp_path: Path) -> None:
    from ckptstore.repo.local import LocalTier

    LocalTier(tmp_path / "empty").create()
    assert ckptctl("list", tmp_path / "empty", "--json").json["checkpoints"] == []
    assert ckptctl("-s", tmp_path / "empty", "show").code == 13


def test_names_can_not_drive_the_terminal(tmp_path: Path) -> None:
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(tmp_path / "store", config=config) as store:
        store.save({"n": 1}, 1, tags=["\x1b[2Jgone"], metrics={"\x1b]0;x\x07loss": 1.0})
    result = ckptctl("list", tmp_path / "store")
    assert "\x1b" not in result.out
    assert "gone" in result.out


def test_nothing_that_list_does_not_need_is_imported_by_it(folder: Path) -> None:
    """What keeps `ckptctl list` of 1 000 checkpoints below 0.3 s."""
    dear = ["torch", "boto3", "botocore", "oss2", "rich", "numpy", "ckptstore.repo.remote", "ckptstore.repo.reader"]
    code = (
        "import sys; from ckptstore.cli import main\n"
        "try: main(['list', sys.argv[1]])\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"bad = set({dear}) & set(sys.modules); assert not bad, bad"
    )
    done = run_python("-c", code, folder / "store")
    assert done.code == 0, done.err


_LOGGING = """
import logging, sys
from ckptstore.cli import main
from ckptstore.cli.verbs import list_

look = list_.list_checkpoints

def told(*args, **more):
    logging.getLogger("ckptstore").info("looked")
    return look(*args, **more)

list_.list_checkpoints = told
main(sys.argv[1:])
"""


def test_verbose_tells_on_stderr_what_is_logged(folder: Path) -> None:
    assert run_python("-c", _LOGGING, "list", folder / "store").err == ""
    assert run_python("-c", _LOGGING, "-v", "list", folder / "store").err == "INFO ckptstore: looked\n"


def test_show_timing_tells_where_the_time_went(folder: Path) -> None:
    text = ckptctl("-s", folder / "store", "show", "200", "--timing")
    assert text.code == 0
    for stage in ("copy into the arena", "bind the state", "write and fsync", "rename"):
        assert stage in text.out
    timing = ckptctl("-s", folder / "store", "show", "200", "--json").json["timing"]
    assert {"reserve", "plan", "copy"} <= set(timing["ranks"]["0"])
    assert timing["write"] > 0
