"""Whether the next checkpoints fit."""

from __future__ import annotations

from ckptstore.policy import forecast

GB = 1 << 30


def test_nothing_is_said_when_retention_keeps_up() -> None:
    ahead = forecast(2 * GB, GB, step=100, steps_per_save=10, kept=6, limit=6)
    assert not ahead.is_short
    assert ahead.full_at_step is None


def test_the_step_is_named_when_the_disk_will_be_full() -> None:
    ahead = forecast(3 * GB, GB, step=10400, steps_per_save=500, kept=0, limit=None)
    assert ahead.is_short
    assert str(ahead) == "room for 3 more checkpoints; disk full at about step 12 400"


def test_it_is_short_when_the_next_one_does_not_fit() -> None:
    assert forecast(GB // 2, GB, step=1, steps_per_save=1, kept=6, limit=6).is_short


def test_nothing_is_known_before_the_first_save() -> None:
    assert not forecast(0, 0, step=1, steps_per_save=1, kept=0, limit=None).is_short
