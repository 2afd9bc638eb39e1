"""One training state in every layout, loaded into others: world sizes 1 to 8 in all pairs, 1-D and 2-D meshes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from reshard_jobs import matrix


@pytest.mark.timeout(400)
def test_state_is_that_of_the_global_tensors_when_loaded_into_any_layout(tmp_path: Path) -> None:
    for problems in run_ranks(8, matrix, tmp_path, timeout_s=360):
        assert problems == []
