"""What loads took from where waits until an agent has counted it, and is counted once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptstore.errors import TransientError
from ckptstore.store.tally import LoadTally
from ckptstore.types import LoadReport


class Agent:
    """As much of one as is spoken to."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.told: list[tuple[str, dict[str, int], int]] = []

    def restored(self, run: str, bytes_by_source: Mapping[str, int], repaired_files: int) -> bool:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        self.told.append((run, dict(bytes_by_source), repaired_files))
        return answer


def test_loads_wait_until_they_are_counted_and_are_counted_once() -> None:
    tally = LoadTally("run")
    agent: Any = Agent(False, TransientError("it left"), True)
    tally.tell(agent)
    assert agent.told == [], "there is nothing to tell"
    tally.add(LoadReport(bytes_by_source={"local": 5, "s3": 2}, repaired=("__0_0.distcp",)))
    tally.tell(None)
    tally.tell(agent)
    tally.tell(agent)
    tally.add(LoadReport(bytes_by_source={"local": 1}))
    tally.tell(agent)
    assert agent.told == [("run", {"local": 5, "s3": 2}, 1), ("run", {"local": 6, "s3": 2}, 1)]
    tally.tell(agent)
    assert agent.answers == []
    assert len(agent.told) == 2
