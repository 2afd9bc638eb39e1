"""Saves of another structure than the last one: the arena is laid out anew, and back-pressure holds for that too."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.errors import SaveFailedError

WHOLE = {"w": torch.ones(3), "m": torch.ones(4)}
PART = {"w": torch.full((3,), 2.0)}


def config(policy: Literal["skip", "fail"]) -> StoreConfig:
    return StoreConfig(back_pressure=policy, back_pressure_timeout_s=5.0, agent_idle_exit_seconds=5)


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_save_of_another_structure_does_not_wait_when_the_policy_says_so(
    tmp_path: Path, policy: Literal["skip", "fail"]
) -> None:
    with CheckpointStore(tmp_path, config=config(policy)) as store:
        store.save(WHOLE, 1).wait("local", 60)
        session: Any = store._session
        held = session.link.client.reserve(0.0)  # as if it were still being written
        for step in (2, 3):
            if policy == "skip":
                assert store.save(PART, step).local.result().skipped
            else:
                with pytest.raises(SaveFailedError, match="previous saves are still being written"):
                    store.save(PART, step)
        session.link.client.release(held)
        store.save(PART, 4).wait("local", 60)
        store.save(WHOLE, 5).wait("local", 60)
        assert [info.step for info in store.checkpoints()] == [1, 4, 5]
        assert store.read(4)["w"].tolist() == [2.0] * 3


def test_a_structure_too_large_for_this_machine_does_not_keep_others_from_being_saved(tmp_path: Path) -> None:
    too_large = {"w": torch.zeros(1).expand(1 << 44)}
    store = CheckpointStore(tmp_path, config=StoreConfig(back_pressure_timeout_s=5.0, agent_idle_exit_seconds=5))
    try:
        store.save(PART, 1).wait("local", 60)
        for step in (2, 4):
            with pytest.raises(SaveFailedError, match="staging needs"):
                store.save(too_large, step).wait("local", 60)
            store.save(PART, step + 1).wait("local", 60)
        assert [info.step for info in store.checkpoints()] == [1, 3, 5]
    finally:
        with suppress(SaveFailedError):  # those of above
            store.close()


def test_a_disk_that_stalls_for_longer_than_saves_wait_fails_the_save_and_not_the_training(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, config=StoreConfig(back_pressure_timeout_s=0.2, agent_idle_exit_seconds=5))
    try:
        store.save(WHOLE, 1).wait("local", 60)
        client = cast(Any, store._session).link.client
        held = [client.reserve(1.0), client.reserve(1.0)]  # as if both were still being written
        stuck = store.save(WHOLE, 2)
        with pytest.raises(SaveFailedError, match="step 2 was not saved: the previous saves are still being written"):
            stuck.wait("staged", 60)
        for generation in held:
            client.release(generation)
        store.save(WHOLE, 3).wait("local", 60)
        assert [info.step for info in store.checkpoints()] == [1, 3]
    finally:
        with suppress(SaveFailedError):
            store.close()
