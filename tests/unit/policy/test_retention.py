"""What is kept, and why."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.errors import ConfigError
from ckptstore.policy import Retention
from ckptstore.types import CheckpointInfo

BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def info(step: int, loss: float | None = None, **fields: object) -> CheckpointInfo:
    return CheckpointInfo(
        run="r",
        step=step,
        save_id=fields.pop("save_id", f"{step:012x}-1"),  # type: ignore[arg-type]
        # Wall time runs backwards: nothing may depend on it.
        created_at=fields.pop("created_at", BEGIN - timedelta(seconds=step)),  # type: ignore[arg-type]
        metrics={} if loss is None else {"val_loss": loss},
        tiers=fields.pop("tiers", {"local": "complete"}),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def kept(policy: Retention, infos: list[CheckpointInfo], **more: object) -> list[int]:
    decision = policy.decide(infos, "local", **more)  # type: ignore[arg-type]
    return [i.step for i in infos if i.save_id in decision.keep]


def test_last_and_best_and_milestones_are_united() -> None:
    losses = {100: 0.9, 200: 0.1, 300: 0.5, 400: 0.6, 500: 0.7, 600: 0.8}
    infos = [info(step, loss) for step, loss in losses.items()]
    assert kept(Retention(keep_last=2, keep_best=1), infos) == [200, 500, 600]
    assert kept(Retention(keep_last=1, keep_best=0, keep_every_steps=300), infos) == [300, 600]
    assert kept(Retention(keep_last=0, keep_best=2), infos) == [200, 300]
    assert kept(Retention(keep_last=1, keep_best=1, mode="max"), infos) == [100, 600]


def test_order_is_numeric_when_text_would_differ() -> None:
    assert kept(Retention(keep_last=2, keep_best=0), [info(s) for s in (8, 9, 10, 100)]) == [10, 100]


def test_milestones_hold_when_saves_are_not_on_multiples() -> None:
    infos = [info(s) for s in (450, 950, 1030, 1500, 1990, 2010, 2500)]
    assert kept(Retention(keep_last=1, keep_best=0, keep_every_steps=1000), infos) == [1030, 2010, 2500]


def test_nan_is_never_best_and_ties_go_to_the_newest() -> None:
    infos = [info(1, 0.5), info(2, math.nan), info(3, 0.5), info(4, math.inf), info(5)]
    assert kept(Retention(keep_last=0, keep_best=1), infos) == [3]
    assert kept(Retention(keep_last=0, keep_best=3), infos) == [1, 3, 4]
    assert kept(Retention(keep_last=1, keep_best=1), [info(1, math.nan), info(2, math.nan)]) == [2]


def test_nothing_is_best_and_a_note_says_so_when_several_losses_compete() -> None:
    both = CheckpointInfo(
        "r", 1, "a" * 12 + "-1", BEGIN, metrics={"loss": 1.0, "val_loss": 1.0}, tiers={"local": "complete"}
    )
    decision = Retention(keep_last=1, keep_best=1).decide([both, info(2, 0.1)], "local")
    assert decision.note is not None
    assert "loss, val_loss" in decision.note
    assert [i.step for i in decision.drop] == [1]


def test_saves_tagged_best_count_when_no_metric_tells() -> None:
    infos = [info(1), info(2, tags=("best",)), info(3), info(4)]
    assert kept(Retention(keep_last=1, keep_best=1), infos) == [2, 4]


def test_pins_and_the_newest_verified_stay() -> None:
    infos = [info(1, pinned=True), info(2), info(3), info(4)]
    assert kept(Retention(keep_last=1, keep_best=0), infos, verified={infos[1].save_id, infos[2].save_id}) == [1, 3, 4]


def test_recent_saves_stay_counted_from_the_newest_and_tagged_ones_for_good() -> None:
    infos = [info(s, created_at=BEGIN + timedelta(hours=s), tags=("release",) * (s == 1)) for s in (1, 2, 5, 6, 7)]
    recent = Retention(keep_last=0, keep_best=0, keep_newer_seconds=2 * 3600)
    assert kept(recent, infos) == [5, 6, 7]
    assert kept(Retention(keep_last=1, keep_best=0, keep_tags=["release"]), infos) == [1, 7]
    assert recent.decide(infos, "local").keep[infos[2].save_id] == ("recent",)
    assert recent.limit is None
    assert "last 2 h before the newest" in recent.words


def test_rules_come_back_from_json_and_those_of_another_version_are_none() -> None:
    rules = Retention(keep_last=2, keep_tags=("a",), monitor="loss", mode="max")
    assert Retention.noted(json.loads(json.dumps(asdict(rules)))) == rules
    assert Retention.noted({"keep_moons": 1}) is None
    assert Retention.noted({"keep_last": -1}) is None


def test_suspect_saves_do_not_push_out_sound_ones() -> None:
    infos = [info(1), info(2), *(info(s, tags=("suspect",)) for s in (3, 4, 5))]
    assert kept(Retention(keep_last=2, keep_best=0), infos) == [1, 2, 5]


def test_only_what_is_complete_in_the_tier_counts() -> None:
    states = ["complete", "damaged", "absent", "uploading", "complete"]
    infos = [info(s, tiers={"local": state, "s3": "complete"}) for s, state in enumerate(states, start=1)]
    decision = Retention(keep_last=1, keep_best=0).decide(infos, "local")
    assert [i.step for i in decision.drop] == [1]
    assert [i.step for i in Retention(keep_last=1, keep_best=0).decide(infos, "s3").drop] == [1, 2, 3, 4]


def test_superseded_saves_stay_until_the_new_timeline_has_its_own() -> None:
    old = [info(s, superseded=True, save_id=f"{s:012x}-9") for s in (300, 400)]
    base = [info(100), info(200)]
    new = [info(s, timeline=2) for s in (210, 220, 230)]
    policy = Retention(keep_last=3, keep_best=0)
    assert kept(policy, [*base, *old, *new[:2]]) == [200, 300, 400, 210, 220]
    assert kept(policy, [*base, *old, *new]) == [210, 220, 230]


def test_something_valid_stays_when_no_rule_speaks_for_it() -> None:
    assert kept(Retention(keep_last=0, keep_best=1), [info(1), info(2)]) == [2]
    assert kept(Retention(keep_last=0, keep_best=0, keep_every_steps=100), [info(1), info(2)]) == [2]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.one_of(st.none(), st.floats(allow_nan=True)),
            st.sampled_from([(), ("suspect",), ("best",)]),
            st.booleans(),
        ),
        unique_by=lambda t: t[0],
        max_size=25,
    ),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from([0, 50]),
)
def test_retention_is_safe_whatever_the_run_looks_like(
    saves: list[tuple[int, float | None, tuple[str, ...], bool]], last: int, best: int, every: int
) -> None:
    infos = [info(s, loss, tags=tags, pinned=pinned) for s, loss, tags, pinned in sorted(saves, key=lambda t: t[0])]
    policy = Retention(last or (0 if best or every else 1), best, every)
    decision = policy.decide(infos, "local")
    dropped = {i.save_id for i in decision.drop}
    assert dropped | decision.keep.keys() == {i.save_id for i in infos}
    assert all(decision.keep.values())
    assert not any(i.pinned for i in decision.drop)
    sound = [i for i in infos if "suspect" not in i.tags]
    assert all(i.save_id in decision.keep for i in sound[len(sound) - policy.keep_last :] if policy.keep_last)
    assert not sound or any(i.save_id in decision.keep for i in sound)
    # Deciding again over what is left drops nothing more: a restart forgets nothing.
    left = [i for i in infos if i.save_id not in dropped]
    assert not policy.decide(left, "local").drop


@pytest.mark.parametrize(
    "wrong",
    [{"keep_last": -1}, {"keep_last": 0, "keep_best": 0}, {"mode": "low"}, {"keep_best": 1.5}, {"keep_last": True}],
)
def test_retention_refuses_what_would_keep_nothing(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Retention(**wrong)  # type: ignore[arg-type]
