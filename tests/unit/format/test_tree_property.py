"""Random nested states come back equal in type, order and every bit."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from random_states import plain_states

from ckptstore.format import tree

EXAMPLES = 100 * int(os.environ.get("CKPTSTORE_TEST_SCALE", "1"))
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@SETTINGS
@given(plain_states)
def test_random_state_comes_back_unchanged(through_json: Any, assert_same: Any, state: Any) -> None:
    assert_same(state, through_json(state))


@SETTINGS
@given(plain_states)
def test_encoding_is_canonical_when_repeated(through_json: Any, state: Any) -> None:
    assert tree.encode(through_json(state)) == tree.encode(state)
    list(tree.iter_leaves(tree.encode(state)))
