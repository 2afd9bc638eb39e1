"""Which lifecycle rules of a bucket would eat checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from ckptstore.blob.s3.store import _deletes

AGE = {"Days": 30}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"ID": "all", "Status": "Enabled", "Filter": {}, "Expiration": AGE}, "rule 'all' deletes objects by age"),
        ({"ID": "a", "Status": "Enabled", "Prefix": "ck/", "Expiration": AGE}, "rule 'a' deletes objects by age"),
        ({"ID": "p", "Status": "Enabled", "Filter": {"Prefix": "ck/pt/runs/"}, "Expiration": AGE}, "rule 'p' deletes"),
        (
            {"Status": "Enabled", "Filter": {"Prefix": ""}, "Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]},
            "rule '' freezes",
        ),
        ({"ID": "off", "Status": "Disabled", "Filter": {}, "Expiration": AGE}, None),
        ({"ID": "elsewhere", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": AGE}, None),
        ({"ID": "parts", "Status": "Enabled", "Filter": {}, "AbortIncompleteMultipartUpload": {}}, None),
        ({"ID": "tidy", "Status": "Enabled", "Filter": {}, "Expiration": {"ExpiredObjectDeleteMarker": True}}, None),
        ({"Status": "Enabled", "Filter": {}, "Transitions": [{"Days": 1, "StorageClass": "STANDARD_IA"}]}, None),
    ],
)
def test_rule_counts_when_it_takes_away_what_is_below_the_prefix(rule: dict[str, Any], expected: str | None) -> None:
    told = _deletes(rule, "ck/pt/")
    assert (told is None) if expected is None else told is not None and told.startswith(expected)
