"""A copy that does not end well: the save fails at once, nobody waits for it, and later saves work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.dcp.stage import Stage


@pytest.mark.parametrize("overlap", [False, True])
def test_later_saves_work_when_copies_fail_or_are_interrupted(
    overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(overlap=overlap, back_pressure_timeout_s=5, agent_idle_exit_seconds=2)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters())
    with CheckpointStore(tmp_path / "store", config=config) as store:
        if overlap:
            store.guard(optimizer)
        state = {"model": model, "x": torch.ones(3)}
        store.save(state, 1, wait="local")
        handles = []
        for step, error in enumerate((RuntimeError("no"), ValueError("no"), KeyboardInterrupt(), MemoryError()), 2):

            def fail(*_: Any, error: BaseException = error, **__: Any) -> int:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(Stage, "copy", fail)
                if isinstance(error, KeyboardInterrupt):
                    with pytest.raises(KeyboardInterrupt):
                        store.save(state, step)
                else:
                    handles.append(store.save(state, step))
        assert [handle.failure() is not None for handle in handles] == [True] * 3
        assert store._session is not None
        assert all(handle.done("local") for handle in store._session.link.handles.values())
        store.save(state, 9, wait="local")
        assert [info.step for info in store.checkpoints()] == [1, 9]
        store._session.link.handles.clear()  # the failures are known
