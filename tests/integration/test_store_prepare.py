"""Preparing a store: what a first save costs beyond its copy is done ahead, and nothing is written."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from store_jobs import prepare_in_vain, prepare_on_ranks
from torch import nn
from training import manager

from ckptstore import CheckpointStore, StoreConfig, errors
from ckptstore.agent.pages import Pages

QUICK = StoreConfig(agent_idle_exit_seconds=5)
WEIGHTS = torch.arange(6_000_000, dtype=torch.float32)
LARGE = {"w": WEIGHTS, "history": [1, 2]}


def session(store: CheckpointStore) -> Any:
    assert store._session is not None
    return store._session


def test_the_first_save_finds_its_agent_its_plan_and_its_memory(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=QUICK) as store:
        store.prepare(LARGE)
        assert store.checkpoints() == []
        plan, arena = session(store)._lease.plan, session(store)._lease.arena
        deadline = time.monotonic() + 60
        while not all(pages.are_there for pages in arena.pages):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        store.prepare(LARGE)  # again does no harm
        handle = store.save(LARGE, 1)
        handle.wait("local", 60)
        assert (session(store)._lease.plan, session(store)._lease.arena) == (plan, arena)
        assert [info.step for info in store.checkpoints()] == [1]
        assert torch.equal(store.read(1)["w"], WEIGHTS)


def test_pages_come_between_saves_and_never_during_one(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=QUICK) as store:
        store.save(LARGE, 1).wait("local", 60)
        client, arena = session(store).link.client, session(store)._lease.arena
        held = client.reserve(60.0)
        client._arena = arena = replace(arena, pages=tuple(Pages(memory) for memory in arena.generations))
        client._bring(arena)
        assert not any(pages.are_there for pages in arena.pages), "a copy is under way"
        client.release(held)
        deadline = time.monotonic() + 60
        while not all(pages.are_there for pages in arena.pages):
            client.bring_pages()  # nothing, while the thread of the other pages is about to end
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_another_state_than_the_prepared_one_is_saved_all_the_same(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=QUICK) as store:
        store.prepare({"w": torch.ones(3)})
        store.save({"w": torch.ones(5), "v": torch.ones(2)}, 1).wait("local", 60)
        assert store.read(1)["v"].tolist() == [1.0, 1.0]


def test_what_cannot_be_stored_is_said_when_preparing(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=QUICK) as store:
        with pytest.raises(errors.StateError, match=r"extra\.hook"):
            store.prepare({"w": torch.ones(3), "extra": {"hook": lambda: 0}})
        store.save({"w": torch.ones(3)}, 1).wait("local", 60)


def test_a_store_that_only_reads_prepares_nothing(tmp_path: Path) -> None:
    with (
        CheckpointStore(None, f"file://{tmp_path}/bucket") as store,
        pytest.raises(errors.ConfigError, match="read-only"),
    ):
        store.prepare(LARGE)


def test_training_goes_on_when_there_is_no_agent_to_be_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = StoreConfig(agent_idle_exit_seconds=5, agent_start_timeout_s=0.001)
    with CheckpointStore(tmp_path, config=config) as store, caplog.at_level(logging.WARNING):
        store.prepare(LARGE)
    assert "preparing to save failed, the first save tries again" in caplog.text


def test_ranks_prepare_together(tmp_path: Path) -> None:
    assert run_ranks(2, prepare_on_ranks, str(tmp_path / "store")) == [(True, [7])] * 2


def test_ranks_that_prepare_while_others_save_are_told(tmp_path: Path) -> None:
    for result in run_ranks(2, prepare_in_vain, str(tmp_path / "store")):
        assert type(result).__name__ == "SaveFailedError"


def test_a_manager_prepares_at_its_first_step(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    asked: list[int] = []
    with manager(tmp_path, save_every_steps=3).track(model=model, count=lambda: len(asked)) as m:
        assert m.step(1) is None
        ready = session(m.store)._lease.arena
        assert ready is not None
        assert m.store.checkpoints() == []
        m.step(2)
        handle = m.step(3)
        assert handle is not None
        handle.wait("local", 60)
        assert session(m.store)._lease.arena is ready
        assert [info.step for info in m.store.checkpoints()] == [3]


def test_a_manager_trains_on_when_it_cannot_prepare(tmp_path: Path) -> None:
    answers: list[Any] = [RuntimeError("not yet"), 1]

    def value() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with manager(tmp_path, save_every_steps=2).track(w=torch.ones(2), value=value) as m:
        assert m.step(1) is None
        handle = m.step(2)
        assert handle is not None
        handle.wait("local", 60)
    assert answers == []
