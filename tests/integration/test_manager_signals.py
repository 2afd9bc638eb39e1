"""Signals and exceptions: within the grace there is an emergency checkpoint or the previous one, and never a hang."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job
from training import manager

#: The normal suite takes a small part; CKPTSTORE_TEST_SCALE=10 takes ten times as many rounds.
SCALE = float(os.environ.get("CKPTSTORE_TEST_SCALE", "1"))


def resumed(folder: Path, elements: int = 1000) -> dict[str, Any]:
    """What a fresh job finds; its state must be that of its step, in every element."""
    with job(folder, "--steps", "0", "--elements", str(elements)) as fresh:
        found = fresh.until("ready")
        fresh.end()
    assert found["values"] == [float(found["step"])]
    return found


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", -signal.SIGINT)], ids=str)
def test_a_signal_ends_in_an_emergency_checkpoint(tmp_path: Path, name: str, code: int) -> None:
    with job(tmp_path, "--every", "1000", is_started=True) as running:
        running.until("step", step=10)
        running.send(name)
        returncode, err = running.end()
    assert returncode == code, err
    found = resumed(tmp_path)
    assert found["emergency"]
    assert found["step"] > 10
    assert f"{name} at step {found['step']}: safe: local {found['step']}; continue with: " in err
    if name == "SIGINT":
        assert "press Ctrl-C again" in err


@pytest.mark.parametrize("then", ["sleep", "c"])
def test_the_job_ends_with_the_previous_checkpoint_when_no_step_comes_within_the_grace(
    tmp_path: Path, then: str
) -> None:
    with job(tmp_path, "--at", "12", "--then", then, "--grace", "1") as running:
        running.until("then")
        running.until("local", step=10)
        running.send("SIGTERM")
        returncode, err = running.end()
    assert returncode == 143
    assert "no step came within 1 s; safe: local 10" in err
    assert resumed(tmp_path)["step"] == 10


def test_the_second_interrupt_acts_at_once(tmp_path: Path) -> None:
    with job(tmp_path, "--at", "12", "--then", "sleep", "--grace", "600") as running:
        running.until("then")
        running.send("SIGINT")
        running.until_told("interrupted: saving after this step")
        assert running.is_alive()
        running.send("SIGINT")
        returncode, err = running.end()
    assert returncode == -signal.SIGINT
    assert "SIGINT at step" not in err, "no step came, and none was waited for"


def test_a_repeated_sigterm_changes_nothing(tmp_path: Path) -> None:
    with job(tmp_path, "--every", "1000", "--elements", "4000000") as running:
        running.until("step", step=5)
        for _ in range(5):
            running.send("SIGTERM")
            time.sleep(0.02)  # spread over the ending; nothing depends on where they fall
        returncode, err = running.end()
    assert returncode == 143, err
    assert resumed(tmp_path, 4_000_000)["emergency"]


def test_a_users_handler_is_called_and_given_back(tmp_path: Path) -> None:
    with job(tmp_path, "--own-handler", "--every", "1000") as running:
        running.until("step", step=5)
        running.send("SIGTERM")
        assert running.until("own handler") == {"number": 15}
        assert running.end()[0] == 143
    with job(tmp_path / "other", "--own-handler", "--at", "6") as running:
        assert running.until("done") == {"restored": True}
        assert running.end()[0] == 0


def test_a_forked_child_dies_of_its_own_sigterm_and_the_job_goes_on(tmp_path: Path) -> None:
    with job(tmp_path, "--at", "6", "--then", "child", "--steps", "20") as running:
        assert running.until("child") == {"code": -signal.SIGTERM}
        running.until("done")
        assert running.end()[0] == 0


def test_a_signal_to_the_whole_group_saves_also_when_it_takes_loader_workers_down(tmp_path: Path) -> None:
    """The loader raises at any moment of an ending: in a step, in a save, or while it is waited for."""
    with job(tmp_path, "--workers", "2", "--every", "1000", group=True) as running:
        running.until("step", step=10)
        os.killpg(running.pid, signal.SIGTERM)
        returncode, err = running.end()
    assert returncode == 143, err
    assert ": safe: local " in err
    found = resumed(tmp_path)
    assert found["step"] >= 10
    assert found["emergency"]


def test_a_step_is_finished_and_saved_when_a_loader_worker_dies_in_the_middle_of_it(tmp_path: Path) -> None:
    with job(tmp_path, "--workers", "2", "--every", "1000", "--worker-dies-at", "8") as running:
        returncode, err = running.end()
    assert returncode == 1, err
    # Torch may notice only at the next batch, and a batch that was ready is one step more: but no step is torn.
    found = re.search(r"Error after step (8|9): safe: local \1;", err)
    assert found, err
    assert resumed(tmp_path)["step"] == int(found[1])


def test_an_exception_saves_the_last_step(tmp_path: Path) -> None:
    with job(tmp_path, "--every", "1000", "--at", "7", "--then", "raise") as running:
        returncode, err = running.end()
    assert returncode == 1
    assert "the loss exploded" in err, "the exception itself is never hidden"
    assert "ValueError after step 7: safe: local 7" in err
    found = resumed(tmp_path)
    assert (found["step"], found["emergency"]) == (7, True)


def test_nothing_is_saved_on_an_exception_when_told_so(tmp_path: Path) -> None:
    with job(tmp_path, "--at", "7", "--then", "raise", "--no-save-on-exception") as running:
        assert running.end()[0] == 1
    assert resumed(tmp_path)["step"] == 5


def test_a_state_torn_in_the_middle_of_a_step_is_never_saved(tmp_path: Path) -> None:
    with job(tmp_path, "--break-at", "8") as running:
        returncode, err = running.end()
    assert returncode == 1
    words = "RuntimeError (broke in the middle of a step) in the middle of an optimizer step: not saved; safe: local 5"
    assert words in err
    assert resumed(tmp_path)["step"] == 5


def test_a_signal_while_uploads_are_awaited_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    nobody_there = "s3://bucket/x?endpoint=http://127.0.0.1:9"
    with job(tmp_path / "s", "--at", "5") as before:  # an unreachable bucket alone would not count as a new run
        before.end()
    with job(tmp_path / "s", "--at", "10", "--remote", nobody_there, is_started=True) as running:
        running.until("local", step=10)
        running.send("SIGTERM")
        returncode, err = running.end()
    assert returncode == 143
    assert "SIGTERM after the last step: safe: local 10, s3 nothing yet" in err
    assert resumed(tmp_path / "s")["step"] == 10


def test_signals_are_left_alone_in_another_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with manager(tmp_path).track(w=torch.zeros(1)) as m:
            m.save_checkpoint(global_step=1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "in another thread than the main one" in caplog.text


def descriptors() -> set[tuple[str, str]]:
    """What this process has open, but for the folder that tells."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add((fd.name, str(fd.readlink())))
    return found


def test_handlers_and_wakeup_descriptor_are_as_before_when_the_block_is_left(tmp_path: Path) -> None:
    names = ("SIGTERM", "SIGINT", "SIGUSR1")
    before = [signal.getsignal(getattr(signal, n)) for n in names]
    open_before = descriptors()
    with manager(tmp_path):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(getattr(signal, n)) for n in names] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert descriptors() <= open_before, "others may have been closed meanwhile"


def test_at_most_one_interval_is_lost_when_the_job_is_killed_at_a_random_moment(tmp_path: Path) -> None:
    dice = random.Random(1)
    for round_number in range(max(1, round(2 * SCALE))):
        folder = tmp_path / str(round_number)
        with job(folder, "--step-seconds", "0.004", "--elements", "50000") as running:
            running.until("local")
            time.sleep(dice.uniform(0, 0.5))
            running.send("SIGKILL")
            running.end()
            reached = max((facts["step"] for facts in running.said("step")), default=5)
        found = resumed(folder, 50_000)
        assert reached - found["step"] <= 5, f"round {round_number}: was at {reached}, resumed {found['step']}"


def test_sigterm_at_a_random_moment_leaves_an_emergency_or_the_previous_checkpoint(tmp_path: Path) -> None:
    dice = random.Random(2)
    for round_number in range(max(1, round(2 * SCALE))):
        folder = tmp_path / str(round_number)
        with job(folder, "--step-seconds", "0.004", "--elements", "50000", "--grace", "5") as running:
            running.until("local")
            time.sleep(dice.uniform(0, 0.5))
            running.send("SIGTERM")
            returncode, err = running.end()
            reached = max((facts["step"] for facts in running.said("step")), default=5)
        assert returncode == 143, err
        found = resumed(folder, 50_000)
        assert found["emergency"] or found["step"] >= reached - 5
