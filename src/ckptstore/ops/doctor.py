"""`doctor`: try what a store needs, each by doing it in a scratch place, and name a fix for each finding."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ckptstore import native
from ckptstore._version import __version__
from ckptstore.agent.memory import available_memory
from ckptstore.blob.base import BlobStore
from ckptstore.clock import SYSTEM_CLOCK
from ckptstore.errors import CheckpointExistsError, CkptError
from ckptstore.ops.open import Place
from ckptstore.ops.words import human_bytes

LOW_SPACE_BYTES = 2 << 30
SKEW_SECONDS = 60.0


@dataclass(frozen=True)
class Check:
    """One thing that was tried: ``ok``, ``warning`` or ``problem``, and what to do about it."""

    name: str
    state: str
    detail: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "detail": self.detail, "fix": self.fix}


def doctor(place: Place) -> list[Check]:
    """Try everything; a failed check never stops the others."""
    checks: list[Check] = []
    if place.local is not None:
        checks += _local(place.local.root)
    for name, blob in place.blobs.items():
        checks += _remote(name, blob)
    if place.local is not None:
        checks.append(_agent(place.local.root))
        checks.append(survival())
    checks.append(_memory())
    checks.append(kernels())
    checks.append(Check("versions", "ok", f"ckptstore {__version__}, Python {platform.python_version()}"))
    return checks


def kernels() -> Check:
    """Whether copying and coding run in C."""
    name = "C kernels"
    if native.is_available():
        return Check(name, "ok", "in use")
    if os.environ.get(native.ENVIRONMENT) == "0":
        return Check(name, "ok", f"switched off by {native.ENVIRONMENT}=0")
    return Check(
        name,
        "warning",
        "not there: saves hold training up longer, uploads and restores take more CPU",
        "install gcc (or set CC), then pip install --force-reinstall --no-deps --no-binary ckptstore ckptstore",
    )


def _tried(name: str, action: Callable[[], str], fix: str) -> Check:
    try:
        return Check(name, "ok", action())
    except CkptError as error:
        return Check(name, "problem", error.message, error.hint or fix)
    except OSError as error:
        return Check(name, "problem", f"{error.strerror or error}", fix)


def _local(root: Path) -> Iterator[Check]:
    folder = root if root.exists() else _nearest(root)

    def write() -> str:
        path = folder / f".ckptstore-doctor-{secrets.token_hex(6)}"
        began = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, b"x" * 4096)
            os.fsync(fd)
            renamed = path.with_name(path.name + "-renamed")
            os.rename(path, renamed)
            path = renamed
            parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)
        return f"write, fsync, rename and directory fsync took {(time.perf_counter() - began) * 1e3:.1f} ms"

    def space() -> str:
        free = psutil.disk_usage(str(folder)).free
        if free < LOW_SPACE_BYTES:
            raise OSError(28, f"only {human_bytes(free)} are free")
        return f"{human_bytes(free)} free"

    commit = _tried("local: commit", write, f"make {folder} writable for this user, on a file system that can fsync")
    yield commit
    if commit.state == "ok":  # where nothing can be written, O_DIRECT is nobody's concern
        yield _direct(folder)
    yield _tried("local: space", space, "make room, or put the local tier on a larger disk")
    kind = _file_system(folder)
    if kind in ("tmpfs", "ramfs", "overlay"):
        fix = "put the local tier on a disk if saves must survive a power cut"
        yield Check("local: file system", "warning", f"{kind} does not survive a power cut or a restart", fix)
    else:
        yield Check("local: file system", "ok", kind)


def _direct(folder: Path) -> Check:
    """Whether the file system takes O_DIRECT; writing works without, through the page cache."""
    path = folder / f".ckptstore-doctor-{secrets.token_hex(6)}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_DIRECT", 0), 0o600)
        os.close(fd)
        path.unlink()
    except OSError as error:
        return Check("local: O_DIRECT", "ok", f"not here ({error.strerror}); files go through the page cache")
    return Check("local: O_DIRECT", "ok", "supported")


def _agent(root: Path) -> Check:
    from ckptstore.agent.client import AgentClient

    try:
        client = AgentClient.observe(root)
        if client is None:
            return Check("agent", "ok", "none is running; the first save starts one")
        try:
            said = client.status()
        finally:
            client.close()
    except CkptError as error:
        return Check("agent", "warning", f"it does not answer: {error.message}", "`ckptctl agent logs` may say why")
    if said["version"] != __version__:
        detail = f"pid {said['pid']} is version {said['version']}, this is {__version__}"
        return Check("agent", "warning", detail, "let it go with `ckptctl agent stop`; the next save starts a new one")
    return Check("agent", "ok", f"pid {said['pid']}, version {said['version']}")


def survival(proc: Path = Path("/proc"), environ: Mapping[str, str] = os.environ) -> Check:
    """Which deaths a staged save outlives here: an agent lives as long as whatever its process belongs to."""
    try:
        first = (proc / "1" / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        first = ""
    name = "staged saves"
    if "ckptctl" in first or "ckptstore.cli" in first:
        return Check(name, "ok", "outlive the trainers: `ckptctl run` stays until their uploads are done")
    if "SLURM_JOB_ID" in environ:
        fix = "start training as `srun ckptctl run -- CMD`, which waits for the uploads"
        return Check(name, "warning", "outlive a trainer, but not the job step: Slurm kills the agent at its end", fix)
    name_of_first = os.path.basename(first.partition(" ")[0])  # its arguments are nobody's business
    if name_of_first in ("systemd", "init", "launchd", ""):
        return Check(name, "ok", "outlive the trainers until the machine goes down")
    fix = "make `ckptctl run -- CMD` the container's command: it waits for the uploads"
    return Check(
        name,
        "warning",
        f"outlive a trainer, but not this container: it ends with its first process, {name_of_first}",
        fix,
    )


def _traits(name: str, blob: BlobStore, key: str) -> Iterator[Check]:
    """TLS, addressing and checksums, as the server showed them."""
    try:
        for trait in blob.traits(key):
            yield Check(f"{name}: {trait.name}", "ok" if trait.is_right else "warning", trait.detail, trait.fix)
    except CkptError as error:
        yield Check(f"{name}: server", "warning", f"it can't be asked: {error.message}", error.hint or "try again")


def _skew(name: str, blob: BlobStore, key: str) -> Check:
    try:
        info = blob.head(key)
    except CkptError as error:
        return Check(f"{name}: clock", "warning", f"it can't be asked: {error.message}", error.hint or "try again")
    if info is None or info.modified is None:
        return Check(f"{name}: clock", "warning", "the server does not tell times", "gc can't work on this server")
    seconds = (info.modified - SYSTEM_CLOCK.now()).total_seconds()
    if abs(seconds) > SKEW_SECONDS:
        ahead = "behind" if seconds > 0 else "ahead of"
        detail = f"this clock is {abs(seconds):.0f} s {ahead} the server's"
        return Check(f"{name}: clock", "warning", detail, "set it (NTP); requests are refused from 900 s on")
    return Check(f"{name}: clock", "ok", f"within {SKEW_SECONDS:.0f} s of the server's")


def _rules(name: str, blob: BlobStore) -> Check:
    try:
        found = blob.deletion_rules()
    except CkptError as error:
        return Check(f"{name}: lifecycle", "ok", f"rules can't be read: {error.message}")
    if found:
        fix = "exclude this prefix: checkpoints refer to old packs, and only `ckptctl gc` knows which"
        return Check(f"{name}: lifecycle", "problem", "; ".join(found), fix)
    return Check(f"{name}: lifecycle", "ok", "no rule deletes or freezes objects here by age")


def _remote(name: str, blob: BlobStore) -> Iterator[Check]:
    key = f"doctor/{secrets.token_hex(8)}"
    body = secrets.token_bytes(1024)

    def put() -> str:
        blob.put(key, body, if_absent=True)
        return "an object was written"

    def read() -> str:
        if blob.get(key) != body:
            raise OSError(5, "read back other bytes than were written")
        if blob.get(key, start=100, length=50) != body[100:150]:
            raise OSError(5, "a ranged read returned other bytes")
        return "whole and ranged reads return what was written"

    def conditional() -> str:
        try:
            blob.put(key, body, if_absent=True)
        except CheckpointExistsError:
            return "a second create of the same name is refused"
        raise OSError(17, "a second create of the same name was accepted")

    def listing() -> str:
        if key not in [info.key for info in blob.list("doctor/")]:
            raise OSError(5, "the object just written is not listed")
        return "listings show what was written"

    def delete() -> str:
        blob.delete([key, f"{key}-trait"])
        if blob.head(key) is not None:
            raise OSError(5, "the object is still there after delete")
        return "objects can be deleted (needed by retention and gc, not by training)"

    began = time.perf_counter()
    first = _tried(f"{name}: write", put, "check bucket, credentials and the right to put objects")
    yield first
    if first.state != "ok":
        return
    yield Check(f"{name}: latency", "ok", f"one small put took {(time.perf_counter() - began) * 1e3:.0f} ms")
    yield _skew(name, blob, key)
    yield from _traits(name, blob, f"{key}-trait")
    yield _rules(name, blob)
    yield _tried(f"{name}: read", read, "grant the right to get objects")
    yield _tried(f"{name}: conditional create", conditional, "use a bucket whose server honours If-None-Match")
    yield _tried(f"{name}: list", listing, "grant the right to list the bucket")
    removed = _tried(f"{name}: delete", delete, "grant delete to whoever runs retention and gc; trainers need it not")
    yield removed if removed.state == "ok" else Check(removed.name, "warning", removed.detail, removed.fix)


def _memory() -> Check:
    available = available_memory()
    state = "ok" if available > 1 << 30 else "warning"
    detail = f"{available / 2**30:.1f} GiB available; an arena takes twice a rank's shard"
    return Check("memory", state, detail, None if state == "ok" else "use StoreConfig(generations=1)")


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _file_system(path: Path) -> str:
    best = ("", "unknown")
    for mount in psutil.disk_partitions(all=True):
        if path.is_relative_to(mount.mountpoint) and len(mount.mountpoint) >= len(best[0]):
            best = (mount.mountpoint, mount.fstype)
    return best[1]
