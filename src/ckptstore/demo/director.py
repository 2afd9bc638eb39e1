"""Plays the story and prints it as a timeline; returns 0 only if every promise held."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

STEPS = 20
SAVE_EVERY = 4
KILL_AFTER_STEP = 14
TOLERANCE = 2e-3
RUN_LIMIT_SECONDS = 150


@dataclass
class Journal:
    """The JSON lines a training run left."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> Journal:
        """Read what is there now; a line that is still being written is left for later."""
        text = self.path.read_text() if self.path.exists() else ""
        self.lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return self

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def bits(self) -> dict[int, str]:
        """Step -> the exact bits of its loss."""
        return {line["step"]: line["bits"] for line in self.events("step")}

    @property
    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.events("step")}

    @property
    def last_step(self) -> int:
        return max(self.losses, default=0)


class Timeline:
    """What a person sees: seconds since the start, and a sentence."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.began = time.monotonic()
        self.failures: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:6.1f} s[/dim]  {text}", style=style)

    def check(self, held: bool, text: str) -> None:
        self.say(f"{'[green]ok[/green]   ' if held else '[red]FAILED[/red]'} {text}")
        if not held:
            self.failures.append(text)


@dataclass
class Stage:
    """Where the story plays: a work folder, a bucket, and the environment the trainers get."""

    work: Path
    remote: str
    environ: dict[str, str]
    timeline: Timeline

    def start(self, name: str, ranks: int, *args: str) -> tuple[subprocess.Popen[bytes], Journal]:
        """torchrun with ``ranks`` gloo ranks; its output goes to ``<name>.log``."""
        journal = Journal(self.work / f"{name}.jsonl")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone",
            "-m", "ckptstore.demo.train", "--journal", str(journal.path), "--steps", str(STEPS),
            "--save-every", str(SAVE_EVERY), *args,
        ]  # fmt: skip
        with (self.work / f"{name}.log").open("wb") as output:
            process = subprocess.Popen(command, env=self.environ, stdout=output, stderr=output, start_new_session=True)
        return process, journal

    def finish(self, name: str, ranks: int, *args: str) -> Journal:
        """Run to the end; a failed run shows the end of its log."""
        process, journal = self.start(name, ranks, *args)
        try:
            code = process.wait(RUN_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            code = -signal.SIGKILL
        if code:
            tail = (self.work / f"{name}.log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the training run '{name}' ended with code {code}:\n{tail}")
        return journal.read()


def kill_tree(pid: int) -> int:
    """kill -9 a process and all its descendants; returns how many."""
    root = psutil.Process(pid)
    family = [root, *root.children(recursive=True)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
    return len(family)


def kill_agent(root: Path) -> bool:
    """kill -9 the node agent of this local tier: the machine is gone, and the agent with it."""
    from ckptstore.agent.client import AgentClient

    client = AgentClient.observe(root)
    if client is None:
        return False
    pid = int(client.status()["pid"])
    client.close()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return True


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def object_store(work: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A bucket URL and the credentials for it: the server named by CKPTSTORE_DEMO_S3, else one of our own."""
    endpoint = os.environ.get("CKPTSTORE_DEMO_S3")
    if endpoint:
        import boto3

        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        if "ckptstore-demo" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket="ckptstore-demo")
        yield f"s3://ckptstore-demo/{int(time.time())}?endpoint={endpoint}&region=us-east-1", {}
        return
    from ckptstore.testing.s3_server import SeaweedServer

    with SeaweedServer(work / "s3") as server:
        yield server.url("demo"), server.environ


def main() -> int:
    """Play the story; the exit code is 0 only if all of it held."""
    timeline = Timeline()
    work = Path(tempfile.mkdtemp(prefix="ckptstore-demo-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        try:
            remote, credentials = stack.enter_context(object_store(work))
            environ = {**os.environ, **credentials, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
            play(Stage(work, remote, environ, timeline))
        except KeyboardInterrupt:
            timeline.say("interrupted")
            return 130
        except Exception as error:
            timeline.check(held=False, text=str(error))
    if timeline.failures:
        timeline.say(f"{len(timeline.failures)} of the promises did not hold", style="bold red")
        return 1
    timeline.say("everything held", style="bold green")
    return 0


def play(stage: Stage) -> None:
    """The six acts."""
    timeline, work = stage.timeline, stage.work
    local = work / "node-a"
    timeline.say(
        f"S3 server is up: [bold]{stage.remote.partition('?')[0]}[/bold] (SigV4, conditional writes, on loopback)"
    )

    timeline.say(f"reference: a 10.8 M-parameter GPT, FSDP2 on 2 ranks, {STEPS} steps on real text, nothing saved")
    reference = stage.finish("reference", 2)
    timeline.say(f"  losses {reference.losses[1]:.3f} -> {reference.losses[STEPS]:.3f}")

    timeline.say(f"the same training, store.save every {SAVE_EVERY} steps to {local.name} and to the bucket")
    process, journal = stage.start("first", 2, "--store", str(local), "--bucket", stage.remote)
    wait_for_the_moment(process, journal, stage)
    killed = kill_tree(process.pid)
    agent = kill_agent(local)
    last_step = journal.read().last_step
    written = folder_bytes(local)
    victims = f"{killed} training processes" + (" and the node agent" if agent else "")
    timeline.say(f"[bold red]kill -9[/bold red] of {victims} after step {last_step}")
    shutil.rmtree(local)
    timeline.say(f"[bold red]rm -rf {local.name}[/bold red]: the machine and its disk are gone")

    node = work / "node-b"
    began = time.monotonic()
    command = ["-m", "ckptstore.cli", "restore", stage.remote, "--to", str(node), "--json"]
    restored = subprocess.run(
        [sys.executable, *command], env=stage.environ, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    if restored.returncode:
        raise RuntimeError(f"ckptctl restore ended with code {restored.returncode}: {restored.stderr}")
    checkpoint = json.loads(restored.stdout)["checkpoint"]
    step = checkpoint["step"]
    timeline.say(
        f"a fresh node: [bold]ckptctl restore s3://... --to {node.name}[/bold] -> step {step} in {seconds:.1f} s"
    )

    copies = {ranks: work / f"node-{ranks}" for ranks in (1, 3)}
    for copy in copies.values():
        shutil.copytree(node, copy)
    again = stage.finish("again", 2, "--store", str(node), "--bucket", stage.remote)
    resumed = again.events("resumed")
    timeline.check(bool(resumed) and resumed[0]["step"] == step, f"2 ranks resume at step {step}")
    same = all(again.bits.get(s) == reference.bits[s] for s in range(step + 1, STEPS + 1))
    timeline.check(same, f"losses of steps {step + 1}..{STEPS} are bit-equal to the uninterrupted run")

    for ranks, copy in copies.items():
        other = stage.finish(f"ranks-{ranks}", ranks, "--store", str(copy), "--no-save")
        worst = max(abs(other.losses.get(s, math.inf) - reference.losses[s]) for s in range(step + 1, STEPS + 1))
        timeline.check(
            worst <= TOLERANCE, f"{ranks} rank{'s' * (ranks > 1)} (resharded): losses agree within {worst:.1e}"
        )
    report(stage, journal, checkpoint, written, seconds, last_step - step)


def wait_for_the_moment(process: subprocess.Popen[bytes], journal: Journal, stage: Stage) -> None:
    """Wait until training is past KILL_AFTER_STEP and at least one checkpoint is safe in the bucket."""
    deadline = time.monotonic() + RUN_LIMIT_SECONDS
    while time.monotonic() < deadline:
        journal.read()
        if journal.last_step >= KILL_AFTER_STEP and journal.events("remote"):
            return
        if process.poll() is not None:
            tail = (stage.work / "first.log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"training ended (code {process.returncode}) before it could be killed:\n{tail}")
        time.sleep(0.05)
    raise RuntimeError("training did not reach the moment of the kill in time")


def report(stage: Stage, journal: Journal, checkpoint: dict[str, Any], written: int, seconds: float, lost: int) -> None:
    """The measured numbers of this very run."""
    saves = len(journal.events("local"))
    stalls = [event["stall_seconds"] * 1e3 for event in journal.events("saved")]
    lags = [event["lag_seconds"] for event in journal.events("remote")]
    mib = 1 << 20
    table = Table(title="measured in this run", title_justify="left", show_header=False, box=None, padding=(0, 2))
    rows = [
        ("training stalled per save, rank 0", f"first {stalls[0]:.0f} ms, then {statistics.median(stalls[1:]):.0f} ms"),
        ("bytes of state per save", f"{checkpoint['size_bytes'] / mib:.0f} MiB"),
        ("bytes written locally", f"{written / mib:.0f} MiB in {saves} saves"),
        ("bytes uploaded per save", f"{checkpoint['stored_bytes'] / mib:.0f} MiB (step {checkpoint['step']})"),
        ("upload lag (save called -> in the bucket)", ", ".join(f"{lag:.1f} s" for lag in lags)),
        ("restore on a fresh node", f"{seconds:.1f} s, every byte verified"),
        ("steps lost", f"{lost}, saving every {SAVE_EVERY}"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    stage.timeline.console.print(table)
