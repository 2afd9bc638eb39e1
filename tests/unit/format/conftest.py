"""What the tests of the format share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptstore.format import tree
from ckptstore.format.manifest import canonical

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from sameness import assert_same as _assert_same  # found by the line above


def _through_json(value: object, **how: Any) -> Any:
    """The value after encoding, being a file, and decoding; references stay."""
    text = canonical(tree.encode(value))
    how = {"trusted": "loaded", **how}
    return tree.decode(json.loads(text), lambda ref: ref, **how)


@pytest.fixture(scope="session")
def through_json() -> Callable[..., Any]:
    return _through_json


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    return _assert_same
