"""Choosing a checkpoint without ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.blob.base import ObjectInfo
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.errors import IntegrityError, TransientError
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.store.loading import Tiers, choose


class SilentBlobStore(MemoryBlobStore):
    """A bucket behind a network that is down."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise TransientError("connection refused", reason="unreachable")


def test_nothing_is_called_lost_while_a_remote_that_may_have_it_can_not_be_asked(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, config=StoreConfig(agent_idle_exit_seconds=1)) as store:
        store.save({"w": torch.ones(3)}, 1, wait="local")
    local = LocalTier(tmp_path)
    silent = RemoteTier(SilentBlobStore("walk"), "default", "s3")
    record, reader, passed = choose(Tiers("default", local, (silent,)), "latest")
    reader.close()
    assert record.step == 1
    assert passed == ("what only remote s3 has: connection refused",)
    (manifest,) = tmp_path.glob("default/step-*/shard-00000.json")
    manifest.write_text("{")
    with pytest.raises(TransientError, match="within reach") as caught:
        choose(Tiers("default", local, (silent,)), "latest")
    assert caught.value.context["reason"] == "unreachable"
    with pytest.raises(IntegrityError, match="damaged"):
        choose(Tiers("default", local, ()), "latest")
