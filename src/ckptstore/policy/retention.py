"""What to keep: rules that give reasons for keeping. What no rule speaks for may go.

The rules look at one tier at a time, at what is complete there, in the order of the run; never at file times or names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from ckptstore.errors import ConfigError
from ckptstore.types import CheckpointInfo

#: Tag of a save whose state had values that are not finite: never resumed from by itself, never among the last N.
SUSPECT = "suspect"
#: Tag of a save its caller declared the best.
BEST = "best"


@dataclass(frozen=True)
class Decision:
    """What a retention keeps and what may go.

    Attributes:
        keep: save_id -> the reasons to keep it.
        drop: what nothing speaks for, oldest first.
        note: something the user should know once, or None.
    """

    keep: Mapping[str, tuple[str, ...]]
    drop: tuple[CheckpointInfo, ...]
    note: str | None = None


@dataclass(frozen=True)
class Retention:
    """The last N, the best K, one every M steps, recent ones, tags, pins, the newest verified, and never nothing.

    Args:
        keep_last: the newest N of the current line.
        keep_best: the K best by ``monitor``; NaN is never best, ties go to the newest.
        keep_every_steps: the first save at or after each multiple of M steps.
        monitor: name of the metric; None: the one metric whose name ends in "loss", else saves tagged "best".
        mode: "min" or "max".
        keep_newer_seconds: whatever was saved at most so long before the newest; a run that rests loses nothing by it.
        keep_tags: whatever bears one of these tags.

    Raises:
        ConfigError: a negative number, an unknown mode, or all rules off.
    """

    keep_last: int = 5
    keep_best: int = 1
    keep_every_steps: int = 0
    monitor: str | None = None
    mode: str = "min"
    keep_newer_seconds: float = 0
    keep_tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        tags: object = self.keep_tags
        if not isinstance(tags, (tuple, list)) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigError(f"keep_tags is {tags!r}", hint='keep_tags=("release",)')
        object.__setattr__(self, "keep_tags", tuple(tags))  # JSON knows lists only
        if not 0 <= self.keep_newer_seconds < math.inf:
            raise ConfigError(f"keep_newer_seconds is {self.keep_newer_seconds!r}", hint="seconds >= 0; 0: off")
        for name in ("keep_last", "keep_best", "keep_every_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} is {value!r}", hint="a whole number >= 0; 0 turns the rule off")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode is {self.mode!r}", hint='use "min" or "max"')
        if not (self.keep_last or self.keep_best or self.keep_every_steps or self.keep_newer_seconds):
            raise ConfigError(
                "keep_last, keep_best, keep_every_steps and keep_newer_seconds are all 0: nothing would be kept",
                hint="set at least one of them, e.g. keep_last=5",
            )

    def decide(
        self, infos: Sequence[CheckpointInfo], tier: str, *, verified: Collection[str] = (), busy: Collection[str] = ()
    ) -> Decision:
        """What of ``tier`` to keep, with reasons, and what may go.

        Args:
            infos: every save of the run, superseded ones included, oldest first.
            tier: only what is "complete" there counts, and only that can be dropped.
            verified: save_ids whose every byte was read and found good.
            busy: save_ids somebody still needs, such as a reader or an upload.
        """
        here = [info for info in infos if info.tiers.get(tier) == "complete"]
        line = [info for info in here if not info.superseded]
        sound = [info for info in line if SUSPECT not in info.tags]
        reasons = _Reasons()
        reasons.add(sound[max(0, len(sound) - self.keep_last) :], f"one of the last {self.keep_last}")
        best, note = self._best(sound)
        reasons.add(best, f"one of the best {self.keep_best}")
        reasons.add(_milestones(sound, self.keep_every_steps), f"one every {self.keep_every_steps} steps")
        reasons.add(self._recent(sound), "recent")
        for tag in self.keep_tags:
            reasons.add((info for info in here if tag in info.tags), f"tagged {tag}")
        reasons.add((info for info in here if info.pinned), "pinned")
        reasons.add([info for info in sound if info.save_id in verified][-1:], "the newest verified")
        reasons.add((info for info in here if info.save_id in busy), "still needed")
        reasons.add(self._superseded(here, line), "the newer timeline is still short")
        newest = max((info.step for info in sound), default=-1)
        reasons.add([info for info in line if SUSPECT in info.tags and info.step > newest][-1:], "the newest, suspect")
        if not any(info.save_id in reasons.found for info in sound):
            reasons.add(sound[-1:], "the only valid one")
        if not reasons.found:
            reasons.add((line or here)[-1:], "the only one")
        drop = tuple(info for info in here if info.save_id not in reasons.found)
        return Decision({key: tuple(value) for key, value in reasons.found.items()}, drop, note)

    def awaited(self, infos: Sequence[CheckpointInfo], remote: str, known: Collection[str]) -> set[str]:
        """Of the saves in the local tier, those that ``remote`` lacks and these rules would keep there.

        Args:
            known: save_ids that are there already.
        """
        there = [
            replace(info, tiers={remote: "complete"})
            for info in infos
            if info.save_id in known or info.tiers.get("local") == "complete"
        ]
        return set(self.decide(there, remote).keep).difference(known)

    @property
    def limit(self) -> int | None:
        """How many saves of one line are kept at most; None when that grows with the run."""
        grows = self.keep_every_steps or self.keep_newer_seconds or self.keep_tags
        return None if grows else max(1, self.keep_last + self.keep_best)

    @property
    def words(self) -> str:
        """The rules as people say them."""
        parts = []
        if self.keep_last:
            parts.append(f"the last {self.keep_last}")
        if self.keep_best:
            by = f" by {self.monitor} ({'lowest' if self.mode == 'min' else 'highest'})" if self.monitor else ""
            parts.append(f"the best {self.keep_best}{by}")
        if self.keep_every_steps:
            parts.append(f"one every {self.keep_every_steps} steps")
        if self.keep_newer_seconds:
            parts.append(f"those of the last {self.keep_newer_seconds / 3600:.4g} h before the newest")
        parts += [f"those tagged {tag}" for tag in self.keep_tags]
        return ", ".join([*parts, "pinned ones"])

    @classmethod
    def noted(cls, values: object) -> Retention | None:
        """The rules as somebody noted them with ``asdict``; None if they are of another version."""
        if not isinstance(values, Mapping) or set(values) - {each.name for each in fields(cls)}:
            return None
        try:
            return cls(**values)
        except (ConfigError, TypeError):
            return None

    def _recent(self, line: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """By the clock of who saved, relative to the newest save, so that nobody's clock of today matters."""
        if not self.keep_newer_seconds or not line:
            return []
        newest = max(info.created_at for info in line)
        return [info for info in line if (newest - info.created_at).total_seconds() <= self.keep_newer_seconds]

    def _best(self, line: Sequence[CheckpointInfo]) -> tuple[list[CheckpointInfo], str | None]:
        if not self.keep_best:
            return [], None
        tagged = [info for info in line if BEST in info.tags]
        monitor, note = self.monitor, None
        if monitor is None:
            monitor, note = only_loss(line)
            if monitor is None:
                return tagged[-self.keep_best :], None if tagged else note
        sign = 1.0 if self.mode == "min" else -1.0
        rated = [
            (sign * info.metrics[monitor], -place, info)
            for place, info in enumerate(line)
            if monitor in info.metrics and not math.isnan(info.metrics[monitor])
        ]
        rated.sort(key=lambda item: item[:2])
        return [info for _, _, info in rated[: self.keep_best]] or tagged[-self.keep_best :], note

    def _superseded(self, here: Sequence[CheckpointInfo], line: Sequence[CheckpointInfo]) -> Iterable[CheckpointInfo]:
        """Saves of older lines stay until the newest line has N of its own."""
        newest = max((info.timeline for info in line), default=0)
        own = sum(info.timeline == newest and SUSPECT not in info.tags for info in line)
        if own >= max(1, self.keep_last):
            return []
        return [info for info in here if info.superseded]


def losses(metrics: Iterable[Iterable[str]]) -> list[str]:
    """The metrics that may tell which checkpoint is best when nobody says so: those whose name ends in "loss"."""
    return sorted({name for names in metrics for name in names if name.endswith("loss")})


def only_loss(infos: Iterable[CheckpointInfo]) -> tuple[str | None, str | None]:
    """The one metric whose name ends in "loss"; else None and a sentence that says why nothing is best."""
    names = losses(info.metrics for info in infos)
    if len(names) == 1:
        return names[0], None
    if not names:
        return None, 'no checkpoint counts as best: no metric ends in "loss"; pass monitor="..."'
    return None, f'no checkpoint counts as best: {", ".join(names)} all end in "loss"; pass monitor=, one of them'


def _milestones(line: Sequence[CheckpointInfo], every: int) -> list[CheckpointInfo]:
    first: dict[int, CheckpointInfo] = {}
    if every:
        for info in line:
            if info.step >= every:
                first.setdefault(info.step // every, info)
    return list(first.values())


@dataclass
class _Reasons:
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, infos: Iterable[CheckpointInfo], reason: str) -> None:
        for info in infos:
            self.found.setdefault(info.save_id, []).append(reason)
