"""What a stranger is told who gets a command line wrong, or reads a usage line and types it."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest

from ckptstore.cli.app import VERBS, cli, main
from ckptstore.repo.local import LocalTier
from ckptstore.testing.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two checkpoints of one run."""
    tier = LocalTier(tmp_path_factory.mktemp("usage") / "store")
    tier.create()
    for step in (1, 2):
        write_checkpoint(tier, {"w": np.full((4, 4), step)}, run="a", step=step, save_id=f"{'0' * 12}-{step}")
    return str(tier.root)


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No store is known but the one that is named."""
    monkeypatch.chdir(tmp_path)
    for name in ("CKPTSTORE_LOCAL", "CKPTSTORE_REMOTE", "CKPTSTORE_RUN", "CKPTSTORE_FILE"):
        monkeypatch.delenv(name, raising=False)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_argument_is_told_below_the_verbs_usage_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, verb, "--no-such-option")
    assert (code, out) == (2, "")
    usage, *_, message, hint = err.splitlines()
    assert usage.startswith(f"Usage: ckptctl {verb} [OPTIONS]")
    if verb != "run":  # all that follows it is another command's
        assert message.startswith("ckptctl: No such option '--no-such-option'.")
    assert hint == f"  hint: see 'ckptctl {verb} --help'"
    error = json.loads(run(capsys, "--json", verb, "--no-such-option")[2])
    assert (error["code"], error["hint"]) == (2, hint.removeprefix("  hint: "))


def test_usage_lines_name_every_option_that_a_verb_can_not_do_without() -> None:
    context = click.Context(cli, info_name="ckptctl")
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=verb, parent=context)))
        for option in command.params:
            if isinstance(option, click.Option) and option.required:
                assert option.opts[-1] in usage, verb


@pytest.mark.parametrize(
    ("args", "told"),
    [
        pytest.param(["completion"], "Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish", id="short"),
        pytest.param(["diff"], "Missing argument 'A': a STEP.", id="what A is"),
        pytest.param(["diff", "{store}"], "Missing argument 'A': a STEP.", id="only a store"),
        pytest.param(["diff", "--runs", "a"], "Missing argument 'B': a run.", id="one run"),
        pytest.param(["diff", "{store}", "1", "2", "3"], "Two are compared, not 3: '1' '2' '3'.", id="three"),
        pytest.param(["diff", "-s", "{store}", "one"], "'one' does not name a checkpoint", id="no STEP"),
        pytest.param(["pin", "{store}"], "Missing argument 'STEP...'.", id="no STEP to pin"),
        pytest.param(["show", "-s", "{store}", "1", "2"], "STEP is given twice: '1' and '2'.", id="two STEPs"),
        pytest.param(["show", "./x", "./y"], "STORE is given twice: './x' and './y'.", id="two STOREs"),
    ],
)  # fmt: skip
def test_message_says_what_is_missing_or_too_much(
    args: list[str], told: str, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *(arg.format(store=store) for arg in args))
    assert (code, out) == (2, "")
    assert f"ckptctl: {told}\n" in err


@pytest.mark.parametrize(
    "args",
    [
        ["diff", "{store}", "1", "2"],
        ["diff", "{store}", "1"],
        ["diff", "{store}", "a/1", "a/2"],
        ["diff", "-s", "{store}", "1", "2"],
        ["diff", "-s", "{store}", "a/1", "latest"],
        ["diff", "--runs", "{store}", "a", "a"],
        ["diff", "-s", "{store}", "--runs", "a", "a"],
        ["pin", "{store}", "1", "2"],
        ["unpin", "{store}", "1", "2"],
        ["delete", "{store}", "1", "--dry-run"],
        ["export", "{store}", "1", "--format", "safetensors", "--output", "one.safetensors"],
        ["export", "{store}", "--format", "safetensors", "--output", "newest.safetensors"],
    ],
    ids=" ".join,
)
def test_every_verb_that_looks_at_one_store_takes_it_as_an_argument(
    args: list[str], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *(arg.format(store=store) for arg in args))
    assert code == 0, err


def test_a_command_without_a_verb_is_told_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys)
    assert code == 2
    assert all(f"\n  {verb} " in err for verb in VERBS)
