"""Random nested states with tensors in them come back by every way, bit for bit.

400 in memory and 200 on disk in the ordinary suite; 20 000 and 5 000 with ``make test-deep``
(``CKPTSTORE_TEST_SCALE=50``).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_checkpoint import save
from random_states import Held, states
from sameness import assert_same

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.dcp.loader import load_into
from ckptstore.dcp.reading import read_state

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


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CheckpointStore, CheckpointStore]]:
    folder: Path = tmp_path_factory.mktemp("random")
    bucket = f"file://{folder}/bucket"
    config = StoreConfig(agent_idle_exit_seconds=5)
    with (
        CheckpointStore(folder / "store", remote=bucket, config=config) as both,
        CheckpointStore(None, remote=bucket) as remote,
    ):
        yield both, remote


_steps = itertools.count(1)


@settings(max_examples=8 * max(1, SCALE // 2), deadline=None, suppress_health_check=QUIET)
@given(st.lists(states(), min_size=BATCH, max_size=BATCH))
def test_random_states_come_back_from_disk_and_bucket(
    stores: tuple[CheckpointStore, CheckpointStore], many: list[Held]
) -> None:
    both, remote = stores
    step = next(_steps)
    wanted = {str(i): held.value for i, held in enumerate(many)}
    handle = both.save(wanted, step, wait="remote")
    for store in (both, remote):
        assert_same(wanted, store.read(handle.save_id))
        target = dict.fromkeys(wanted)
        store.load(target, handle.save_id)
        assert_same(wanted, target)
    if step % 10 == 0:
        for info in both.checkpoints():
            both.delete(info.save_id)
