"""Makes the room's chunk factory importable under pytest's importlib mode, and runs every test both ways."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptstore import native

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", params=["kernels", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the C kernels, and without. For a whole module, so that no thread of a test sees both."""
    kept = native._kernels
    if request.param == "kernels":
        assert native.is_available()
    else:
        native._kernels = None
    yield request.param
    native._kernels = kept
