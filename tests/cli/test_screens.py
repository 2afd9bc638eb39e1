"""Every verb's text and JSON, against `golden/<verb>.txt`: piped, and in a real terminal of 80 columns.

After a change that is meant: ``CKPTSTORE_UPDATE_GOLDEN=1 pytest tests/cli/test_screens.py``, and read the difference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ckptctl, clean, command
from terminal import Terminal

from ckptstore.cli.app import VERBS
from ckptstore.clock import rfc3339
from ckptstore.config import StoreConfig
from ckptstore.format.manifest import Parent
from ckptstore.ops.open import open_place
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint

GOLDEN = Path(__file__).parent / "golden"
SUPPORT = Path(__file__).parents[1] / "support"
OLD, NEW = "0123456789ab", "cdef01234567"

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

#: Verb -> what a person types, in this order, in a folder with a store and the environment naming its bucket.
SCREENS: dict[str, list[str]] = {
    "list": ["list store", "list store --all", "list nowhere", "lsit"],
    "show": ["show store", "show store 200 --only model.b", "show store 999"],
    "status": ["status store", "status store --cost"],
    "diff": ["-s store diff 100 200 --norms --all", "-s store diff 200"],
    "verify": ["verify store --all --read-data", "verify damaged --read-data", "verify damaged --read-data --repair"],
    "push": ["push store", "push store --all", "push store 100 --all"],
    "pull": ["pull other 100", "pull other 100"],
    "restore": ["restore {bucket} --to fresh", "restore {bucket} --to busy"],
    "export": ["-s store export 200 --format safetensors -o w.safetensors --only model.*"],
    "import": ["-s imported import w.safetensors --step 7", "-s imported import w.safetensors --step 7"],
    "drill": ["drill {bucket}"],
    "pin": ["-s store pin 100 200"],
    "delete": ["-s store delete 100", "-s store delete 300 --yes"],
    "unpin": ["-s store unpin 100"],
    "gc": ["gc {bucket} --dry-run", "gc {bucket}", "gc {bucket} --yes"],
    "doctor": ["doctor {bucket}", "doctor file:///proc/nowhere"],
    "plot": ["plot store -o report.jpg"],
    "run": ["-s store run -- true", "-s store run -- no-such-command", "run -- true"],
    "agent": ["-s store agent status", "-s store agent unit", "-s {bucket} agent logs"],
    "config": ["config show --remote s3://bucket/prefix"],
    "completion": ["completion tcsh"],
    "version": ["version"],
}
#: They don't end by themselves at once, and have tests of their own.
ELSEWHERE = {"dashboard", "demo"}

#: Runs each command as if it were typed, and says how it ended. The terminal is real, the process is started once.
DRIVER = """
import sys
from ckptstore.cli import main
for line in open("lines").read().splitlines():
    print(f"$ ckptctl {line}", flush=True)
    try:
        main(line.split())
    except SystemExit as end:
        sys.stderr.flush()
        print(f"[{end.code}]", flush=True)
print("end of all", flush=True)
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three checkpoints of the current line and one that is superseded; a bucket that lacks the last."""
    folder = tmp_path_factory.mktemp("stage")
    place = open_place(str(folder / "store"), f"file://{folder}/bucket", must_exist=False)
    tiers = place.tiers("bert")
    assert tiers.local is not None
    when = datetime.now(timezone.utc) - timedelta(hours=3, minutes=10)
    state = {"model.w": np.arange(4096, dtype="float32"), "model.b": np.zeros(4, dtype="float32")}
    parent = Parent(save_id=f"{OLD}-1", timeline=1, step=100)
    saves = ((100, f"{OLD}-1", 1), (250, f"{OLD}-2", 1), (200, f"{NEW}-1", 2), (300, f"{NEW}-2", 2))
    for step, save_id, timeline in saves:
        told = {
            "created_at": rfc3339(when),
            "epoch": step // 100,
            "metrics": {"train/loss": 1 / step, "val/loss": 2 / step},
            "tags": ("eval",) if step == 200 else (),
            "versions": {"ckptstore": "1.0", "torch": "2.0"},
        }
        made_by = {"run": "bert", "step": step, "save_id": save_id, "timeline": timeline, "world_size": 2}
        above = parent if timeline == 2 else None
        path = write_checkpoint(tiers.local, state, parent=above, told=told, **made_by)  # type: ignore[arg-type]
        if step != 300:
            push(tiers.local, path, "bert", tiers.remotes[0], config=StoreConfig())
        state = {**state, "model.w": state["model.w"] + np.float32(1)}
    place.close()
    shutil.copytree(folder / "store", folder / "damaged")
    shard = next((folder / "damaged" / "bert").glob("step-*300-*/__0_0.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (folder / "busy").mkdir()
    (folder / "busy" / "thesis.tex").write_text("x")
    return folder


def typed(folder: Path, more: str = "") -> list[str]:
    return [line.format(bucket=f"file://{folder}/bucket") + more for lines in SCREENS.values() for line in lines]


def piped(folder: Path, more: str = "") -> str:
    """What scripts see: stdout, then stderr marked."""
    said = []
    for line in typed(folder, more):
        done = ckptctl(*line.split(), cwd=folder, CKPTSTORE_REMOTE=f"file://{folder}/bucket")
        errors = "".join(f"2> {text}\n" for text in done.err.splitlines())
        said.append(f"$ ckptctl {line}\n{done.out}{errors}[{done.code}]\n")
    return "".join(said)


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


def on_screen(terminal: Terminal, folder: Path) -> str:
    (folder / "lines").write_text("\n".join(typed(folder)))
    (folder / "driver.py").write_text(DRIVER)
    environ = clean(CKPTSTORE_REMOTE=f"file://{folder}/bucket")
    terminal.start([sys.executable, "driver.py"], {k: v for k, v in environ.items() if k != "COLUMNS"}, str(folder))
    terminal.wait_for("go on? [y/N]:")
    terminal.keys("n", "Enter")
    screen = terminal.wait_for("end of all")
    assert terminal.wait_for_end() == 0
    return "\n".join(line.rstrip() for line in screen.splitlines())


def steady(text: str, folder: Path) -> str:
    """Without what differs from one time, machine or version to the next."""
    for pattern, instead in (
        (re.escape(str(folder)), "/stage"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "2026-01-01T12:00:00.000Z"),
        (r"took [\d.]+ ms", "took 0 ms"),
        (r"(restore_seconds|verify_seconds|age_seconds|seconds_at_risk|rate_bytes_per_s)(\W+)[\d.]+", r"\1\g<2>0"),
        (r"time  [\d.]+ s \([\d.]+ \w+/s", "time  0.0 s (1.0 MiB/s"),
        (r"[\d.]+ (GiB available)", r"0.0 \1"),
        (r"-[0-9a-f]{16}\.pack", "-0123456789abcdef.pack"),
        (r"(ckptstore|python|torch|boto3|oss2|zstandard|pydantic|numpy)(\"?:?\s+\"?)[\d][\w.+]*", r"\1\g<2>1.0"),
        (r"(ckptstore) [\d.]+, Python [\d.]+", r"\1 1.0, Python 1.0"),
        (r"ExecStart=\S+", "ExecStart=ckptctl"),
        (rf"\b(?!{OLD}|{NEW})[0-9a-f]{{12}}\b", "aaaaaaaaaaaa"),
        (r"doctor/[0-9a-f]{16}", "doctor/0123456789abcdef"),
        (r"^(config|prices)\.(?!deadline_s).*\n", ""),  # each setting is somebody else's business
    ):
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text


def sections(text: str) -> list[str]:
    """The text cut before each command."""
    return [part for part in re.split(r"(?=^\$ ckptctl )", text, flags=re.MULTILINE) if part.startswith("$ ")]


def documents(parts: list[str]) -> list[str]:
    """Each JSON document in one line, so that a golden file stays readable."""
    made = []
    for part in parts:
        head, _, rest = part.partition("\n")
        lines = rest.splitlines()
        errors = [line for line in lines if line.startswith("2> ")]
        out = "\n".join(line for line in lines[:-1] if not line.startswith("2> "))
        told = json.dumps(json.loads(out, object_hook=_without_settings)) if out.startswith("{") else out
        made.append("\n".join([head, *([told] if told else []), *errors, lines[-1], ""]))
    return made


def _without_settings(found: dict[str, Any]) -> dict[str, Any]:
    if "settings" in found:
        found["settings"] = [one for one in found["settings"] if "." not in one["name"]]
    return found


def test_every_verb_says_what_it_should_piped_and_on_a_terminal(
    stage: Path, terminal: Terminal, tmp_path: Path
) -> None:
    assert SCREENS.keys() | ELSEWHERE == VERBS.keys()
    found: list[list[str]] = []
    for kind in ("piped", "terminal", "json"):
        folder = tmp_path / kind
        shutil.copytree(stage, folder)
        if kind == "terminal":
            text = on_screen(terminal, folder)
        else:
            text = piped(folder, " --json" if kind == "json" else "")
        found.append(sections(steady(text, folder)))
    found[2] = documents(found[2])
    wrong = []
    at = 0
    for verb, lines in SCREENS.items():
        rows = [part[at : at + len(lines)] for part in found]
        at += len(lines)
        page = "".join(
            f"===== {kind}\n{''.join(part)}" for kind, part in zip(("piped", "terminal", "json"), rows, strict=True)
        )
        file = GOLDEN / f"{verb}.txt"
        if os.environ.get("CKPTSTORE_UPDATE_GOLDEN"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(page)
        if not file.exists() or file.read_text() != page:
            wrong.append(f"{file}\n{page}")
        for part in rows[1]:
            wide = [line for line in part.splitlines() if len(line) > 80 and "/stage" not in line]
            assert not [line for line in wide if not line.startswith(("$ ", "ckptctl: "))], wide
    assert not wrong, "\n".join(wrong)


def test_page_about_json_names_every_field_that_is_printed() -> None:
    page = (GOLDEN.parents[2] / "docs" / "reference" / "json.md").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", page))))
    for file in sorted(GOLDEN.glob("*.txt")):
        for line in file.read_text().splitlines():
            if line.startswith('{"schema_version"'):
                unnamed = json.loads(line).keys() - {"schema_version"} - named
                assert not unnamed, f"{file.name}: docs/reference/json.md does not tell of {unnamed}"


def test_status_keeps_itself_up_to_date_until_ctrl_c(stage: Path, terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "watched"
    shutil.copytree(stage, folder)
    environ = clean(CKPTSTORE_REMOTE=f"file://{folder}/bucket")
    del environ["COLUMNS"]
    terminal.start(command("status", "store", "--watch", "--interval", "0.2"), environ, str(folder))
    before = terminal.wait_for("Ctrl-C ends")
    assert re.search(r"power cut \(local\) +300 ", before)
    assert "uploads waiting: 1 checkpoint," in before
    tier = open_place(str(folder / "store")).local
    assert tier is not None
    write_checkpoint(tier, {"w": np.zeros(4)}, run="bert", step=400, save_id=f"{NEW}-3", timeline=2)
    after = terminal.wait_for("uploads waiting: 2 checkpoints")
    assert re.search(r"power cut \(local\) +400 ", after)
    assert after.count("SURVIVES") == 1, "drawn over, not below"
    (folder / "bucket").rename(folder / "away")
    terminal.wait_for("everything")
    (folder / "away").rename(folder / "bucket")
    terminal.wait_for("loss of the machine (file)  200")
    assert terminal.interrupt() == 130
    assert "interrupted" in terminal.screen()
    assert "Traceback" not in terminal.screen()


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 0, 4), ("Ctrl-C", 130, 4), ("y", 0, 3)])
def test_delete_asks_on_a_terminal(
    stage: Path, terminal: Terminal, tmp_path: Path, answer: str, code: int, left: int
) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(stage, folder)
    environ = clean(CKPTSTORE_REMOTE=f"file://{folder}/bucket")
    terminal.start(command("-s", "store", "delete", "100"), environ, str(folder))
    terminal.wait_for("delete? [y/N]:")
    if answer == "Ctrl-C":
        assert terminal.interrupt() == code
    else:
        terminal.keys(answer, "Enter")
        assert terminal.wait_for_end() == code
    found = ckptctl("list", folder / "store", "--all", "--json").json["checkpoints"]
    assert len(found) == left


def test_colours_mean_something_and_no_color_is_honoured(stage: Path, terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "colours"
    shutil.copytree(stage, folder)
    shown = {}
    for name, more in (("plain", {"NO_COLOR": "1"}), ("coloured", {})):
        (folder / "lines").write_text("verify damaged --read-data\nlist store --all\ndoctor file:///proc/nowhere\n")
        (folder / "driver.py").write_text(DRIVER)
        terminal.start([sys.executable, "driver.py"], {**clean(**more), "COLUMNS": "80"}, str(folder))
        terminal.wait_for("end of all")
        shown[name] = terminal.screen(colours=True)
    assert "\x1b[3" not in shown["plain"]
    for word, colour in (("DAMAGE", 31), ("superseded", 33), ("PROBLEM", 31), ("ok", 32)):
        assert f"\x1b[{colour}m{word}" in shown["coloured"], word


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_works_in_the_shell_that_loads_it(terminal: Terminal, tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "checkpoints").mkdir()
    script = ckptctl("completion", shell)
    assert script.code == 0
    (tmp_path / "completion").write_text(script.out)
    start = {
        "bash": "bash --norc --noprofile",
        "zsh": "zsh -f",
        "fish": "fish --no-config",
    }[shell]
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    terminal.start(start.split(), environ, str(tmp_path))
    if shell == "zsh":
        terminal.keys("autoload -Uz compinit && compinit -u -D", "Enter")
    terminal.keys("source ./completion; echo loaded | tr a-z A-Z", "Enter")
    terminal.wait_for("LOADED")
    terminal.keys("ckptctl unp", "Tab")
    terminal.wait_for("ckptctl unpin")
    terminal.keys("C-u")
    terminal.keys("ckptctl verify --read", "Tab")
    terminal.wait_for("ckptctl verify --read-data")
    terminal.keys("C-u")
    terminal.keys("ckptctl list check", "Tab")
    terminal.wait_for("ckptctl list checkpoints")
    terminal.keys("C-u", "exit", "Enter")
