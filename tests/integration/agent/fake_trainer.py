"""A trainer without torch: it copies known bytes into the arena and seals, in this process or in forked ones.

Run as a script it is a fork server: commands come as JSON lines on stdin, what the children did goes to stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptstore.agent.client import AgentClient
from ckptstore.agent.protocol import Event, SealRequest
from ckptstore.clock import SYSTEM_CLOCK, new_nonce, rfc3339
from ckptstore.config import StoreConfig
from ckptstore.format import stock
from ckptstore.format.dtypes import itemsize
from ckptstore.format.manifest import RootManifest, ShardManifest, Summary, digest
from ckptstore.format.stock import PieceSpec
from ckptstore.repo.local import LocalTier

WAIT_S = 60.0
"""Generous: agents run at the lowest priority, and tests may run beside others."""


def spec(fqn: str, dtype: str, *shape: int) -> PieceSpec:
    """A whole tensor as one piece."""
    return PieceSpec(fqn, dtype, shape, (0,) * len(shape), shape, True)


def pieces_of(rank: int = 0, kib: int = 256) -> list[PieceSpec]:
    """Large, small, odd and empty pieces."""
    return [
        spec(f"r{rank}.weight", "float32", kib, 256),
        spec(f"r{rank}.half", "bfloat16", 33, 7),
        spec(f"r{rank}.step", "int64"),
        spec(f"r{rank}.none", "float32", 0, 4),
        spec(f"r{rank}.moment", "float32", kib // 2, 256),
    ]


def pattern(save_id: str, piece: PieceSpec) -> bytes:
    """Bytes that differ within the piece, between pieces, ranks and saves."""
    return hashlib.shake_128(f"{save_id}|{piece.fqn}".encode()).digest(piece.size_bytes)


def check_part(path: Path, shard: ShardManifest) -> None:
    """Every byte of a shard file is what was copied, or what its manifest implies."""
    specs = stock.specs_of(shard)
    data = (path / shard.file).read_bytes()
    assert len(data) == shard.file_bytes
    for piece, expected in zip(shard.pieces, specs, strict=True):
        payload = data[piece.start : piece.start + piece.size_bytes]
        assert payload == pattern(shard.save_id, expected), (
            f"{piece.fqn} of save {shard.save_id} is not what was copied"
        )
        step = shard.chunk_elements * itemsize(expected.dtype)
        assert list(piece.digests) == [digest(payload[at : at + step]) for at in range(0, len(payload), step)]
    outside = b""
    for offset, run in stock.skeleton(shard):
        assert data[offset : offset + len(run)] == run
        outside += run
    assert digest(outside) == shard.skeleton_digest
    assert len(outside) + sum(p.size_bytes for p in shard.pieces) == len(data)


class Trainer:
    """One rank. Events are kept, and can be waited for."""

    def __init__(
        self,
        root: Path,
        *,
        run: str = "run",
        slot: int = 0,
        ranks: int = 1,
        local_ranks: Sequence[int] | None = None,
        node: int = 0,
        num_nodes: int = 1,
        remotes: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        config: StoreConfig | None = None,
        nonce: str | None = None,
        kib: int = 256,
    ) -> None:
        self.run, self.slot, self.node, self.num_nodes = run, slot, node, num_nodes
        self.world_size = ranks
        self.local_ranks = tuple(range(ranks) if local_ranks is None else local_ranks)
        self.rank = self.local_ranks[slot]
        self.nonce = nonce or new_nonce()
        self.events: list[Event] = []
        self._arrived = threading.Condition()
        self.client = AgentClient.connect(
            root,
            run=run,
            slot=slot,
            remotes=remotes or {},
            environ=environ or {},
            config=config or StoreConfig(),
            on_event=self._on_event,
        )
        self.arena = self.client.layout(pieces := pieces_of(self.rank, kib))
        self.pieces = pieces

    def _on_event(self, event: Event) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def wait(self, kind: str, save_id: str = "", timeout_s: float = WAIT_S) -> Event:
        """The first event of this kind about this save."""

        def found() -> Event | None:
            return next((e for e in self.events if e.kind == kind and e.save_id == save_id), None)

        with self._arrived:
            assert self._arrived.wait_for(found, timeout_s), f"no {kind} of {save_id!r}, only {self.kinds()}"
            event = found()
            assert event is not None
            return event

    def kinds(self, save_id: str | None = None) -> list[str]:
        return [e.kind for e in self.events if save_id in (None, e.save_id)]

    def save_id(self, number: int) -> str:
        return f"{self.nonce}-{number}"

    def fill(self, number: int, generation: int, pause: Callable[[], None] = lambda: None) -> None:
        """Copy this rank's part, in slices."""
        memory = self.arena.generations[generation]
        for piece, start in zip(self.pieces, self.arena.starts, strict=True):
            data = pattern(self.save_id(number), piece)
            for at in range(0, len(data), 1 << 16):
                part = data[at : at + (1 << 16)]
                memory[start + at : start + at + len(part)] = part
                pause()

    def request(self, number: int, step: int | None = None) -> SealRequest:
        step = number if step is None else step
        summary = Summary(
            run=self.run,
            save_id=self.save_id(number),
            timeline=1,
            step=step,
            created_at=rfc3339(SYSTEM_CLOCK.now()),
            job=self.nonce,
            world_size=self.world_size,
            num_nodes=self.num_nodes,
        )
        return SealRequest(
            save_id=self.save_id(number),
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            node=self.node,
            num_nodes=self.num_nodes,
            local_ranks=self.local_ranks,
            layout_id=self.arena.layout_id,
            summary=summary if self.rank == 0 else None,
        )

    def save(self, number: int, *, timeout_s: float = WAIT_S) -> str:
        """Reserve, copy, seal; returns the save_id."""
        generation = self.client.reserve(timeout_s, save_id=self.save_id(number))
        assert generation is not None
        self.fill(number, generation)
        self.client.seal(generation, self.request(number))
        return self.save_id(number)

    def close(self) -> None:
        self.client.close()


class ForkServer:
    """Starts trainers in a few milliseconds each; kill them as you like."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
            start_new_session=True,
        )
        self._lines: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self._number = 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._arrived:
                self._lines.append(json.loads(line))
                self._arrived.notify_all()

    def start(self, **options: Any) -> int:
        """A number that names the child."""
        assert self._process.stdin is not None
        self._number += 1
        self._process.stdin.write(json.dumps({"child": self._number, **options}) + "\n")
        self._process.stdin.flush()
        return self._number

    def wait(self, child: int, what: str, number: int | None = None) -> dict[str, Any]:
        """What a child reported."""

        def found() -> dict[str, Any] | None:
            return next(
                (x for x in self._lines if x["child"] == child and x["what"] in (what, "error")
                 and number in (None, x.get("number"))), None
            )  # fmt: skip

        with self._arrived:
            assert self._arrived.wait_for(found, WAIT_S), (what, self._lines[-5:])
            line = found()
            assert line is not None
            assert line["what"] == what, line
            return line

    def reported(self, child: int, what: str) -> list[dict[str, Any]]:
        """Everything a child reported before this call: what it wrote may not have been read here yet."""
        assert self._process.stdin is not None
        self._number += 1
        self._process.stdin.write(json.dumps({"echo": self._number}) + "\n")
        self._process.stdin.flush()
        self.wait(self._number, "echo")  # it comes through the same pipe, after all that is in it
        with self._arrived:
            return [line for line in self._lines if line["child"] == child and line["what"] == what]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@contextmanager
def fork_server(environ: Mapping[str, str]) -> Iterator[ForkServer]:
    server = ForkServer(environ)
    try:
        yield server
    finally:
        server.close()


def complete_saves(root: Path, run: str = "run") -> dict[str, RootManifest]:
    """Every complete save of a local tier, each of its bytes checked."""
    tier = LocalTier(root)
    result = {}
    for save in tier.saves(run):
        assert save.damaged is None
        if save.state == "complete":
            manifest = tier.root_manifest(run, save)
            for ref in manifest.shards:
                check_part(save.path, tier.shard_manifest(save.path, ref))
            result[save.save_id] = manifest
    return result


def _child(options: dict[str, Any]) -> None:
    def report(what: str, **more: Any) -> None:
        line = json.dumps({"child": options["child"], "pid": os.getpid(), "what": what, **more})
        os.write(1, line.encode() + b"\n")

    report("started")
    config = StoreConfig(**options.get("config", {}))
    try:
        trainer = Trainer(
            Path(options["root"]),
            slot=options.get("slot", 0),
            ranks=options.get("ranks", 1),
            remotes=options.get("remotes"),
            config=config,
            nonce=options.get("nonce"),
            kib=options.get("kib", 256),
        )
        report("attached", agent_pid=trainer.client.agent_pid)
        for number in range(1, options.get("saves", 0) + 1):
            generation = trainer.client.reserve(WAIT_S, save_id=trainer.save_id(number))
            assert generation is not None
            report("filling", number=number)
            if number == options.get("hang_at"):
                trainer.fill(number, generation, pause=lambda: time.sleep(0.02))
                time.sleep(WAIT_S)
            trainer.fill(number, generation)
            trainer.client.seal(generation, trainer.request(number))
            report("sealed", number=number)
        if options.get("die_when_sealed"):
            trainer.wait("sealed", trainer.save_id(options["saves"]))
            report("dying")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.get("linger_s", WAIT_S))
        trainer.close()
    except BaseException as error:
        report("error", error=repr(error))


def _serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        options = json.loads(line)
        if "echo" in options:
            os.write(1, json.dumps({"child": options["echo"], "what": "echo"}).encode() + b"\n")
        elif os.fork() == 0:
            os.close(0)
            try:
                _child(options)
            finally:
                os._exit(0)
    os.killpg(0, signal.SIGKILL)  # the children that are left, and this process


if __name__ == "__main__":
    _serve()
