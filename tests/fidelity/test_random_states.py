"""Random nested states with tensors in them come back by every way, bit for bit.

In the ordinary suite 400 states in memory, and 200 through the disk, a bucket, `read`, and an export and its import;
20 000 each with ``make test-deep`` (``CKPTSTORE_TEST_SCALE=50``, which is 50 times and, on disk, 100).
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from memory_checkpoint import save
from random_states import Held, states
from sameness import assert_same

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.dcp.foreign import open_torch_file, save_torch_file
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state
from ckptstore.ops.export import Selection, export_safetensors, export_with
from ckptstore.ops.importing import import_state, open_safetensors
from ckptstore.ops.open import RunTiers
from ckptstore.ops.safetensors import NAMES
from ckptstore.repo.local import LocalTier

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.timeout(int(os.environ.get("CKPTSTORE_TEST_SCALE", "1")) * 180),
]
SCALE = int(os.environ.get("CKPTSTORE_TEST_SCALE", "1"))
#: States in one save through the real store: a save costs as much as many states do.
BATCH = 25
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=400 * SCALE, deadline=None, suppress_health_check=QUIET)
@given(states())
def test_random_state_comes_back_when_read_or_loaded(held: Held) -> None:
    state = held.value
    checkpoint = save({"state": state}, chunk_elements=16)
    assert_same(state, read_state(checkpoint)["state"])
    target = {"state": None}
    load_into(target, checkpoint)
    assert_same(state, target["state"])


class Places:
    """A store with a bucket, the bucket alone, and a folder for what is exported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        bucket = f"file://{folder}/bucket"
        self.both = CheckpointStore(folder / "store", remote=bucket, config=StoreConfig(agent_idle_exit_seconds=5))
        self.remote = CheckpointStore(None, remote=bucket)
        self.steps = itertools.count(1)

    @property
    def tiers(self) -> RunTiers:
        return RunTiers("default", LocalTier(self.folder / "store"), ())

    def imported(self, file: Path, opened: Any) -> Any:
        """What an import of this gives back; nothing of it is left."""
        try:
            with opened as state:
                import_state(LocalTier(self.folder / "imported"), "default", 1, state)
            return CheckpointStore(self.folder / "imported").read()
        finally:
            file.unlink()
            shutil.rmtree(self.folder / "imported", ignore_errors=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    places = Places(tmp_path_factory.mktemp("random"))
    with places.both, places.remote:
        yield places


# Not shrunk: a failure names the state of the batch, and each attempt costs two saves.
@settings(
    max_examples=8 * (SCALE if SCALE == 1 else 2 * SCALE),
    deadline=None,
    suppress_health_check=QUIET,
    phases=(Phase.reuse, Phase.generate),
)
@given(st.lists(states(), min_size=BATCH, max_size=BATCH))
def test_random_states_come_back_from_disk_and_bucket_and_export(places: Places, many: list[Held]) -> None:
    step = next(places.steps)
    wanted = {str(i): held.value for i, held in enumerate(many)}
    handle = places.both.save(wanted, step, wait="remote")
    for store in (places.both, places.remote):
        assert_same(wanted, store.read(handle.save_id))
        target = dict.fromkeys(wanted)
        store.load(target, handle.save_id)
        assert_same(wanted, target)

    fitting = {key: value for key, value in wanted.items() if _can_be_exported(value)}
    handle = places.both.save(fitting, step, wait="local")
    file = export_safetensors(places.tiers, handle.save_id, places.folder / "out.safetensors", Selection()).path
    assert_same(fitting, places.imported(file, open_safetensors(file)))
    file = export_with(places.tiers, handle.save_id, places.folder / "out.pt", Selection(), save_torch_file).path
    assert_same(fitting, places.imported(file, open_torch_file(file, trust_pickle=True)))
    if step % 10 == 0:
        for info in places.both.checkpoints():
            places.both.delete(info.save_id)


def _can_be_exported(value: Any) -> bool:
    """Whether safetensors has a name for every dtype in it, and torch.save, left alone, keeps all of it.

    A pickle of protocol 2 forgets the fold of a time and the byte order of an array.
    """
    if any(meta.dtype not in NAMES for meta in save({"": value}).tensors.values()):
        return False
    file = io.BytesIO()
    torch.save(value, file)
    try:
        assert_same(value, torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    except AssertionError:
        return False
    return True
