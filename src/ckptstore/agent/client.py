"""A trainer's line to its node agent.

Every call may be made from any thread, and none of them waits for ever. When the connection is lost pending calls raise
TransientError, ``on_event`` is told once, and the client stays dead: connect a new one. In a forked child a client is
dead from the start and owns nothing.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptstore.agent.arena import Arena
from ckptstore.agent.conversation import Answer, Conversation, EventCallback, greet
from ckptstore.agent.protocol import (
    Channel,
    Event,
    SealRequest,
    close_fds,
    error_to_wire,
    is_same_tree,
    layout_id_of,
    pieces_to_wire,
)
from ckptstore.agent.runtime import RuntimeDir, dial, start_agent
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, LockedError, SaveTimeoutError, TransientError
from ckptstore.format.manifest import Json
from ckptstore.format.stock import PieceSpec

#: For answers that need no other rank; the disk may be slow.
ANSWER_TIMEOUT_S = 30.0
DISK_TIMEOUT_S = 120.0
#: For what nobody's work depends on.
TELL_TIMEOUT_S = 2.0
BYE_TIMEOUT_S = 5.0
#: Added to waits that the agent bounds itself.
SLACK_S = 15.0


class AgentClient:
    """One rank's connection. Make it with :meth:`connect` or :meth:`observe`.

    Attributes:
        agent_id: differs whenever the agent is another process.
        agent_pid: of the agent.
    """

    def __init__(self, channel: Channel, on_event: EventCallback, hello: Json) -> None:
        self.agent_id: str = hello["agent_id"]
        self.agent_pid: int = hello["pid"]
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._tree: Json | None = None  # of the last seal: with many tensors, sending it again costs most of a seal
        self._config = StoreConfig()
        self._is_filling = False
        self._bringing = threading.Lock()
        self._on_event = on_event
        self._conversation = Conversation(channel, self._heard)

    # ------------------------------------------------------------------ connecting

    @classmethod
    def connect(
        cls,
        root: Path,
        *,
        run: str,
        slot: int,
        remotes: Mapping[str, str],
        environ: Mapping[str, str],
        config: StoreConfig,
        on_event: EventCallback,
        rank: int | None = None,
        begun: float = 0.0,
    ) -> AgentClient:
        """Attach as one rank, starting the agent of ``root`` if there is none. Local; blocks a fraction of a second.

        Args:
            root: of the local tier.
            run: the run.
            slot: this rank's place on the node, 0, 1, ...; the newest to attach owns it.
            remotes: name -> URL of every remote of the run.
            environ: credentials and settings for them; kept in the agent's memory only, newest wins.
            config: ``agent_start_timeout_s`` bounds this call.
            on_event: called in a thread of the client's, one event at a time; may call the client.
            rank: the global rank, if known already.
            begun: when the job began, in seconds since 1970, if known: of two jobs in one run the newer one stays.

        Raises:
            TransientError: no agent within the time.
            ConfigError: an agent of another version is busy, or the runtime directory can't be used.
            StorageError: the agent could not start, or can't use the root.
            LockedError: a newer job has taken over the run.
        """
        deadline = time.monotonic() + config.agent_start_timeout_s
        while True:
            client, left = cls._open(root, on_event, deadline=deadline), deadline - time.monotonic()
            if client is None:
                if left <= 0:
                    said = f"no agent of {root} within {config.agent_start_timeout_s} s"
                    hint = "`ckptctl agent logs` says why; StoreConfig(agent_start_timeout_s=...) waits longer"
                    raise TransientError(said, hint=hint)
                idle_exit_seconds = config.agent_idle_exit_seconds
                start_agent(root, RuntimeDir.of(root), idle_exit_seconds=idle_exit_seconds, timeout_s=left)
                client = cls._open(root, on_event, deadline=deadline)
            if client is None:
                # Started by somebody else and not listening yet, or just leaving: its lock goes last.
                time.sleep(0.05)
                continue
            client._config = config
            try:
                client._call(
                    "attach",
                    run=run,
                    slot=slot,
                    rank=rank,
                    begun=begun,
                    remotes=dict(remotes),
                    environ={**environ, **_hook_environment(config)},
                    config=config.model_dump(mode="json"),
                )
            except TransientError:
                client._abandon()
                if time.monotonic() > deadline:
                    raise
                continue
            except BaseException:
                client._abandon()
                raise
            return client

    @classmethod
    def observe(cls, root: Path, on_event: EventCallback = lambda event: None) -> AgentClient | None:
        """Look at the agent of ``root`` without starting one or taking a slot; None if there is none.

        ``status``, ``drain`` and ``stop`` work on it.

        Raises:
            ConfigError: the agent speaks another protocol.
        """
        return cls._open(root, on_event, make_room=False)

    @classmethod
    def _open(
        cls, root: Path, on_event: EventCallback, *, make_room: bool = True, deadline: float = math.inf
    ) -> AgentClient | None:
        for directory in RuntimeDir.all_of(root):
            sock = dial(directory.socket)
            if sock is None:
                continue
            channel = Channel(sock, accept_fds=True)
            sock.settimeout(max(1.0, min(ANSWER_TIMEOUT_S, deadline - time.monotonic())))
            try:
                hello = greet(channel, make_room=make_room)
            except (OSError, LockedError) as error:
                channel.close()
                if isinstance(error, CkptError) and not isinstance(error, TransientError):
                    raise
                continue
            except BaseException:
                channel.close()
                raise
            if hello is None:
                channel.close()
                continue
            sock.settimeout(None)
            # Of writes alone: an agent that hangs reads nothing, and a seal may be larger than what the socket holds.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(ANSWER_TIMEOUT_S), 0))
            return cls(channel, on_event, hello)
        return None

    # ------------------------------------------------------------------ staging

    def layout(self, pieces: Sequence[PieceSpec], *, timeout_s: float | None = None) -> Arena:
        """The arena for these pieces; the same one again while the pieces stay the same.

        Earlier arenas of this client must not be written any more. Waits, at most ``timeout_s`` (default:
        ``back_pressure_timeout_s``), while saves in another layout are being written.

        Raises:
            NoSpaceError: not enough memory; names the bytes.
            TransientError: still in use after the time, or the agent was lost.
        """
        layout_id = layout_id_of(pieces)
        with self._lock:
            if self._arena is not None and self._arena.layout_id == layout_id:
                return self._arena
            self._arena = None  # where this fails, the agent may have neither layout
        wait = self._config.back_pressure_timeout_s if timeout_s is None else timeout_s
        answer, fds = self._ask(
            {"op": "layout", "pieces": pieces_to_wire(pieces), "timeout_s": wait}, wait + ANSWER_TIMEOUT_S + SLACK_S
        )
        try:
            arena = Arena.lent(answer, fds)
        finally:
            close_fds(fds)
        with self._lock:
            self._arena = arena
        return arena

    def reserve(self, timeout_s: float, *, save_id: str | None = None) -> int | None:
        """Take a free generation for filling; None if there is none within ``timeout_s``.

        Args:
            save_id: the save it is for, if known: then a death in mid-copy is told to the others by name.

        Raises:
            LockedError: another process or store has taken over this slot.
        """
        request = {"op": "reserve", "timeout_s": timeout_s, "save_id": save_id}
        answer, _ = self._ask_at_once(request, timeout_s + SLACK_S)
        index: int | None = answer["generation"]
        self._is_filling = index is not None
        return index

    def release(self, generation: int) -> None:
        """Give a reserved generation back unused."""
        self._is_filling = False
        self._call("release", generation=generation)

    def seal(self, generation: int, request: SealRequest) -> None:
        """Say that the generation holds this rank's part, whole. Send it after the last copy, and write no more.

        Raises:
            SaveFailedError: the save was dropped meanwhile; the generation is free.
            TransientError: the agent was lost; whether it got the seal is unknown.
        """
        begun = time.monotonic()
        self._is_filling = False
        tree = request.tree
        is_same = tree is not None and is_same_tree(tree, self._tree)
        wire = replace(request, tree=None) if is_same else request
        self._tree = None  # unless it is known to have got there
        self._call("seal", generation=generation, seal=wire.to_wire(), same_tree=is_same, begun=begun)
        self._tree = tree

    def bring_pages(self) -> None:
        """Bring the arena's pages in the background, before a copy needs them; a save that begins meanwhile goes first.

        When a save is on disk, which nothing may slow down, it goes on by itself.
        """
        with self._lock:
            arena = self._arena
        if arena is not None and not arena.is_on_disk and not all(pages.are_there for pages in arena.pages):
            threading.Thread(target=self._bring, args=(arena,), name="ckptstore-pages", daemon=True).start()

    def _bring(self, arena: Arena) -> None:
        if not self._bringing.acquire(blocking=False):
            return
        try:
            with suppress(OSError, AttributeError):  # of this thread alone; training goes first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            for pages in arena.pages:
                pages.bring_all(lambda: self._is_filling or self._arena is not arena)
        finally:
            self._bringing.release()

    def discard(self, save_id: str, reason: str) -> bool:
        """Drop a save that isn't complete, on this node; False if it is complete and stays."""
        answer, _ = self._ask({"op": "discard", "save_id": save_id, "reason": reason}, DISK_TIMEOUT_S)
        return bool(answer["discarded"])

    def missed(self, save_id: str, step: int, error: CkptError | None) -> None:
        """Have a save counted that no rank has copied, because of ``error`` or (None) by choice."""
        wire = None if error is None else error_to_wire(error)
        self._ask({"op": "missed", "save_id": save_id, "step": step, "error": wire}, TELL_TIMEOUT_S)

    def mend(self, save_id: str) -> None:
        """Have what the local copy of a save lacks brought from the remotes, in the background."""
        self._call("mend", save_id=save_id)

    def announce(self, save_id: str, level: str, failure: str | None = None) -> None:
        """Tell every rank of this node, ourselves too, that a save has this level on all nodes, or why it has not."""
        self._call("announce", save_id=save_id, level=level, failure=failure)

    def complete(self, save_id: str, root: bytes) -> None:
        """Make this node's prepared part complete: all nodes are prepared, and ``root`` is the root manifest.

        Raises:
            CkptError: it can't be: no such part, other parts than the root names, disk.
        """
        self._ask({"op": "complete", "save_id": save_id, "root": root.decode()}, DISK_TIMEOUT_S)

    def claim_timeline(self, at_least: int, record: Mapping[str, Any] | bytes) -> int:
        """Claim the first free timeline from ``at_least`` on in the local tier; the number is ours for good.

        Args:
            record: what is kept with the claim; a mapping gets the number as ``timeline``.
        """
        wire = record.decode() if isinstance(record, bytes) else dict(record)
        timeout = min(DISK_TIMEOUT_S, self._config.deadline_s / 2)  # peers wait, whatever the disk does
        answer, _ = self._ask({"op": "claim_timeline", "at_least": at_least, "record": wire}, timeout)
        return int(answer["number"])

    # ------------------------------------------------------------------ looking, waiting, ending

    def borrow(self, run: str, save_id: str) -> dict[int, mmap.mmap]:
        """Rank -> the image of its shard file, read-only, of those that dead trainers left in the agent's memory.

        A later save may write over them at any time: believe nothing that isn't verified after it was copied.
        """
        images: dict[int, mmap.mmap] = {}
        while True:
            request = {"op": "borrow", "run": run, "save_id": save_id, "after": max(images, default=-1)}
            answer, fds = self._ask(request, ANSWER_TIMEOUT_S)
            try:
                for (rank, size), fd in zip(answer["parts"], fds, strict=True):
                    images[rank] = mmap.mmap(fd, size, prot=mmap.PROT_READ)
            finally:
                close_fds(fds)
            if not answer["parts"]:
                return images

    def restored(self, run: str, bytes_by_source: Mapping[str, int], repaired_files: int) -> bool:
        """Have a load counted in the agent's metrics; False if it keeps none."""
        loaded = {"bytes_by_source": dict(bytes_by_source), "repaired_files": repaired_files}
        return bool(self._ask({"op": "restored", "run": run, **loaded}, TELL_TIMEOUT_S)[0]["is_counted"])

    def status(self) -> dict[str, Any]:
        """What the agent is doing; plain JSON."""
        return self._call("status")

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that is staged is committed and uploaded; whether it is. Early if waiting can't help."""
        answer, _ = self._ask({"op": "drain", "timeout_s": timeout_s}, timeout_s + SLACK_S)
        return bool(answer["is_settled"])

    def settle(self, run: str, timeout_s: float) -> None:
        """Wait until what trainers have sealed in this run is on disk, or has failed.

        Raises:
            SaveTimeoutError: it still isn't.
        """
        answer, _ = self._ask({"op": "settle", "run": run, "timeout_s": timeout_s}, timeout_s + SLACK_S)
        if not answer["is_settled"]:
            raise SaveTimeoutError(f"the node agent is still writing saves of {run} after {timeout_s} s", run=run)

    def stop(self, timeout_s: float) -> bool:
        """Have the agent leave when its work is done, at the latest after ``timeout_s``; whether it has left."""
        self._call("stop", timeout_s=timeout_s)
        self._conversation.join(timeout_s + SLACK_S)
        return self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone."""
        return self._conversation.is_lost

    def close(self) -> None:
        """End the connection; what is sealed goes on. Copies into the arena must have ended. Idempotent."""
        if self._conversation.is_closing:
            return
        self._conversation.is_closing = True
        if not self.is_lost:
            with suppress(CkptError):  # it is heard all the same, if late
                self._ask({"op": "bye"}, BYE_TIMEOUT_S)
        self._abandon()

    def _abandon(self) -> None:
        self._conversation.hang_up()
        self._arena = None

    # ------------------------------------------------------------------ inside

    def _call(self, op: str, **arguments: Any) -> Json:
        return self._ask_at_once({"op": op, **arguments}, ANSWER_TIMEOUT_S)[0]

    def _ask_at_once(self, request: Json, timeout_s: float) -> Answer:
        """Ask what needs no disk. Where even that isn't answered the agent hangs, and nothing more is asked of it."""
        try:
            return self._ask(request, timeout_s)
        except TransientError as error:
            if error.context.get("reason") == "timeout":
                self._conversation.break_off()
            raise

    def _ask(self, request: Json, timeout_s: float) -> Answer:
        return self._conversation.ask(request, timeout_s)

    def _heard(self, event: Event) -> None:
        if event.kind in ("local", "prepared"):
            self.bring_pages()
        self._on_event(event)


def _hook_environment(config: StoreConfig) -> dict[str, str]:
    """The variable that ``hook_url="env:NAME"`` names."""
    name = (config.hook_url or "").removeprefix("env:")
    return {name: os.environ[name]} if name != config.hook_url and name in os.environ else {}
