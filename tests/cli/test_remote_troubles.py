"""A remote that refuses: each verb's exit code and its one message; `status` tells what it can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ckptstore.cli.app import main
from ckptstore.repo.local import LocalTier
from ckptstore.testing.checkpoints import write_checkpoint

#: There are no credentials for it, which is found out before anybody is asked.
REFUSING = "s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=us-east-1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local tier with one checkpoint."""
    tier = LocalTier(tmp_path_factory.mktemp("troubles") / "store")
    tier.create()
    write_checkpoint(tier, {"w": np.ones((4, 4))}, run="a", step=1)
    return tier.root


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    "args",
    [
        *([verb, "{url}"] for verb in ("list", "show", "verify", "diff", "gc", "status", "drill", "plot", "restore")),
        *([verb, "{store}", "--remote", "{url}"] for verb in ("push", "pull", "verify")),
        *([verb, "{store}", "1", "--remote", "{url}"] for verb in ("pin", "unpin", "delete", "export")),
    ],
    ids=" ".join,
)
def test_refused_credentials_are_one_message_and_code_12(
    args: list[str], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"diff": ["1"], "plot": ["-o", "x.html"], "restore": ["--to", "x"], "delete": ["--yes"]}
    more["export"] = ["--format", "safetensors", "-o", "x.safetensors"]
    words = [arg.format(url=REFUSING, store=store) for arg in (args[:2] + more.get(args[0], []) + args[2:])]
    code, out, err = run(capsys, *words)
    assert (code, out) == (12, ""), err
    message, hint = err.splitlines()
    assert message.startswith("ckptctl: there are no usable credentials for bucket bucket at http://127.0.0.1:9")
    assert "AWS_ACCESS_KEY_ID" in hint


def test_status_tells_what_the_local_tier_holds_when_the_remote_refuses(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, why = ["status", str(store), "--remote", REFUSING, "--cost"], "there are no usable credentials"
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    local, remote = out.splitlines()[2:4]
    assert local.split()[:4] == ["power", "cut", "(local)", "1"]
    assert "unknown" in remote
    assert why in remote
    document = json.loads(run(capsys, *args, "--json")[1])
    assert [row["step"] for row in document["safety"]] == [1, None]
    assert why in document["safety"][1]["unknown"]
    assert document["costs"] == []


def test_status_never_calls_a_run_unknown_while_the_remote_refuses(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for args in (["status", str(store), "--run", "b"], ["status", REFUSING]):
        code, out, err = run(capsys, *args, *(["--remote", REFUSING] if args[1] != REFUSING else []))
        assert (code, out) == (12, ""), err
