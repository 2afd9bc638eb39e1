"""``python -m ckptstore.agent --root DIR``: the agent process.

Started by a trainer it goes into the background at once; started by hand (without ``--ready-fd``) it stays in the
foreground and logs to stderr. As a service (``--stay``) it stays until told to leave, waits for its turn where a
trainer has started one already, and logs to the agent's log too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

TEXT_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(threadName)s %(message)s"
#: How long a thread may keep the interpreter from the others; Python's own 5 ms are longer than most seals take.
SWITCH_SECONDS = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """Be the agent of a root until there is nothing left to do. Exit code 11: another agent is there already."""
    parser = argparse.ArgumentParser(prog="python -m ckptstore.agent", description="The node agent of one local root.")
    parser.add_argument("--root", required=True, type=Path, help="root of the local tier")
    parser.add_argument(
        "--runtime", type=Path, help="folder of socket, lock and log (default: as trainers look for it)"
    )
    parser.add_argument("--idle-exit-seconds", type=float, default=60.0, help="leave after so long without work")
    parser.add_argument("--stay", action="store_true", help="be a service: wait for your turn, leave only when told to")
    parser.add_argument("--drain-seconds", type=float, default=25.0, help="time for open work after SIGTERM")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # Before any other import: no thread may exist at a fork, and the trainer waits for this one.
    if args.ready_fd is not None and os.fork():
        os._exit(0)
    os.umask(0o077)
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    import logging
    import logging.handlers
    import time

    from ckptstore.agent import service
    from ckptstore.agent.protocol import error_to_wire
    from ckptstore.agent.runtime import MAX_LOG_BYTES, RuntimeDir, try_lock
    from ckptstore.agent.server import AgentServer
    from ckptstore.errors import CkptError
    from ckptstore.logs import JsonFormatter, wants_json

    logging.Formatter.converter = time.gmtime
    formatter = JsonFormatter() if wants_json() else logging.Formatter(TEXT_FORMAT, "%Y-%m-%dT%H:%M:%S")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    log = logging.getLogger("ckptstore.agent")
    _be_nice()
    _be_small()
    _be_prompt()
    lock = None
    try:
        directory = RuntimeDir.of(args.root) if args.runtime is None else RuntimeDir(args.runtime)
        directory.create()
        for _ in range(5):
            lock = try_lock(directory.lock)
            if lock is not None:
                break
            time.sleep(0.1)  # a trainer that looks whether it is held holds it for a moment
        if lock is None and args.stay:
            log.info("another agent of %s is there: waiting until it leaves", args.root)
            service.tell("READY=1\nSTATUS=waiting until the agent that a trainer has started leaves")
            lock = try_lock(directory.lock, waits=True)
        if lock is None:
            log.info("another agent of %s is there", args.root)
            _report(args.ready_fd, {"elected": False})
            return 11
        if args.stay:  # whose stderr nobody but its service manager has
            kept = logging.handlers.RotatingFileHandler(directory.log, maxBytes=MAX_LOG_BYTES, backupCount=1)
            kept.setFormatter(formatter)
            logging.getLogger().addHandler(kept)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        server = AgentServer(
            args.root.absolute(),
            directory,
            idle_exit_seconds=None if args.stay else args.idle_exit_seconds,
            drain_seconds=args.drain_seconds,
        )
        server.start()
    except Exception as error:
        is_foreseen = isinstance(error, CkptError)
        log.error("the agent of %s could not start: %s", args.root, error, exc_info=not is_foreseen)
        _report(args.ready_fd, {"error": error_to_wire(error)})
        return 1
    _report(args.ready_fd, {"elected": True})
    service.tell("READY=1\nSTATUS=serving")
    server.run()
    logging.shutdown()
    # Threads may still hang in a request. The lock goes with the process, so whoever gets it next finds nobody writing.
    os._exit(0)


def _be_prompt() -> None:
    """A trainer that waits for an answer must not wait for whatever else is being computed here."""
    sys.setswitchinterval(SWITCH_SECONDS)


def _be_nice() -> None:
    """Training comes first: lowest CPU and disk priority, where the system knows them."""
    with suppress(OSError):
        os.nice(19)
    with suppress(ImportError, AttributeError, OSError):
        import psutil

        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


def _be_small() -> None:
    """One malloc arena: what uploads free can go back to the system, and threads share the interpreter lock anyway."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # Source: malloc.h, M_ARENA_MAX


def _report(fd: int | None, message: dict[str, object]) -> None:
    if fd is None:
        return
    with suppress(OSError):  # the trainer may be dead already; its agent is useful all the same
        os.write(fd, json.dumps(message).encode() + b"\n")
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
