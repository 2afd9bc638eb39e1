"""Log lines for programs: one JSON object a line, from the node agent and ``ckptctl``, where that is asked for.

``CKPTSTORE_LOG_FORMAT=json``; ``text`` is the default. A trainer's logging is its own: give
:class:`JsonFormatter` to a handler there to have the same lines.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ckptstore.clock import rfc3339
from ckptstore.errors import CkptError, ConfigError

ENVIRONMENT = "CKPTSTORE_LOG_FORMAT"
#: What a record may say of itself with ``extra=``, in this order.
FIELDS = ("run", "step", "save_id", "tier", "remote", "event", "bytes", "seconds")


def wants_json(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for JSON.

    Raises:
        ConfigError: for something else than text or json.
    """
    wanted = environ.get(ENVIRONMENT, "") or "text"
    if wanted not in ("text", "json"):
        raise ConfigError(f"{ENVIRONMENT}={wanted!r} is no format", hint='"json" or "text"')
    return wanted == "json"


def log_json(*names: str, level: int = logging.INFO) -> None:
    """Send what these loggers say to stderr, in JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "pid", "thread", "message", ...}``, with what the record says in ``extra``.

    An exception becomes ``error`` (its class), ``error_message``, ``hint``, ``code`` and ``traceback``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever is in the message."""
        line: dict[str, Any] = {
            "time": rfc3339(datetime.fromtimestamp(record.created, timezone.utc)),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if getattr(record, name, None) is not None}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line |= {"error": type(error).__name__, "error_message": str(error)}
            if isinstance(error, CkptError):
                line |= {"code": error.exit_code, "hint": error.hint}
            if record.exc_info[2] is not None:
                line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
