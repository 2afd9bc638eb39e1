"""A bucket written by format 1, with every codec and chain in it, restores to the same bytes for ever."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from blake3 import blake3

from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.codec.base import CODECS
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier

GOLDEN = Path(__file__).parents[2] / "compat" / "remote_v1.json"


def test_golden_bucket_restores_to_the_bytes_it_was_made_of(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    blob = open_blob_store(f"mem://{new_nonce()}", retry=False)
    for key, data in golden["objects"].items():
        blob.put(key, base64.b64decode(data))
    remote = RemoteTier(blob, "default", "r")
    tier = LocalTier(tmp_path / "store")
    tier.create()
    used: set[str] = set()
    for save in remote.saves():
        path = pull(remote, save, tier)
        assert {f.name: blake3(f.read_bytes()).hexdigest() for f in path.iterdir()} == golden["restored"][path.name]
        document = remote.find_shard(save.save_id, 0)
        assert document is not None
        used |= {frame.codec for frame in document.frames}
        chains = {(f.codec, f.base.codec if f.base is not None else None) for f in document.frames}
    assert used == set(CODECS)
    assert ("derived", "delta") in chains
