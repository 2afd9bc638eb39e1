"""Log lines of `ckptctl` for programs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ckptstore.blob.retry import Retrier
from ckptstore.cli.app import main
from ckptstore.clock import ManualClock
from ckptstore.errors import NoSpaceError, TransientError
from ckptstore.logs import JsonFormatter
from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import write_save


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTSTORE_LOG_FORMAT", "json")
    tier = LocalTier(tmp_path / "store")
    tier.create()
    write_save(tier, "bert", 100, "0123456789ab-1")
    return tier.root


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, list[dict[str, Any]]]:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, [json.loads(line) for line in said.err.splitlines()]


def test_notes_and_errors_are_json_lines(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, (note,) = run(capsys, "-s", str(root), "verify")
    assert (code, out) == (0, "")
    assert (note["level"], note["logger"]) == ("INFO", "ckptctl")
    assert "1 copy checked" in note["message"]
    code, _, (error,) = run(capsys, "-s", str(root), "show", "999")
    assert (code, error["code"], error["error"], error["level"]) == (13, 13, "CheckpointNotFoundError", "ERROR")
    code, _, (error,) = run(capsys, "-s", str(root), "show", "--nonsense")
    assert (code, error["code"]) == (2, 2)


def test_a_json_answer_keeps_its_own_last_word(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, lines = run(capsys, "-s", str(root), "show", "999", "--json")
    assert (code, lines[-1]["message_type"]) == (13, "exit_error")


def test_an_unknown_format_is_said(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTSTORE_LOG_FORMAT", "xml")
    with pytest.raises(SystemExit, match="2"):
        main(["-s", str(root), "list"])
    assert "CKPTSTORE_LOG_FORMAT='xml' is no format" in capsys.readouterr().err


def test_somebody_at_a_terminal_is_told_once_why_nothing_happens(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CKPTSTORE_LOG_FORMAT")
    answers = iter([TransientError("bucket b can't be reached"), TransientError("bucket b can't be reached"), None])

    def request() -> None:
        if (error := next(answers)) is not None:
            raise error

    retries = logging.getLogger("ckptstore.blob.retry")
    monkeypatch.setattr(retries, "handlers", [])
    monkeypatch.setattr(retries, "propagate", False)
    monkeypatch.setattr(retries, "level", retries.level)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit, match="0"):
        main(["-s", str(root), "list"])
    Retrier(clock=ManualClock())("get", request)
    assert capsys.readouterr().err == "bucket b can't be reached; trying again (-v tells each try)\n"


def test_a_line_has_what_the_record_says_of_itself() -> None:
    error = NoSpaceError("full", hint="make room")
    record = logging.LogRecord("ckptstore", logging.ERROR, "f", 1, "step %d\nfailed", (7,), (type(error), error, None))
    record.run, record.step, record.save_id = "bert", 7, None
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert said["message"] == "step 7\nfailed"
    assert (said["run"], said["step"], said["error"], said["code"], said["hint"]) == (
        "bert", 7, "NoSpaceError", 15, "make room",
    )  # fmt: skip
    assert not {"save_id", "traceback"} & said.keys()


def test_the_address_of_a_hook_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTSTORE_CONFIG__HOOK_URL", '"https://user:pw@chat.example/secret"')
    with pytest.raises(SystemExit):
        main(["config", "show"])
    out = capsys.readouterr().out
    assert "https://chat.example/..." in out
    assert "secret" not in out
    assert "pw" not in out
