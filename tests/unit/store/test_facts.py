"""What can't be kept with a checkpoint is refused before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from ckptstore.errors import ConfigError, StateError
from ckptstore.store.facts import check_arguments, read_metrics


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"step": -1}, id="step below 0"),
        pytest.param({"step": True}, id="step bool"),
        pytest.param({"step": 2.0}, id="step float"),
        pytest.param({"step": 10**18}, id="step with more digits than a directory's name may have"),
        pytest.param({"epoch": 1.5}, id="epoch float"),
        pytest.param({"epoch": "last"}, id="epoch str"),
        pytest.param({"tags": "best"}, id="one tag instead of several"),
        pytest.param({"tags": [1]}, id="tag int"),
        pytest.param({"tags": None}, id="tags None"),
    ],
)
def test_arguments_that_can_not_be_kept_are_refused(arguments: dict[str, Any]) -> None:
    check_arguments(10**18 - 1, None, ("a",))
    check_arguments(0, 3, [])
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        check_arguments(**{"step": 1, "epoch": None, "tags": (), **arguments})


def test_metrics_that_are_no_numbers_are_refused() -> None:
    metrics: Any = {"loss": 10**400}
    with pytest.raises(StateError, match="loss"):
        read_metrics(metrics)
    metrics = [0.5]
    with pytest.raises(ConfigError, match="mapping"):
        read_metrics(metrics)
