"""Rates, estimates, and caps by time of day."""

from __future__ import annotations

from datetime import datetime

import pytest

from ckptstore.agent.pace import Pace, cap_at, pack_bytes
from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError


def test_pace_follows_the_recent_past_and_skips_idle_time() -> None:
    pace = Pace()
    assert (pace.plain_bytes_per_s, pace.sent_bytes_per_s, pace.seconds_for(1)) == (None, None, None)
    pace.begin(100.0)
    for second in range(1, 11):
        pace.note(100.0 + second, second * 1000, second * 100)
    assert pace.plain_bytes_per_s == pytest.approx(1000)
    assert pace.sent_bytes_per_s == pytest.approx(100)
    assert pace.seconds_for(5000) == pytest.approx(5)
    pace.begin(10_000.0)  # the hours between two saves don't count
    pace.note(10_001.0, 1000, 100)
    assert pace.plain_bytes_per_s == pytest.approx(1000)
    for second in range(2, 120):
        pace.note(10_000.0 + second, second * 2000, 0)
    assert pace.plain_bytes_per_s == pytest.approx(2000, rel=0.02)
    assert pace.sent_bytes_per_s == pytest.approx(0, abs=2)


def test_time_left_counts_what_is_ready_and_the_cap() -> None:
    pace = Pace()
    pace.begin(0.0)
    pace.note(1.0, 1000, 0)
    assert pace.seconds_for(1000) == pytest.approx(1)
    assert pace.seconds_for(1000, 600) is None, "nothing has been sent yet"
    assert pace.seconds_for(1000, 600, cap=100.0) == pytest.approx(12)
    pace.note(2.0, 2000, 1000)
    assert pace.seconds_for(1000) == pytest.approx(1)
    assert pace.seconds_for(0, 1000) == pytest.approx(2, rel=0.05)
    assert pace.seconds_for(0, 1000, cap=100.0) == pytest.approx(10)


@pytest.mark.parametrize(
    ("time", "cap"), [("07:59", None), ("08:00", 5e6), ("12:00", 5e6), ("20:00", None), ("23:59", None)]
)
def test_cap_is_that_of_the_hour_when_scheduled(time: str, cap: float | None) -> None:
    config = StoreConfig(upload_schedule=(("20:00", None), ("08:00", 5e6)))
    assert cap_at(config, datetime.fromisoformat(f"2026-03-01T{time}:30+02:00")) == cap


def test_cap_is_the_same_all_day_when_not_scheduled() -> None:
    noon = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
    assert cap_at(StoreConfig(), noon) is None
    assert cap_at(StoreConfig(upload_bytes_per_s=3.0), noon) == 3.0


def test_packs_are_small_when_the_cap_is() -> None:
    config = StoreConfig(pack_bytes=64 << 20)
    assert pack_bytes(config, None) == 64 << 20
    assert pack_bytes(config, 10e6) == 20_000_000
    assert pack_bytes(config, 10.0) == 1 << 20
    assert pack_bytes(config, 1e12) == 64 << 20


@pytest.mark.parametrize(
    "values",
    [
        {"upload_schedule": (("8:00", 1.0),)},
        {"upload_schedule": (("24:00", 1.0),)},
        {"upload_schedule": (("08:00", 0.0),)},
        {"upload_schedule": (("08:00", 1.0), ("08:00", 2.0))},
        {"upload_schedule": (("08:00", 1.0),), "upload_bytes_per_s": 2.0},
        {"upload_bytes_per_s": 0.0},
        {"upload_backlog": 0},
    ],
    ids=str,
)
def test_configuration_is_refused_when_it_makes_no_sense(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="upload_"):
        StoreConfig(**values)
