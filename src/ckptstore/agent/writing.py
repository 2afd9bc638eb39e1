"""Writing the saves of one run: in turn, a thread for each, and what each came to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from ckptstore.agent.disk import Abandoned
from ckptstore.agent.job import SaveJob
from ckptstore.agent.runtime import RuntimeDir
from ckptstore.agent.writer import Image, Written, write_part
from ckptstore.clock import Clock
from ckptstore.errors import CkptError, SaveFailedError, StorageError
from ckptstore.repo.local import LocalTier

log = logging.getLogger("ckptstore.agent")


class Ended(Protocol):
    """Hears in the thread of a save that it is written, or why it failed and short of which level."""

    def __call__(self, job: SaveJob, outcome: Written | CkptError, *, level: str) -> None: ...


class Writing:
    """The threads that bring a run's saves to the disk, one after another; runs share the disk block by block.

    Side by side, the older save would be durable, and its memory free, only when the newer one nearly is.

    Args:
        condition: the agent's; told whenever a save is abandoned.
        tier, directory: the agent's.
        run: the run.
        chunk_elements: of the newest attachment.
        ended: hears of each.
    """

    def __init__(
        self,
        condition: threading.Condition,
        tier: LocalTier,
        directory: RuntimeDir,
        run: str,
        clock: Clock,
        *,
        chunk_elements: Callable[[], int],
        ended: Ended,
    ) -> None:
        self._condition, self._tier, self._directory, self._run, self._clock = condition, tier, directory, run, clock
        self._chunk_elements, self._ended = chunk_elements, ended
        self._turns: list[SaveJob] = []

    def begin(self, job: SaveJob) -> None:
        """Write a save of which every local rank has sealed its part.

        Raises:
            SaveFailedError: there is no thread to be had.
        """
        with self._condition:
            self._turns.append(job)
        try:
            threading.Thread(target=self._write, args=(job,), name=f"write-{job.save_id}", daemon=True).start()
        except RuntimeError as error:  # a limit of processes is reached; nobody else would ever end this save
            self._leave(job)
            raise SaveFailedError(f"the node agent can't write it: {error}") from None

    def _write(self, job: SaveJob) -> None:
        """The thread of one save."""
        level = "local"
        outcome: Written | CkptError
        queued = self._wait_for_turn(job)
        try:
            outcome = self._written(job)
            outcome.timing.update(queued)
        except Abandoned:
            outcome, level = SaveFailedError(job.abandoned or "discarded"), "staged"
        except CkptError as error:
            outcome = error
        except Exception as error:
            log.exception("writing save %s of %s", job.save_id, self._run)
            outcome = StorageError(f"unexpected {type(error).__name__} while writing: {error}")
        finally:
            self._leave(job)
        self._ended(job, outcome, level=level)

    def _written(self, job: SaveJob) -> Written:
        parts = [job.parts[rank] for rank in job.local_ranks]
        images = [Image(p.request, p.layout, p.pieces, memoryview(p.generation.memory)) for p in parts]
        try:
            with self._directory.staging_noted(self._run, job.save_id):
                return write_part(
                    self._tier,
                    self._run,
                    images,
                    chunk_elements=self._chunk_elements(),
                    is_abandoned=lambda: job.abandoned is not None,
                )
        finally:
            for image in images:
                image.memory.release()

    def _wait_for_turn(self, job: SaveJob) -> dict[str, float]:
        """The seconds that it took, if it took any."""
        began = self._clock.monotonic()
        with self._condition:
            if self._is_next(job):
                return {}
            self._condition.wait_for(lambda: self._is_next(job))
        return {"queued": self._clock.monotonic() - began}

    def _is_next(self, job: SaveJob) -> bool:
        return job.abandoned is not None or job is self._turns[0]

    def _leave(self, job: SaveJob) -> None:
        with self._condition:
            self._turns.remove(job)
            self._condition.notify_all()
