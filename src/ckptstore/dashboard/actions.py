"""What visitors may do where ``--allow-actions`` was given: pin, unpin, verify. Nothing that removes anything.

Behind the guard's token and Origin, a form must also bring a value that only our own pages hold. A verification reads
every byte of all copies, so one runs at a time, in the background, and its result goes into the journal.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections import deque
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ckptstore.dashboard.detail import find
from ckptstore.dashboard.guard import is_bearer
from ckptstore.dashboard.source import Source
from ckptstore.errors import CkptError
from ckptstore.ops.history import note_verified
from ckptstore.ops.lifecycle import pin, unpin
from ckptstore.ops.verify import verify

log = logging.getLogger("ckptstore.dashboard")

MAX_FORM_BYTES = 4096
#: Verifications that may wait.
MAX_WAITING = 20


@dataclass
class Verifying:
    """A verification that was asked for here: "waiting", "running", or "ended" with how it went."""

    state: str = "waiting"
    bytes_read: int = 0
    outcome: str | None = None


class Actions:
    """Carries out what pages ask for.

    Args:
        source: the store.
        token: of the dashboard.
    """

    def __init__(self, source: Source, token: str) -> None:
        self._source = source
        self.form_token = hmac.new(token.encode(), b"ckptstore dashboard form", hashlib.sha256).hexdigest()
        self._token = token
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, str]] = deque()
        self._verifying: dict[tuple[str, str], Verifying] = {}
        self._worker: threading.Thread | None = None

    def verifying(self, run: str, save_id: str) -> Verifying | None:
        """How far a verification of this checkpoint is, if one was asked for."""
        return self._verifying.get((run, save_id))

    async def act(self, request: Request) -> Response:
        """``POST run/RUN/checkpoint/SAVE_ID/pin``, ``unpin`` or ``verify``; leads back to the checkpoint's page."""
        form = parse_qs((await _body(request)).decode("latin-1"))
        given = form.get("form_token", [""])[0]
        is_script = is_bearer(request.headers.get("authorization", ""), self._token)
        if not is_script and not hmac.compare_digest(given.encode(), self.form_token.encode()):
            raise HTTPException(403)
        run, save_id, action = (request.path_params[name] for name in ("run", "save_id", "action"))
        if action not in ("pin", "unpin", "verify"):
            raise HTTPException(404)
        await run_in_threadpool(self._carry_out, action, run, save_id)
        return Response(status_code=303, headers={"location": "./", "cache-control": "no-store"})

    def _carry_out(self, action: str, run: str, save_id: str) -> None:
        record = find(self._source.view(run), save_id)
        log.info("%s of step %d (save %s) of %s was asked for", action, record.step, save_id, run)
        if action == "verify":
            self._enqueue(run, save_id)
            return
        (pin if action == "pin" else unpin)(self._source.tiers(run), [save_id])
        self._source.look_again(run)

    def _enqueue(self, run: str, save_id: str) -> None:
        with self._lock:
            known = self._verifying.get((run, save_id))
            if known is not None and known.state != "ended":
                return
            if len(self._waiting) >= MAX_WAITING:
                raise HTTPException(429)
            self._verifying[run, save_id] = Verifying()
            self._waiting.append((run, save_id))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="dashboard-verify", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._worker = None
                    return
                run, save_id = self._waiting.popleft()
                state = self._verifying[run, save_id]
                state.state = "running"
            try:
                state.outcome = self._verify(run, save_id, state)
            except CkptError as error:
                state.outcome = error.message
            except Exception as error:
                log.exception("verifying save %s of %s", save_id, run)
                state.outcome = f"unexpected {type(error).__name__}"
            state.state = "ended"

    def _verify(self, run: str, save_id: str, state: Verifying) -> str:
        def progress(bytes_read: int) -> None:
            state.bytes_read = bytes_read

        tiers = self._source.tiers(run)
        found = verify(tiers, save_id, everything=False, read_data=True, progress=progress)
        note_verified(tiers.local, run, found, "bytes")
        if not found.findings:
            return "every byte is right"
        first = found.findings[0]
        return f"{len(found.findings)} findings; {first.tier}: {first.what}"


async def _body(request: Request) -> bytes:
    """The form as it came, by its own length: a chunked one names none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413)
    return body
