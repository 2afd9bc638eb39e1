"""The manager in a training loop: due saves, resume, what is kept, what is said."""

from __future__ import annotations

import argparse
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import CONFIG, Training, manager

from ckptstore import CheckpointManager, CheckpointStore, errors
from ckptstore.agent.client import AgentClient
from ckptstore.ops import history
from ckptstore.policy import AtSteps
from ckptstore.repo.holding import Hold
from ckptstore.repo.local import LocalTier


def steps(folder: Path, **options: Any) -> list[int]:
    with CheckpointStore(folder, **options) as store:
        return [info.step for info in store.checkpoints()]


@pytest.mark.parametrize("stop", [4, 7, 13], ids=["at a save", "in mid-epoch", "in a later epoch"])
def test_twice_n_steps_equal_n_and_a_restore_and_n(tmp_path: Path, stop: int) -> None:
    straight = Training()
    with straight.track(manager(tmp_path / "a", save_every_steps=0, policy=AtSteps(()))) as m:
        straight.run(m, 2 * stop)
    first = Training()
    with first.track(manager(tmp_path / "b", policy=AtSteps((stop,)))) as m:
        first.run(m, stop)
    resumed = Training(seed=5)
    m = resumed.track(manager(tmp_path / "b"))
    point = m.resume()
    assert (point.step, bool(point)) == (stop, True)
    with m:
        resumed.run(m, 2 * stop)
    straight.noise[:], resumed.noise[:] = straight.noise[-3:], resumed.noise[-3:]
    assert resumed.bits() == straight.bits()


def test_saves_come_when_due_and_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with manager(tmp_path, save_every_steps=10, keep_last=2, keep_best=1).track(model=model) as m:
        taken = [s for s in range(1, 61) if m.step(s, metrics={"loss": abs(s - 20.0)}) is not None]
        assert taken == [10, 20, 30, 40, 50, 60]
    assert steps(tmp_path) == [20, 50, 60]


def test_what_is_read_is_kept_until_that_has_ended(tmp_path: Path) -> None:
    with manager(tmp_path, save_every_steps=1, keep_last=1, keep_best=0).track(w=torch.zeros(4)) as m:
        m.step(1).local.result(60)
        hold = Hold(next(tmp_path.glob("*/step-*")))
        m.step(2).local.result(60)
        assert steps(tmp_path) == [1, 2]
        hold.release()
        m.step(3).local.result(60)
        assert steps(tmp_path) == [3]


def test_retention_has_run_when_the_level_is_reached(tmp_path: Path) -> None:
    m = manager(tmp_path / "s", keep_last=1, keep_best=0, remote=f"file://{tmp_path}/bucket").track(w=torch.zeros(4))
    with m:
        for step in (1, 2, 3):
            handle = m.save_checkpoint(global_step=step)
            assert handle is not None
            handle.wait("remote")
            assert steps(tmp_path / "s") == [step]
            assert steps(None, remote=f"file://{tmp_path}/bucket") == [step]  # type: ignore[arg-type]


def test_a_save_that_waits_for_a_remote_stays_when_only_that_keeps_it(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.write_text("in the way: nothing can be uploaded yet")
    m = manager(
        tmp_path / "s",
        keep_last=1,
        keep_best=0,
        keep_remote={"keep_last": 3},
        remote=f"file://{bucket}",
        grace_seconds=1,
    ).track(w=torch.zeros(4))
    for step in (1, 2, 3, 4, 5):
        handle = m.save_checkpoint(global_step=step)
        assert handle is not None
        handle.wait("local")
    assert [info.step for info in CheckpointStore(tmp_path / "s").checkpoints()] == [3, 4, 5]


def test_time_and_epoch_triggers_save_whatever_the_loss_did(tmp_path: Path) -> None:
    m = manager(tmp_path, save_every_steps=0, save_every_seconds=1000, save_freq=2, keep_last=9).track(w=torch.zeros(2))
    now = [0.0]
    m._progress.clock = lambda: now[0]
    with m:
        assert m.step(1) is None
        now[0] = 1000
        assert m.step(2) is not None
        now[0] = 1999
        assert m.step(3) is None
        assert m.epoch_end(0, metrics={"loss": 9.0}) is None
        assert m.step(4) is None
        handle = m.epoch_end(1, metrics={"loss": 99.0})
        assert handle is not None
        handle.wait()
        now[0] = 2998
        assert m.step(5) is None, "the epoch's save counts"
    assert steps(tmp_path) == [2, 4]
    again = manager(tmp_path).track(w=torch.zeros(2))
    point = again.resume()
    assert (point.step, point.epoch, point.epoch_finished, point.next_epoch) == (4, 1, True, 2)
    assert [entry["step"] for entry in point.history] == [2, 4]


def test_a_step_is_not_saved_twice_when_two_rules_agree(tmp_path: Path) -> None:
    with manager(tmp_path, save_every_steps=2, save_freq=1).track(w=torch.zeros(2)) as m:
        m.step(1)
        assert m.step(2) is not None
        assert m.epoch_end(0) is None
    assert steps(tmp_path) == [2]


def test_plain_values_come_back_and_changes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Meter:
        best: float = 1.0

    best, seen, meter, array = 3, [1, 2], Meter(0.5), np.arange(3)
    with manager(tmp_path).track(
        w=torch.ones(2), best=lambda: best, seen=seen, meter=meter, array=array, config=argparse.Namespace(lr=0.1, n=2)
    ) as m:
        m.save_checkpoint(global_step=1, epoch=0)
    seen2: list[int] = [9]
    meter2, array2, w2 = Meter(), np.zeros(3, dtype=int), torch.zeros(2)
    again = manager(tmp_path).track(
        w=w2, best=lambda: 0, seen=seen2, meter=meter2, array=array2, config={"lr": 0.2, "n": 2}
    )
    with caplog.at_level(logging.INFO, logger="ckptstore"):
        point = again.resume()
    assert point.state["best"] == 3
    assert point.state["config"] == {"lr": 0.1, "n": 2}
    assert (seen2, meter2.best, array2.tolist(), w2.tolist()) == ([1, 2], 0.5, [0, 1, 2], [1.0, 1.0])
    assert "config has changed since step 1: lr: 0.1 -> 0.2" in caplog.text
    fewer = manager(tmp_path).track(w=w2)
    with caplog.at_level(logging.INFO, logger="ckptstore"):
        assert fewer.resume().state["best"] == 3
    assert "not tracked now: array, meter, seen" in caplog.text, "values come back all the same"
    assert re.search(r"resumed step 1 \((local|memory), \d+ s ago\)", caplog.text)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("best", 0.5, "track(best=lambda: best)"),
        ("name", "x", "callable"),
        ("loader", DataLoader(TensorDataset(torch.zeros(4)), batch_size=2), "ResumableLoader"),
        ("sampler", torch.utils.data.RandomSampler(range(4)), "ResumableLoader"),
        ("thing", object(), "state_dict"),
        ("pair", (1, 2), "callable"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_once(tmp_path: Path, name: str, value: object, hint: str) -> None:
    with pytest.raises(errors.StateError, match=name) as caught:
        manager(tmp_path).track(**{name: value})
    assert hint in str(caught.value)


class Tokenizer:
    def __init__(self, words: str) -> None:
        self.words = words

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "vocab.txt").write_text(self.words)
        Path(folder, "empty.txt").write_text("")


def test_a_tokenizer_is_kept_as_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager(tmp_path).track(w=torch.zeros(1), tokenizer=Tokenizer("a b c")) as m:
        m.save_checkpoint(global_step=1)
    again = manager(tmp_path).track(w=torch.zeros(1), tokenizer=Tokenizer("a b d"))
    point = again.resume()
    assert point.state["tokenizer"] == {"vocab.txt": b"a b c", "empty.txt": b""}
    assert "tokenizer has changed since step 1: vocab.txt: differs" in caplog.text


def test_resume_goes_to_the_next_older_when_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Training()
    bits = {}
    with run.track(manager(tmp_path)) as m:
        run.run(m, 8, each=lambda step: bits.update({step: run.bits()}))
    at_four = bits[4]
    wait_for_the_agents_end(tmp_path)
    damage(tmp_path, step=8)
    other = Training(seed=3)
    m = other.track(manager(tmp_path))
    point = m.resume()
    assert point.step == 4
    assert "passed over" in caplog.text
    assert {k: v for k, v in other.bits().items() if k.startswith(("model", "opt"))} == {
        k: v for k, v in at_four.items() if k.startswith(("model", "opt"))
    }
    damage(tmp_path, step=4)
    with pytest.raises(errors.IntegrityError):
        Training().track(manager(tmp_path)).resume()
    assert manager(tmp_path).has_checkpoints()


def wait_for_the_agents_end(folder: Path) -> None:
    """What it still has in memory would be as good as the disk."""
    until = time.monotonic() + 20
    while (observer := AgentClient.observe(folder)) is not None:
        observer.close()
        assert time.monotonic() < until
        time.sleep(0.2)


def damage(folder: Path, step: int) -> None:
    (shard,) = folder.glob(f"default/step-{step:010d}-*/__0_0.distcp")
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data), 64):
        data[at] ^= 255
    shard.write_bytes(data)


def test_only_damaged_manifests_are_an_error_never_a_new_run(tmp_path: Path) -> None:
    with manager(tmp_path).track(w=torch.zeros(1)) as m:
        m.save_checkpoint(global_step=1)
    for name in ("manifest.json", "summary.json"):
        (file,) = tmp_path.glob(f"default/step-*/{name}")
        file.write_text("{")
    with pytest.raises(errors.CkptError, match="damaged"):
        manager(tmp_path).track(w=torch.zeros(1)).resume()
    assert manager(tmp_path).has_checkpoints()


def test_a_newer_checkpoint_that_nobody_can_describe_is_named_when_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with manager(tmp_path).track(w=torch.zeros(1)) as m:
        for step in (1, 2):
            m.save_checkpoint(global_step=step).wait("local")
    for name in ("manifest.json", "summary.json"):
        (file,) = tmp_path.glob(f"default/step-*2-*/{name}")
        file.write_text("{")
    assert manager(tmp_path).track(w=torch.zeros(1)).resume().step == 1
    assert "passed over step 2" in caplog.text


def test_a_new_run_starts_at_zero_and_a_missing_step_is_an_error(tmp_path: Path) -> None:
    m = manager(tmp_path / "absent").track(w=torch.zeros(1))
    point = m.resume()
    assert (point.step, bool(point), point.next_epoch) == (0, False, 0)
    assert not m.has_checkpoints()
    assert m.load_checkpoint() == (0, 0)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(errors.CheckpointNotFoundError):
        manager(tmp_path / "absent", resume=7).track(w=torch.zeros(1)).resume()


def test_never_starts_a_timeline_whose_past_is_empty(tmp_path: Path) -> None:
    with manager(tmp_path).track(w=torch.zeros(1)) as m:
        m.save_checkpoint(global_step=10)
    m = manager(tmp_path, resume="never").track(w=torch.ones(1))
    assert not m.resume()
    with m:
        m.save_checkpoint(global_step=3)
    with CheckpointStore(tmp_path) as store:
        assert [i.step for i in store.checkpoints()] == [3]
        assert sorted(i.step for i in store.checkpoints(include_superseded=True)) == [3, 10]


def test_suspect_state_is_tagged_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    with manager(tmp_path).track(model=model) as m:
        m.save_checkpoint(global_step=1)
        with torch.no_grad():
            model.weight[1, 2] = float("nan")
        handle = m.save_checkpoint(global_step=2)
        assert handle is not None
        assert handle.wait().tags == ("suspect",)
    again = manager(tmp_path).track(model=nn.Linear(4, 4))
    assert again.resume().step == 1
    assert "passed over step 2" in caplog.text
    assert manager(tmp_path, resume=2).track(model=nn.Linear(4, 4)).resume().step == 2


def test_a_changed_model_is_refused_in_words_and_untouched(tmp_path: Path) -> None:
    with manager(tmp_path).track(model=nn.Linear(4, 4)) as m:
        m.save_checkpoint(global_step=1)
    other = nn.Linear(4, 5)
    before = other.weight.detach().clone()
    with pytest.raises(
        errors.LoadMismatchError, match=r"model.weight: stored shape \[4, 4\], target shape \[5, 4\]"
    ) as found:
        manager(tmp_path).track(model=other).resume()
    assert (len(found.traceback), found.value.__cause__) == (2, None), "our own frames say nothing more"
    assert torch.equal(other.weight, before)


def test_a_checkpoint_of_the_bare_store_is_resumed_too(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=CONFIG) as store:
        store.save({"w": torch.ones(3)}, 7, epoch=2, wait="local")
    w = torch.zeros(3)
    point = manager(tmp_path).track(w=w).resume()
    assert (point.step, point.epoch, w.sum().item()) == (7, 2, 3.0)


def test_only_a_load_of_everything_proves_a_checkpoint(tmp_path: Path) -> None:
    def proven() -> set[str]:
        return history.sound(LocalTier(tmp_path), "default")

    with manager(tmp_path).track(model=nn.Linear(2, 2), w=torch.zeros(4), config={"lr": 1}, at=lambda: 7) as m:
        assert m.save_checkpoint(global_step=1) is not None
    m = manager(tmp_path)
    assert m.load_checkpoint(nn.Linear(2, 2)) == (0, 1)
    assert proven() == set()
    assert m.load_checkpoint(nn.Linear(2, 2), w=torch.zeros(4)) == (0, 1)
    assert len(proven()) == 1
    m.close()


def test_a_store_that_was_passed_stays_open(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, run="mine", config=CONFIG) as store:
        with CheckpointManager(store=store).track(w=torch.zeros(1)) as m:
            m.save_checkpoint(global_step=1)
        store.save({"w": torch.zeros(1)}, 2, wait="local")
        assert [i.step for i in store.checkpoints()] == [1, 2]
    with pytest.raises(errors.ConfigError, match="either"):
        CheckpointManager(tmp_path, store=store)
    with pytest.raises(errors.ConfigError, match="belong to the store"):
        CheckpointManager(store=store, run="other")


def test_a_failed_save_is_survived_until_too_many_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path / "s", config=CONFIG)
    m2 = CheckpointManager(store=store, save_every_steps=1, max_save_failures=2).track(w=torch.zeros(1))
    fail = errors.NoSpaceError("no space left on device", errno=28)

    def refuse(*_: Any, **__: Any) -> None:
        raise fail

    store.save = refuse  # type: ignore[method-assign,assignment]
    assert m2.step(1) is None
    assert "no space left" in caplog.text
    with pytest.raises(errors.NoSpaceError):
        m2.step(2)
    m3 = CheckpointManager(store=store, save_every_steps=1).track(w=torch.zeros(1))
    with pytest.raises(errors.SaveFailedError, match="the last save failed: no space left"), m3:
        assert m3.step(1) is None
    store.close()


def test_the_last_steps_are_told_and_keep_what_was_said_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ckptstore")
    with manager(tmp_path, save_every_steps=2, save_freq=1).track(w=torch.zeros(1)) as m:
        for step in range(1, 6):
            m.step(step, metrics={"loss": step})
    assert "the last step is in no checkpoint; manager.save_checkpoint()" in caplog.text
    caplog.clear()
    with manager(tmp_path, save_every_steps=4, save_freq=1).track(w=torch.zeros(1)) as m:
        assert m.resume().step == 4
        m.step(5, metrics={"loss": 5})
        m.epoch_end(0)
        m.step(6, metrics={"loss": 6})
        m.save_checkpoint()
    assert "in no checkpoint" not in caplog.text
    with CheckpointStore(tmp_path) as store:
        assert [info.metrics["loss"] for info in store.checkpoints()] == [2, 4, 5, 6]


def test_the_disk_forecast_is_said_when_room_gets_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptstore.manager import saving

    with manager(tmp_path, keep_every_steps=1).track(w=torch.zeros(1 << 18)) as m:
        m.save_checkpoint(global_step=400).wait()  # type: ignore[union-attr]
        monkeypatch.setattr(saving, "_free_bytes", lambda path: 7 << 19)
        m.save_checkpoint(global_step=800)
    assert "room for 3 more checkpoints; disk full at about step 2 000" in caplog.text


def test_curves_reach_a_summary_writer(tmp_path: Path) -> None:
    points: dict[str, list[int]] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            points.setdefault(tag, []).append(step)

    with manager(tmp_path, summary_writer=Writer()).track(w=torch.zeros(1)) as m:
        m.save_checkpoint(global_step=1).wait()  # type: ignore[union-attr]
        m.step(2)
    assert points["ckptstore/save_stall_seconds"] == [1]
    assert points["ckptstore/local_step"] == [1]
    assert points["ckptstore/local_lag_seconds"] == [1]
    with manager(tmp_path, summary_writer=Writer()).track(w=torch.zeros(1)) as m:
        m.resume()
        m.step(2)
    assert points["ckptstore/load_local_bytes"] == [1], "and what a load took, by source"


@pytest.mark.parametrize(("answer", "step"), [("", 8), ("y", 8), ("4", 4), ("n", 0), ("5\ny", 8)])
def test_a_person_at_the_terminal_chooses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    answer: str,
    step: int,
) -> None:
    caplog.set_level(logging.INFO, logger="ckptstore")
    with manager(tmp_path).track(w=torch.zeros(1)) as m:
        for each in (4, 8):
            m.save_checkpoint(global_step=each, epoch=1, metrics={"loss": 0.25})
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(ours, answer.encode() + b"\n")
        point = manager(tmp_path, resume="ask").track(w=torch.zeros(1)).resume()
    os.close(ours)
    assert point.step == step
    assert "step 8  epoch 1  0 s ago  loss 0.25" in capfd.readouterr().err
    assert ("starting over" in caplog.text) == (step == 0)


def test_nobody_is_asked_without_a_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager(tmp_path).track(w=torch.zeros(1)) as m:
        m.save_checkpoint(global_step=4)
    with caplog.at_level(logging.INFO, logger="ckptstore"):
        assert manager(tmp_path, resume="ask").track(w=torch.zeros(1)).resume().step == 4
    assert "without a terminal" in caplog.text


def test_the_explicit_face_works_with_exactly_these_names(tmp_path: Path) -> None:
    """The calls of an epoch-style trainer, as they are written there."""

    def make() -> tuple[nn.Module, Any, Any]:
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    model, optimizer, scheduler = make()
    with CheckpointManager(
        save_dir=tmp_path, model_name="org/my model", save_freq=1, logger=logging.getLogger("t"), config=CONFIG
    ) as m:
        assert not m.has_checkpoints()
        for epoch in range(3):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
            m.save_checkpoint(
                model=model,
                optimizer=optimizer,
                scheduler=scheduler,
                epoch=epoch,
                global_step=epoch + 1,
                loss_history=[0.5] * (epoch + 1),
                metrics={"avg_loss": 1.0 - epoch % 2},
                tokenizer=None,
                config={"a": 1},
                is_best=epoch == 1,
                is_emergency=epoch == 2,
            )
    model2, optimizer2, scheduler2 = make()
    m = CheckpointManager(save_dir=tmp_path, model_name="org/my model", save_freq=1, config=CONFIG)
    assert m.has_checkpoints()
    epoch, step = m.load_checkpoint(model=model2, optimizer=optimizer2, scheduler=scheduler2, latest=True)
    assert (epoch, step) == (2, 3)
    assert torch.equal(model2.weight, model.weight)
    assert scheduler2.get_last_lr() == scheduler.get_last_lr()
    assert m.point.history == [0.5] * 3
    assert (m.point.epoch_finished, m.point.info.emergency) == (False, True)  # type: ignore[union-attr]
    again = CheckpointManager(save_dir=tmp_path, model_name="org/my model", monitor="avg_loss", config=CONFIG)
    assert again.load_checkpoint(model=model2, best=True) == (1, 2)
    bare = CheckpointManager(save_dir=tmp_path, model_name="org/my model", config=CONFIG)
    assert bare.load_checkpoint(latest=True) == (2, 3)


def test_a_step_without_a_save_costs_next_to_nothing(tmp_path: Path) -> None:
    with manager(tmp_path, save_every_steps=10**9, save_every_seconds=3600).track(w=torch.zeros(2)) as m:
        m.step(1)
        spent = []
        for step in range(2, 2002):
            began = time.perf_counter()
            m.step(step, epoch=1, metrics={"loss": 1.0})
            spent.append(time.perf_counter() - began)
    assert sorted(spent)[1000] < 0.001 * 0.050
