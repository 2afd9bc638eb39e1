"""Where an agent's socket, lock and log live, who becomes the agent of a root, and how it is started.

Everything is in a node-private directory of the user (``$XDG_RUNTIME_DIR/ckptstore``, else
``<tmp>/ckptstore-<uid>``), never in the root, which may be on a shared file system. Each root has a folder there, named
by a hash of its file system and real path::

    agent.lock    flock held by the one agent for its whole life
    spawn.lock    flock held by the trainer that starts it, so that sixteen ranks start one process, not sixteen
    agent.sock    agent.log

The locks are flocks: the kernel drops them with their holder, so no crash leaves one behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore.errors import CkptError, ConfigError, StorageError, TransientError

if TYPE_CHECKING:
    from ckptstore.config import StoreConfig

#: What an agent may inherit. Credentials are not among it: they come over the socket, per run, and stay in memory.
#: HOME lets an SDK find its own profile files; proxies are left out because their URLs carry passwords.
ENVIRONMENT = (
    "AWS_CA_BUNDLE", "CKPTSTORE_LOG_FORMAT", "CKPTSTORE_NATIVE", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH",
    "LOGNAME", "PATH", "PYTHONHOME", "PYTHONPATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE", "TMPDIR",
    "TZ", "USER", "VIRTUAL_ENV", "XDG_RUNTIME_DIR",
)  # fmt: skip

#: sun_path's size; longer socket paths are reached through a descriptor of their directory.
MAX_SOCKET_PATH_BYTES = 100
MAX_LOG_BYTES = 4 << 20
#: Where a login makes XDG_RUNTIME_DIR. Source: pam_systemd(8)
USER_DIRECTORIES = "/run/user"


@dataclass(frozen=True)
class RuntimeDir:
    """The runtime folder of one root's agent."""

    path: Path

    @classmethod
    def of(cls, root: Path) -> RuntimeDir:
        """Where the agent of ``root`` lives or last lived, else where a new one would. Makes nothing."""
        places = cls.all_of(root)
        return next((place for place in places if place.lock.exists()), places[0])

    @classmethod
    def all_of(cls, root: Path) -> list[RuntimeDir]:
        """Everywhere an agent of ``root`` may live, the preferred place first.

        A login shell and a batch job of one user may differ in ``XDG_RUNTIME_DIR``.
        """
        return [cls(base / _key(root)) for base in _bases(os.environ)]

    @property
    def lock(self) -> Path:
        return self.path / "agent.lock"

    @property
    def spawn_lock(self) -> Path:
        return self.path / "spawn.lock"

    @property
    def socket(self) -> Path:
        return self.path / "agent.sock"

    @property
    def log(self) -> Path:
        return self.path / "agent.log"

    @contextmanager
    def staging_noted(self, run: str, save_id: str) -> Iterator[None]:
        """While this lasts, a note tells the next agent whose staging directory is left if we are killed."""
        note = self.path / f"{run}@{save_id}"
        with suppress(OSError):
            note.touch()
        try:
            yield
        finally:
            with suppress(OSError):
                note.unlink()

    def left_staging(self) -> list[tuple[str, str]]:
        """(run, save_id) of what earlier agents were writing when they were killed; forgets it. Hold the lock."""
        left = []
        for note in list(self.path.glob("*@*")):
            run, _, save_id = note.name.partition("@")
            left.append((run, save_id))
            note.unlink()
        return left

    def create(self) -> None:
        """Make it (0700) and everything above it that is ours.

        Raises:
            ConfigError: somebody else's, or open to others.
        """
        _private_dir(self.path.parent)
        _private_dir(self.path)


def _key(root: Path) -> str:
    """Names this root among all that processes with this temp folder may mean.

    Containers may share a temp folder, host name, boot and pids, and each have a disk of its own under one path: so the
    file system counts too. It is that of the nearest folder that exists, which stays the same when the root is made.
    """
    path = os.path.realpath(root)
    above = path
    while not os.path.exists(above) and above != os.path.dirname(above):
        above = os.path.dirname(above)
    device = os.stat(above).st_dev
    return hashlib.sha256(os.fsencode(f"{device}:{path}")).hexdigest()[:16]


def _bases(environ: Mapping[str, str]) -> list[Path]:
    ours = [Path(tempfile.gettempdir()) / f"ckptstore-{os.getuid()}"]
    # Batch systems pass the variable on to nodes where the directory does not exist.
    if _is_usable(xdg := environ.get("XDG_RUNTIME_DIR", "")):
        ours.insert(0, Path(xdg) / "ckptstore")
    # Batch systems and cron don't set it where the user's services have it. Only to be looked into: it goes with the
    # user's last session.
    if _is_usable(usual := f"{USER_DIRECTORIES}/{os.getuid()}"):
        ours.append(Path(usual) / "ckptstore")
    return list(dict.fromkeys(ours))


def _is_usable(directory: str) -> bool:
    return Path(directory).is_absolute() and os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK)


def _private_dir(path: Path) -> None:
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except OSError as error:
        raise ConfigError(
            f"can't make the runtime directory {path}: {error.strerror}", hint="set XDG_RUNTIME_DIR or TMPDIR"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a private directory of this user",
            hint="remove it if it isn't in use, or set XDG_RUNTIME_DIR to a directory of yours",
            path=str(path),
        )


def try_lock(path: Path, *, waits: bool = False) -> int | None:
    """A descriptor holding the flock of ``path``; None if another process holds it. Closing it unlocks.

    Args:
        waits: until the other process lets go.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def listen(path: Path) -> socket.socket:
    """A listening socket under ``path``, whose name is taken from whatever was there. Hold the lock to call this."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as address:
            sock.bind(address)
        path.chmod(0o600)
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return sock


def dial(path: Path, timeout_s: float = 5.0) -> socket.socket | None:
    """A connection to the agent listening at ``path``; None if nobody listens.

    Raises:
        ConfigError: the directory is not private: who listens there could be anybody.
    """
    try:
        status = os.lstat(path.parent)
    except FileNotFoundError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path.parent} is not a private directory of this user", path=str(path.parent))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        with _short(path) as address:
            sock.connect(address)
        sock.settimeout(None)
    except (FileNotFoundError, ConnectionError, TimeoutError, BlockingIOError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _short(path: Path) -> Iterator[str]:
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def start_agent(root: Path, directory: RuntimeDir, *, idle_exit_seconds: float, timeout_s: float) -> None:
    """Start the agent of ``root`` unless somebody else's is there; returns when one listens, or is about to.

    The process is its own session, has a log instead of our stdio, no descriptor of ours, and an environment without
    secrets. It is nobody's child: it survives us, and leaves no zombie when it exits before us.

    Raises:
        TransientError: not ready within ``timeout_s``.
        StorageError: it could not start; the message says why.
    """
    from ckptstore.repo.durable import raise_for_errno

    deadline = time.monotonic() + timeout_s
    for is_last in (False, True):
        try:
            # Once more if it was killed at its start, or somebody cleaned the temp folder up: both happen to pass.
            if _start(root, directory, idle_exit_seconds, deadline):
                return
        except OSError as error:
            if is_last or not isinstance(error, FileNotFoundError):
                raise_for_errno(error, f"can't start the agent of {root}")
    raise StorageError(f"the agent of {root} could not start", hint=f"see {directory.log}")


def _start(root: Path, directory: RuntimeDir, idle_exit_seconds: float, deadline: float) -> bool:
    """Whether one listens or is about to; False if it ended without a word."""
    directory.create()
    while (lock := try_lock(directory.spawn_lock)) is None:
        if time.monotonic() > deadline:
            raise TransientError(f"another process has been starting the agent of {root} for too long")
        time.sleep(0.02)
    try:
        while not _is_vacant(directory):
            if (sock := dial(directory.socket)) is not None:
                sock.close()
                return True
            # It has stopped listening and not yet stopped writing, or is about to listen.
            if time.monotonic() > deadline:
                raise TransientError(f"the agent of {root} neither listens nor leaves", hint=f"see {directory.log}")
            time.sleep(0.05)
        return _spawn(root, directory, idle_exit_seconds, deadline)
    finally:
        os.close(lock)


def prestart(root: Path, config: StoreConfig) -> None:
    """Begin to start the agent of ``root`` in the background; whoever connects waits for it, and hears what failed."""

    def start() -> None:
        with suppress(CkptError, OSError):
            directory = RuntimeDir.of(root)
            if (sock := dial(directory.socket)) is not None:
                sock.close()
                return
            start_agent(
                root,
                directory,
                idle_exit_seconds=config.agent_idle_exit_seconds,
                timeout_s=config.agent_start_timeout_s,
            )

    threading.Thread(target=start, name="ckptstore-start", daemon=True).start()


def _is_vacant(directory: RuntimeDir) -> bool:
    lock = try_lock(directory.lock)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _spawn(root: Path, directory: RuntimeDir, idle_exit_seconds: float, deadline: float) -> bool:
    ready, ready_end = os.pipe()
    log = _open_log(directory.log)
    try:
        command = [
            sys.executable, "-m", "ckptstore.agent", "--root", str(root.absolute()), "--runtime", str(directory.path),
            "--idle-exit-seconds", repr(idle_exit_seconds), "--ready-fd", str(ready_end),
        ]  # fmt: skip
        starter = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            close_fds=True,
            pass_fds=(ready_end,),
            start_new_session=True,
            cwd="/",
            env=agent_environment(os.environ),
        )
        os.close(ready_end)
        ready_end = -1
        answer = _read_line(ready, deadline)
        # It leaves as soon as it has put the agent into the background; only a broken interpreter stays.
        try:
            starter.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            starter.kill()
            starter.wait()
    finally:
        os.close(log)
        os.close(ready)
        if ready_end >= 0:
            os.close(ready_end)
    if answer is None:
        raise TransientError(
            f"the agent of {root} was not ready in time", hint=f"see {directory.log}; raise agent_start_timeout_s"
        )
    if not answer:
        return False
    said = json.loads(answer)
    if "error" in said:
        from ckptstore.agent.protocol import error_from_wire

        raise error_from_wire(said["error"])
    return True


def _read_line(fd: int, deadline: float) -> bytes | None:
    """What the agent reports; b"" when it died first, None when time is up."""
    line = b""
    readable = select.poll()  # not select(): a trainer may hold more than a thousand descriptors
    readable.register(fd, select.POLLIN)
    while not line.endswith(b"\n"):
        if not readable.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        part = os.read(fd, 65536)
        if not part:
            return b""
        line += part
    return line


def _open_log(path: Path) -> int:
    with suppress(FileNotFoundError):
        if os.lstat(path).st_size > MAX_LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def agent_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment an agent gets: an allow-list, plus where to import this package from."""
    kept = {name: environ[name] for name in ENVIRONMENT if name in environ}
    home = Path(__file__).resolve().parents[2]
    # Installed packages are found anyway, and site-packages in front of the standard library would shadow it.
    if home.name not in ("site-packages", "dist-packages"):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), kept.get("PYTHONPATH", "")]))
    return kept
