"""The curve between checkpoints: what goes in, what it may cost, and that it never stands in the way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore.manager.live import PERIOD_SECONDS, Live
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    tier.make_run("bert")
    return tier


def read(tier: LocalTier) -> list[dict[str, Any]]:
    return journal.read(tier, "bert", "live")


def test_points_are_written_once_a_period_with_what_is_on_the_host(tier: LocalTier) -> None:
    clock, optimizer = Clock(), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.25)
    live = Live(tier.root, "bert", lambda: [optimizer], clock)
    on_a_device = torch.empty((), device="meta")  # asking a meta tensor for its value raises, as asking a GPU waits
    for step in range(1, 25):
        clock.now += PERIOD_SECONDS / 8
        loss = torch.tensor(1 / step, requires_grad=True)
        noted: dict[Any, Any] = {
            "loss": loss,
            "far": on_a_device,
            "nan": float("nan"),
            "word": "x",
            "many": torch.ones(3),
        }
        noted |= {"complex": torch.tensor(1j), "huge": 10**400, 3: 4.0}
        live.note(step, 2, noted)
    live.close()
    found = read(tier)
    assert [(point["step"], point["epoch"]) for point in found] == [(1, 2), (9, 2), (17, 2)]
    assert found[0]["metrics"] == {"loss": 1.0, "nan": "nan", "3": 4.0, "lr": 0.25}


def test_a_given_learning_rate_counts(tier: LocalTier) -> None:
    live = Live(tier.root, "bert", lambda: [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.25)])
    live.note(1, None, {"lr": 0.5})
    live.close()
    assert read(tier)[0]["metrics"] == {"lr": 0.5}


def test_points_wait_for_the_first_save(tmp_path: Path) -> None:
    clock, tier = Clock(), LocalTier(tmp_path / "store")
    live = Live(tier.root, "bert", list, clock)
    for step in (1, 2):
        clock.now = step * 10.0
        live.note(step, None, {"loss": 1.0})
    live.close()
    assert not tier.root.exists(), "looking at training makes no store"
    tier.create()
    tier.make_run("bert")
    clock.now = 30.0
    live.note(3, None, {"loss": 1.0})
    live.close()
    assert [point["step"] for point in read(tier)] == [1, 2, 3]


def test_training_does_not_wait_for_the_disk(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, clock = threading.Event(), Clock()
    monkeypatch.setattr(journal, "append", lambda *_: let_go.wait(30))
    live = Live(tier.root, "bert", list, clock)
    for step in range(1, 100):
        clock.now += 10
        live.note(step, None, {"loss": 1.0})
    assert not let_go.is_set(), "all steps were taken while the disk hung"
    let_go.set()
    live.close()


def test_the_writer_ends_when_the_disk_comes_back_after_the_close(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(journal, "append", lambda *_: let_go.wait(60))
    before = set(threading.enumerate())
    live = Live(tier.root, "bert", list)
    live.note(1, None, {"loss": 1.0})
    (writer,) = set(threading.enumerate()) - before
    live.close()
    assert writer.is_alive()
    let_go.set()
    writer.join(30)
    assert not writer.is_alive()


def test_nothing_is_done_without_a_local_tier() -> None:
    before = set(threading.enumerate())
    live = Live(None, "bert", list)
    live.note(1, None, {"loss": 1.0})
    assert "ckptstore-live" not in {thread.name for thread in set(threading.enumerate()) - before}
    live.close()
