"""How a job ends: by a signal, by an exception, or because it is done. Every wait has a limit."""

from __future__ import annotations

import logging
import signal as signals
import textwrap
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

from ckptstore.errors import CkptError, Preempted, SaveFailedError, SaveTimeoutError
from ckptstore.manager.emergency import all_are_here
from ckptstore.manager.parts import Parts
from ckptstore.manager.safety import command
from ckptstore.manager.saving import Occasion, Saver
from ckptstore.manager.signals import SignalWatch
from ckptstore.store import SaveHandle

#: Kept of the grace for printing, unwinding and exiting.
EXIT_RESERVE_S = 0.5
#: Longest slice of a wait between two looks at the signals.
SLICE_S = 0.25
#: After an exception, uploads that are under way get this long; the node agent goes on with the rest.
AFTER_EXCEPTION_S = 5.0
TAG_EXCEPTION = "exception"


def stop(
    parts: Parts, saver: Saver, signal: int, metrics: Mapping[str, Any] | None, remaining_s: float, *, can_save: bool
) -> NoReturn:
    """Save, wait for the disk, then for as much upload as fits, say what is safe where, and end. Collective."""
    until = time.monotonic() + remaining_s - EXIT_RESERVE_S
    name = signals.Signals(signal).name
    progress = parts.progress
    step = progress.step or 0
    try:
        if can_save and not progress.is_saved(step):
            saver.save(Occasion(step, progress.epoch, metrics, is_emergency=True, reason=f"{name} arrived"))
    except CkptError as error:
        parts.voice.say(f"the emergency save failed: {error}", logging.ERROR)
    _wait(parts, progress.handle, until)
    parts.scalars.flush()
    text = f"{name} at step {step}: {parts.safety.sentence()}; {command()}"
    parts.voice.say(text, logging.WARNING)
    if signal == signals.SIGINT:
        raise KeyboardInterrupt
    raise Preempted(128 + signal, text)


def rescue(parts: Parts, saver: Saver, error: BaseException, grace_s: float) -> None:
    """Save before an exception ends the job, if the state is whole and all ranks are here. Never raises.

    Whatever is said of what is safe, the save before has first had its time to reach the disk.
    """
    progress, say = parts.progress, parts.voice.say
    if progress.step is None or not parts.tracked or isinstance(error, SaveFailedError):
        return
    what = type(error).__name__
    first = textwrap.shorten(str(error), 160, placeholder=" ...")
    text = f"{what} ({first})" if first else what  # a signal that follows takes its traceback away
    done = parts.guard.completed()
    # With a new save to come: less, so that ranks come to the meeting within its limit of each other.
    first_s = grace_s if done is None else grace_s / 4
    _wait(parts, progress.handle, time.monotonic() + first_s, is_remote=False)
    if done is None:
        say(f"{text} in the middle of an optimizer step: not saved; {parts.safety.sentence()}", logging.ERROR)
        return
    step = parts.guard.reached(progress.step, progress.previous_step, done)
    try:
        if not progress.is_saved(step):
            agreement = parts.store.agreement
            if not all_are_here(agreement, step, min(parts.store.config.deadline_s, grace_s / 2)):
                others = "others did not stop at the same step, or are gone"
                say(f"{text} on this rank, {others}: not saved; {parts.safety.sentence()}", logging.ERROR)
                return
            occasion = Occasion(step, progress.epoch, tags=(TAG_EXCEPTION,), is_emergency=True, reason=what)
            saver.save(occasion)
            _wait(parts, progress.handle, time.monotonic() + grace_s, is_remote=False)
        say(f"{what} after step {step}: {parts.safety.sentence()}; {command()}", logging.ERROR)
    except Exception as failure:  # whatever goes wrong here must not hide the first exception
        say(f"the emergency save failed: {failure}; {parts.safety.sentence()}", logging.ERROR)


def leave(parts: Parts, error: BaseException | None, *, watch: SignalWatch | None, is_now: bool) -> None:
    """Close, as fast as the reason to leave demands; only a clean end raises what closing finds.

    Raises:
        Preempted: a signal arrived that nobody has acted on.
    """
    pending = watch.pending if watch is not None else None
    if error is None:
        progress = parts.progress
        since = (progress.step or 0) - (progress.last_step or 0)
        if since > 0:
            parts.voice.say(
                f"the last {f'{since} steps are' if since > 1 else 'step is'} in no checkpoint; "
                "manager.save_checkpoint() at the end of the loop keeps them"
            )
        close(parts, 600.0, watch=watch)
        return
    if is_now:
        limit = 0.0
    elif isinstance(error, (Preempted, KeyboardInterrupt)) or pending is not None:
        limit = max(0.0, (watch.remaining_s() if watch is not None else 0.0) - EXIT_RESERVE_S)
    else:
        limit = AFTER_EXCEPTION_S
    if isinstance(error, Preempted):
        limit = 0.0  # it has waited already
    try:
        close(parts, limit, watch=None)
    except CkptError as failure:
        parts.voice.say(str(failure), logging.WARNING)
    if pending is not None and pending != signals.SIGINT and isinstance(error, Exception):
        # The signal took a loader's workers down before the loop came to its next step.
        raise Preempted(128 + pending, f"{signals.Signals(pending).name}: {parts.safety.sentence()}") from error


def close(parts: Parts, timeout_s: float, *, watch: SignalWatch | None) -> None:
    """Wait for the highest level, at most ``timeout_s``, and less if a signal comes; then let go.

    Raises:
        SaveFailedError: the last save failed; earlier failures were said when they happened.
        SaveTimeoutError: uploads are not finished.
        Preempted, KeyboardInterrupt: a signal arrived meanwhile.
    """
    store = parts.store
    until = time.monotonic() + timeout_s
    is_told = False
    stopped_by: int | None = None
    while stopped_by is None:
        try:
            store.wait(timeout_s=min(SLICE_S, max(0.0, until - time.monotonic())))
            break
        except SaveTimeoutError:
            if time.monotonic() >= until:
                break
        except SaveFailedError:
            continue  # each is raised once; the last one counts below
        if not is_told and timeout_s > SLICE_S and time.monotonic() > until - timeout_s + 5.0:
            is_told = True
            left = "; Ctrl-C leaves the rest to the node agent" if store.remotes else ""
            parts.voice.say(
                f"waiting for saves to be finished, {timeout_s:.0f} s at most ({parts.safety.sentence()}){left}"
            )
        stopped_by = watch.pending if watch is not None else None
    parts.scalars.flush()
    if stopped_by is not None:
        with suppress(CkptError):
            _let_go(parts, 0.0)
        text = f"{signals.Signals(stopped_by).name} after the last step: {parts.safety.sentence()}"
        parts.voice.say(text, logging.WARNING)
        if stopped_by == signals.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(128 + stopped_by, text)
    _let_go(parts, 0.0 if time.monotonic() >= until else 1.0)
    progress = parts.progress
    if (missed := progress.failure) is not None:
        raise SaveFailedError(f"the last save failed: {missed.message}", hint=missed.hint) from missed
    handle = progress.handle
    if handle is not None and (failure := handle.failure()) is not None:
        if handle.level in (None, "staged"):
            raise failure
        parts.voice.say(f"{failure.message}; it is on the local disk: `{store.push_command}`", logging.WARNING)


def _let_go(parts: Parts, timeout_s: float) -> None:
    if parts.owns_store:
        with suppress(SaveFailedError):  # said when it happened; the last save counts
            parts.store.close(timeout_s)


def _wait(parts: Parts, handle: SaveHandle | None, until: float, *, is_remote: bool = True) -> None:
    """Disk first, then the remotes, as far as the time goes."""
    if handle is None:
        return
    levels = ["local"] + (["remote"] if is_remote and handle.remotes else [])
    for level in levels:
        try:
            handle.wait(level, max(0.0, until - time.monotonic()))
        except CkptError as error:
            parts.voice.say(str(error), logging.WARNING)
            return
