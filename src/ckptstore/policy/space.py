"""Whether the next checkpoints will fit on the disk."""

from __future__ import annotations

from dataclasses import dataclass

#: Warn when fewer checkpoints than this still fit.
FEW = 3


@dataclass(frozen=True)
class Forecast:
    """How many more checkpoints fit, and when that ends.

    Attributes:
        room: checkpoints that fit into what is free.
        full_at_step: the step at which the disk will be full; None if retention keeps up with it.
    """

    room: int
    full_at_step: int | None

    @property
    def is_short(self) -> bool:
        """Whether somebody should look: it will be full soon, or the next save does not fit."""
        return self.room < 1 or (self.full_at_step is not None and self.room <= FEW)

    def __str__(self) -> str:
        plural = "" if self.room == 1 else "s"
        text = f"room for {self.room} more checkpoint{plural}"
        return (
            text
            if self.full_at_step is None
            else f"{text}; disk full at about step {self.full_at_step:,}".replace(",", " ")
        )


def forecast(
    free_bytes: int, save_bytes: int, *, step: int, steps_per_save: int, kept: int, limit: int | None
) -> Forecast:
    """What fits, from what is free now and what one checkpoint takes.

    Args:
        save_bytes: size of one checkpoint; 0 if unknown.
        step: of the last save.
        steps_per_save: steps between saves.
        kept: checkpoints on the disk now.
        limit: most that retention keeps; None: it grows with the run.
    """
    if save_bytes <= 0:
        return Forecast(room=1 << 30, full_at_step=None)
    room = free_bytes // save_bytes
    # Retention deletes only after the new one is there, so one more than the limit has to fit.
    still_needed = None if limit is None else max(0, limit - kept) + 1
    if still_needed is not None and room >= still_needed:
        return Forecast(room, None)
    return Forecast(room, step + (room + 1) * max(1, steps_per_save))
