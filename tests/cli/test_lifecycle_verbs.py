"""pin, unpin, delete, gc, diff, config, completion, run, agent: text, JSON and exit codes, piped and on a terminal."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ckptctl, clean, command

from ckptstore.cli.app import VERBS
from ckptstore.cli.reference import page
from ckptstore.config import StoreConfig
from ckptstore.ops.open import open_place
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint

NONCE = "0123456789ab"
ROOT = Path(__file__).parents[2]


def answer(*args: object) -> Any:
    done = ckptctl(*args, "--json")
    assert done.code == 0, done.err
    return done.json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of one run in a local tier and a bucket."""
    folder = tmp_path_factory.mktemp("made")
    tiers = open_place(str(folder / "store"), f"file://{folder}/bucket", must_exist=False).tiers("bert")
    assert tiers.local is not None
    state = {"model.w": np.arange(4096, dtype="float32"), "model.b": np.zeros(4, dtype="float32")}
    for n, step in enumerate((100, 200, 300), 1):
        path = write_checkpoint(tiers.local, state, run="bert", step=step, save_id=f"{NONCE}-{n}")
        push(tiers.local, path, "bert", tiers.remotes[0], config=StoreConfig())
        state = {"model.w": state["model.w"] + np.float32(1), "model.b": state["model.b"]}
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def at(folder: Path) -> list[str]:
    return ["-s", str(folder / "store"), "--remote", f"file://{folder}/bucket"]


def test_pin_keeps_from_delete_until_unpinned(folder: Path) -> None:
    text = ckptctl(*at(folder), "pin", "200")
    assert text.out.splitlines() == [
        "step 200: pinned on local (it was not pinned)",
        "step 200: pinned on file (it was not pinned)",
    ]
    refused = ckptctl(*at(folder), "delete", "200", "--yes")
    assert refused.code == 2
    assert refused.err.splitlines() == ["ckptctl: step 200 is pinned", f"  hint: ckptctl unpin {NONCE}-2"]
    assert {a["action"] for a in answer(*at(folder), "unpin", "200")["actions"]} == {"unpin"}
    assert answer(*at(folder), "delete", "200", "--yes")["is_done"]
    assert [c["step"] for c in answer(*at(folder), "list")["checkpoints"]] == [100, 300]


def test_delete_says_what_and_asks_for_yes_when_nobody_is_there(folder: Path) -> None:
    asked = ckptctl(*at(folder), "delete", "100")
    assert asked.code == 2
    assert asked.out.splitlines() == [
        "STEP  SAVE            DELETE FROM  WHY",
        f" 100  {NONCE}-1  local        asked for",
        f" 100  {NONCE}-1  file         asked for",
    ]
    assert "--yes" in asked.err
    assert "gone from every tier" in asked.err
    assert len(answer(*at(folder), "list")["checkpoints"]) == 3
    only = answer(*at(folder), "delete", "100", "--tier", "local", "--yes")
    assert [a["tier"] for a in only["actions"]] == ["local"]
    assert answer(*at(folder), "list")["checkpoints"][0]["tiers"] == {"local": "absent", "file": "complete"}
    assert ckptctl(*at(folder), "delete", "100", "--tier", "moon", "--yes").code == 2


def test_gc_tells_what_it_would_do_does_it_and_keeps_the_rest_whole(folder: Path) -> None:
    assert ckptctl(*at(folder), "delete", "300", "--yes").code == 0
    told = answer(*at(folder), "gc", "--dry-run")
    assert not told["is_done"]
    assert [one["why"] for one in told["remotes"]["file"][0]["condemned"]] == ["its save is gone"]
    assert ckptctl(*at(folder), "gc").code == 2, "it asks"
    for _ in range(3):
        text = ckptctl(*at(folder), "gc", "--grace", "0", "--yes")
        assert text.code == 0, text.err
    assert "deleted: 1 pack," in text.out
    assert ckptctl(*at(folder), "verify", "--all", "--read-data").code == 0


def test_gc_is_refused_while_another_collects(folder: Path) -> None:
    (folder / "bucket" / "gc").mkdir(exist_ok=True)
    (folder / "bucket" / "gc" / "lease-0-of-1-00000001.json").write_text("{}")
    refused = ckptctl(*at(folder), "gc", "--yes", "--json")
    assert refused.code == 11
    assert refused.error["error"] == "LockedError"


def test_diff_tells_what_changed_and_by_how_much(folder: Path) -> None:
    text = ckptctl(*at(folder), "diff", "100", "300", "--norms", "--all")
    assert text.out.splitlines() == [
        "   TENSOR   DTYPE        SIZE   CHANGED  NORM  RELATIVE",
        "=  model.b  float32      16 B       0 B     -         -",
        "~  model.w  float32  16.0 KiB  16.0 KiB   128  0.000846",
        "1 unchanged, 1 changed; 16.0 KiB differ",
        "first difference: model.w (changed)",
    ]
    found = answer(*at(folder), "diff", "bert/200", "latest~1")
    assert found["counts"]["changed"] == 0
    assert found["first_difference"] is None
    assert ckptctl(*at(folder), "diff", "100", "999").code == 13


def test_diff_of_two_runs_finds_the_step_and_the_tensor_where_they_part(folder: Path) -> None:
    tier = open_place(str(folder / "store")).local
    assert tier is not None
    state = {"model.w": np.arange(4096, dtype="float32"), "model.b": np.zeros(4, dtype="float32")}
    for step in (100, 150, 200, 300):
        save_id = f"{'f' * 12}-{step // 50}"
        write_checkpoint(tier, state, run="retry", step=step, save_id=save_id)
        state = {"model.w": state["model.w"] + np.float32(1 if step == 150 else 0), "model.b": state["model.b"]}
    store = ["-s", folder / "store"]
    text = ckptctl(*store, "diff", "--runs", "bert", "retry")
    assert text.out.splitlines() == [
        "bert and retry are equal up to step 200",
        "first difference: step 300, model.w (changed, norm 64, relative 0.000423)",
    ]
    found = answer(*store, "diff", "--runs", "bert", "retry")
    assert (found["last_equal_step"], found["step"], found["num_compared"]) == (200, 300, 3)
    assert found["first_difference"]["name"] == "model.w"
    assert "no difference at any of the 3 steps" in ckptctl(*store, "diff", "--runs", "bert", "bert").out
    assert ckptctl(*store, "diff", "--runs", "bert", "gpt").code == 13


def test_verify_repairs_and_says_what_it_did(folder: Path) -> None:
    shard = next((folder / "store" / "bert").glob("step-*200-*/*.distcp"))
    data = bytearray(shard.read_bytes())
    original, data[-5000] = bytes(data), data[-5000] ^ 1
    shard.write_bytes(data)
    assert ckptctl(*at(folder), "verify", "--all", "--read-data").code == 20
    done = ckptctl(*at(folder), "verify", "--all", "--read-data", "--repair")
    assert done.code == 0, done.err
    assert done.out.startswith("REPAIRED  step 200  local: __0_0.distcp")
    assert shard.read_bytes() == original
    assert ckptctl(*at(folder), "verify", "--sample", "0%").code == 2


def test_config_names_the_origin_of_each_setting(tmp_path: Path) -> None:
    (tmp_path / "ckptstore.toml").write_text('run = "bert"\n[config]\npack_bytes = 2097152\n')
    done = ckptctl("config", "show", "--json", "-s", "/data", cwd=tmp_path, CKPTSTORE_CONFIG__COMPRESS="false")
    found = {s["name"]: (s["value"], s["origin"]) for s in done.json["settings"]}
    assert found["local"] == ("/data", "argument")
    assert found["run"] == ("bert", "ckptstore.toml")
    assert found["config.pack_bytes"] == (2097152, "ckptstore.toml")
    assert found["config.compress"] == (False, "CKPTSTORE_CONFIG__COMPRESS")
    assert found["config.generations"] == (2, "default")
    (tmp_path / "ckptstore.toml").write_text("[config]\npack_byte = 1\n")
    wrong = ckptctl("config", "show", cwd=tmp_path)
    assert wrong.code == 2
    assert "pack_byte" in wrong.err


def test_store_and_run_come_from_the_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ckptstore.toml").write_text(f'local = "{folder}/store"\nrun = "bert"\n')
    done = ckptctl("list", "--json", cwd=tmp_path)
    assert [c["step"] for c in done.json["checkpoints"]] == [100, 200, 300]


def test_cost_follows_the_table_of_prices(folder: Path) -> None:
    prices = {"stored_gib_month": 1 << 30, "put_thousand": 1000, "get_thousand": 2000, "egress_gib": 0}
    table = "\n".join(f"{name} = {price}" for name, price in prices.items())
    (folder / "ckptstore.toml").write_text(f"[prices]\n{table}\n")
    sizes = [file.stat().st_size for file in (folder / "bucket" / "runs" / "bert").rglob("*") if file.is_file()]
    status = ["-s", f"file://{folder}/bucket", "status", "--cost"]
    (cost,) = ckptctl(*status, "--json", cwd=folder).json["costs"]
    assert (cost["stored_bytes"], cost["objects"]) == (sum(sizes), len(sizes))
    assert cost["stored_dollars_per_month"] == sum(sizes), "a dollar a byte"
    assert cost["put_dollars"] == len(sizes)
    assert cost["restore_dollars"] == 2 * len(sizes)
    assert f"{sum(sizes)}.00 $ a month" in ckptctl(*status, cwd=folder).out
    (folder / "ckptstore.toml").write_text('[prices]\nput_thousand = "dear"\n')
    assert ckptctl(*status, cwd=folder).code == 2


@pytest.mark.parametrize(("script", "code"), [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.abort()", 134)])
def test_run_ends_as_its_command_does(tmp_path: Path, script: str, code: int) -> None:
    assert ckptctl("-s", tmp_path / "s", "run", "--", sys.executable, "-c", script).code == code


def test_run_passes_signals_on_and_refuses_what_is_no_command(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    argv = command("-s", str(tmp_path), "run", "--", sys.executable, "-c", script)
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 5
    assert ckptctl("-s", tmp_path, "run", "--", "/no/such/command").code == 2
    assert ckptctl("run", "--", "true").code == 2


def test_agent_unit_and_status(tmp_path: Path) -> None:
    unit = ckptctl("-s", tmp_path / "s", "agent", "unit").out
    assert f"-s {tmp_path}/s agent serve --timeout 90\n" in unit
    assert "Type=notify\n" in unit
    assert "TimeoutStopSec=120\n" in unit
    assert "User=" not in unit
    assert answer("-s", tmp_path / "s", "agent", "status")["agent"] is None


def test_a_unit_of_the_system_names_its_user_and_quotes_as_systemd_reads_it() -> None:
    unit = ckptctl("-s", '/data/50% of $x "y', "agent", "unit", "--user", "alice", "--timeout", "20").out
    assert "User=alice\n" in unit
    assert "WantedBy=multi-user.target\n" in unit
    assert "TimeoutStopSec=50\n" in unit
    assert 'RequiresMountsFor="/data/50%% of $x \\"y"\n' in unit
    assert '-s "/data/50%% of $$x \\"y" agent serve --timeout 20\n' in unit


def test_a_service_stays_whatever_trainers_say_and_the_next_one_waits_for_its_turn(tmp_path: Path) -> None:
    from ckptstore.agent.client import AgentClient

    root = tmp_path / "s"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(60)
    manager.bind(str(tmp_path / "notify"))
    env = clean() | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
    argv = command("-s", str(root), "agent", "serve")
    with subprocess.Popen(argv, env=env) as first:
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
        trainer = AgentClient.connect(
            root,
            run="r",
            slot=0,
            remotes={},
            environ={},
            config=StoreConfig(agent_idle_exit_seconds=0),
            on_event=lambda event: None,
        )
        assert trainer.agent_pid == first.pid
        with subprocess.Popen(argv, env=env) as second:
            assert manager.recv(1000).startswith(b"READY=1\nSTATUS=waiting")
            trainer.close()
            detached = time.monotonic()
            while time.monotonic() < detached + 1:
                assert answer("-s", root, "agent", "status")["agent"]["pid"] == first.pid
            first.send_signal(signal.SIGTERM)
            assert first.wait(30) == 0
            assert {manager.recv(1000), manager.recv(1000)} == {b"STOPPING=1", b"READY=1\nSTATUS=serving"}
            assert answer("-s", root, "agent", "status")["agent"]["pid"] == second.pid
            assert "waiting until it leaves" not in ckptctl("-s", root, "agent", "logs").out, "only of who serves"
            assert "attached as slot 0 of r" in ckptctl("-s", root, "agent", "logs").out
            assert answer("-s", root, "agent", "stop", "--timeout", "20")["stopped"]
            assert second.wait(30) == 0
    manager.close()


@pytest.mark.parametrize("name", VERBS)
def test_help_fits_the_terminal_shows_examples_and_ends_with_exit_codes(name: str) -> None:
    done = ckptctl(name, "--help")
    assert done.code == 0
    assert "Example" in done.out
    assert done.out.rstrip().endswith("130, 138, 143 signals")
    assert max(map(len, done.out.splitlines())) <= 80


def test_reference_page_is_what_the_commands_say() -> None:
    written = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert written == page(), "python -m ckptstore.cli.reference > docs/reference/cli.md"
