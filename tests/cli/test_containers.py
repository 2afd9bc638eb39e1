"""Containers, as far as the kernel goes: namespaces of their own for pids and mounts, all of which die together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from commands import ckptctl, clean, command

NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]

#: Leaves an orphan behind, saves, says what it saw, and waits to be told to stop. It never waits for its upload.
TRAINER = """
import os, signal, sys, time
import torch
from ckptstore import CheckpointStore, StoreConfig

signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
if (child := os.fork()) == 0:
    if os.fork() == 0:
        os._exit(0)  # its parent is gone by now, or soon
    os._exit(0)
os.waitpid(child, 0)
config = StoreConfig(upload_bytes_per_s=2 << 20, pack_bytes=1 << 20)
store = CheckpointStore(sys.argv[1], sys.argv[2], config=config)
store.save({"w": torch.rand(1 << 19)}, 1).wait("local")
deadline = time.monotonic() + 60
while True:
    states = [open(f"/proc/{pid}/status").read() for pid in os.listdir("/proc") if pid.isdigit()]
    zombies = sum("State:\\tZ" in state for state in states)
    if not zombies or time.monotonic() > deadline:
        break
    time.sleep(0.05)
print("zombies", zombies, "parent", os.getppid(), flush=True)
time.sleep(600)
"""


def has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


#: Says what its store holds after a save, and stays, its agent with it, until it is told to go.
ONE_SAVE = """
import sys
import torch
from ckptstore import CheckpointStore

store = CheckpointStore(sys.argv[1])
step = int(sys.argv[2])
store.save({"w": torch.full((4,), float(step))}, step).wait("local")
print([info.step for info in store.checkpoints()], flush=True)
sys.stdin.read()
"""


@pytest.mark.root
def test_containers_with_equal_names_pids_and_temp_folder_keep_to_their_own_disks(tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("PID namespaces can't be made here")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "save.py"
    script.write_text(ONE_SAVE)
    inside = f"mount -t tmpfs none {disk} && exec {command()[0]} {script} {disk}/ckpt"
    started = [
        subprocess.Popen(
            [*NAMESPACE, "--mount", "sh", "-c", f"{inside} {step}"],
            env=clean(TMPDIR=str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for step in (1, 2)
    ]  # fmt: skip
    said = [process.stdout.readline() for process in started if process.stdout is not None]
    for process in started:
        process.communicate(timeout=60)
    assert said == ["[1]\n", "[2]\n"]


@pytest.mark.root
def test_run_passes_the_signal_on_buries_orphans_and_stays_until_all_is_uploaded(tmp_path: Path) -> None:
    if not has_namespaces():
        pytest.skip("PID namespaces can't be made here")
    script, url = tmp_path / "train.py", f"file://{tmp_path}/bucket"
    script.write_text(TRAINER)
    trainer = [command()[0], str(script), str(tmp_path / "store"), url]
    argv = [*NAMESPACE, *command("-s", tmp_path / "store", "run", "--", *trainer)]
    with subprocess.Popen(argv, env=clean(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "zombies 0 parent 1\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 7, errors
    assert "waiting up to 600 s for uploads" in errors
    assert [one["step"] for one in ckptctl("list", url, "--json").json["checkpoints"]] == [1]
