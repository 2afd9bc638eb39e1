"""What loads took from where, kept until the node agent has counted it in its metrics.

A job usually loads before it saves, and only saving starts an agent: so what none could count yet waits for the first
save. What is never told is lost, and nobody misses it but a dashboard.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from ckptstore.errors import CkptError
from ckptstore.types import LoadReport

if TYPE_CHECKING:
    from ckptstore.agent.client import AgentClient

log = logging.getLogger("ckptstore")


class LoadTally:
    """Bytes by source, and repaired files, of one rank's loads. Not thread-safe.

    Args:
        run: whose loads.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._bytes: Counter[str] = Counter()
        self._repaired_files = 0

    def add(self, report: LoadReport) -> None:
        """One more load."""
        self._bytes.update(report.bytes_by_source)
        self._repaired_files += len(report.repaired)

    def tell(self, agent: AgentClient | None) -> None:
        """Have an agent count what none has yet, as far as it can. Never raises."""
        if agent is None or not self._bytes:
            return
        try:
            if agent.restored(self._run, self._bytes, self._repaired_files):
                self._bytes, self._repaired_files = Counter(), 0
        except CkptError as error:
            log.debug("the node agent did not count a load: %s", error)
