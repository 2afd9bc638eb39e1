"""gc and doctor against a real S3 server: its times, its listings, its conditional creates."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import LockedError
from ckptstore.ops.doctor import doctor
from ckptstore.ops.open import Place, RunTiers
from ckptstore.ops.verify import verify
from ckptstore.repo import gc
from ckptstore.repo.gc_lease import Lease, ServerTime
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint
from ckptstore.testing.s3_server import SeaweedServer


def test_deleted_saves_are_collected_and_the_rest_stays_whole(tmp_path: Path) -> None:
    with SeaweedServer(tmp_path / "s3") as server:
        blob = open_blob_store(server.url("prefix"), environ=server.environ)
        tier, remote, nonce = LocalTier(tmp_path / "local"), RemoteTier(blob, "run", "s3"), new_nonce()
        state = {"kept": np.arange(5000.0), "new": np.arange(5000.0)}
        for n in (1, 2, 3):
            path = write_checkpoint(tier, state, run="run", step=n, save_id=f"{nonce}-{n}")
            push(tier, path, "run", remote, config=StoreConfig())
            state["new"] = np.random.default_rng(n).normal(size=5000)
        remote.delete(remote.saves()[1])
        before = len(remote.list_keys("packs"))
        deleted = 0
        for _ in range(4):
            time.sleep(1.1)  # the server tells times to the second
            (done,) = gc.collect(blob, "s3", ["run"], rules=gc.Rules(grace_seconds=1.0))
            deleted += len(done.deleted)
        assert deleted == 2, "a shard manifest and a pack"
        assert len(remote.list_keys("packs")) == before - 1
        assert verify(RunTiers("run", None, (remote,)), None, everything=True, read_data=True).is_clean
        lease = Lease(blob, ServerTime(blob))
        with lease, pytest.raises(LockedError):
            gc.collect(blob, "s3", ["run"])
        states = {check.name: check.state for check in doctor(Place(None, {"s3": blob}))}
        assert states["s3: clock"] == states["s3: lifecycle"] == states["s3: conditional create"] == "ok"
        blob.close()
