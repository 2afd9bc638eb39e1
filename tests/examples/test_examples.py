"""Every example runs, is killed in mid-run, and goes on to the same result as a run nobody disturbed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(*command: str, log: Path, save_dir: Path, pause: float = 0.0) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--save-dir", str(save_dir), "--journal", str(log), "--pause", str(pause)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return err.decode()


def losses(log: Path) -> dict[int, float]:
    """The last loss told for each step."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {line["step"]: line["loss"] for line in lines}


def kill_after(process: subprocess.Popen[bytes], log: Path, step: int) -> None:
    """kill -9 of everything the example started, once it has come so far."""
    until = time.monotonic() + 100
    while max(losses(log), default=0) < step:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in {*found, *children}:
        os.kill(int(pid), signal.SIGKILL)
    process.wait(10)
    process.stderr.close()  # type: ignore[union-attr]


def library(name: str, module: str) -> object:
    """An example that needs a library, skipped where that is not installed."""
    missing = importlib.util.find_spec(module) is None
    marks = pytest.mark.skipif(missing, reason=f"needs {module}")
    return pytest.param([sys.executable, str(EXAMPLES / name)], id=module, marks=marks)


CASES = [
    library("lightning_fit.py", "lightning"),
    library("accelerate_loop.py", "accelerate"),
    library("transformers_trainer.py", "transformers"),
    pytest.param([sys.executable, str(EXAMPLES / "plain_loop.py")], id="plain_loop"),
    pytest.param([sys.executable, str(EXAMPLES / "epoch_trainer.py")], id="epoch_trainer"),
    pytest.param([*TORCHRUN, "2", str(EXAMPLES / "ddp.py")], id="ddp"),
    pytest.param([*TORCHRUN, "2", str(EXAMPLES / "fsdp2.py")], id="fsdp2"),
    pytest.param([*TORCHRUN, "4", str(EXAMPLES / "fsdp2.py"), "--replicas", "2"], id="hsdp", marks=pytest.mark.slow),
    pytest.param([*TORCHRUN, "2", str(EXAMPLES / "fsdp1.py")], id="fsdp1"),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("command", CASES)
def test_an_example_that_is_killed_ends_as_if_nothing_had_happened(tmp_path: Path, command: list[str]) -> None:
    finish(start(*command, log=tmp_path / "straight", save_dir=tmp_path / "a"))
    straight = losses(tmp_path / "straight")
    killed = start(*command, log=tmp_path / "log", save_dir=tmp_path / "b", pause=0.05)
    kill_after(killed, tmp_path / "log", 14)
    before = max(losses(tmp_path / "log"))
    assert before < max(straight)
    (tmp_path / "log").rename(tmp_path / "first")
    err = finish(start(*command, log=tmp_path / "log", save_dir=tmp_path / "b"))
    after = losses(tmp_path / "log")
    assert min(after) > before - 6, f"more than one interval was lost; {err}"
    assert max(after) == max(straight)
    assert {step: straight[step] for step in after} == after, err


def test_the_unprotected_trainer_loses_what_the_protected_one_keeps(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "epoch_trainer.py"), "--unprotected", "--epochs", "2"]
    finish(start(*command, log=tmp_path / "log", save_dir=tmp_path / "a"))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["best.pt"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm" / "train.sbatch")], check=True)
