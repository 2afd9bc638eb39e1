"""A real file system whose power can be cut, and the save protocol to cut it under.

An ext4 in a file is mounted through a loop device. The cut is ext4's own shutdown ioctl in its harshest form: nothing
more reaches the image, the journal in memory included. Needs root and Linux.

As a program it is the victim: ``python -m ckptstore.testing.power_cut ROOT SAVE_ID [--nodes 2] [--without KIND]``
makes one save after another below ROOT and prints ``ack STEP`` after each acknowledgement.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ckptstore.errors import CkptError
from ckptstore.format import stock
from ckptstore.format.manifest import root_of
from ckptstore.repo import durable, names
from ckptstore.repo.commit import complete
from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import image_of, shard_of, write_save

RUN = "victim"
#: Kinds of fsync that the victim can leave out while it saves: of shard files, of the small files beside them, of the
#: directory they are in, and of its parent.
KINDS = ("shard", "manifest", "dir", "parent")
PAYLOAD_BYTES = 200_000

#: EXT4_IOC_SHUTDOWN (_IOR('X', 125, __u32)), and the flag that drops the journal too.
#: Source: fs/ext4/ext4.h, include/uapi/linux/ext4.h.
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


def why_not() -> str | None:
    """Why power can't be cut on this machine; None when it can."""
    if sys.platform != "linux":
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root (loop mount)"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    return None


class PowerCutFileSystem:
    """An ext4 of its own, for one ``with`` block; unmounted and removed whatever happens.

    Args:
        folder: Where the image and the mount point go.
        image_bytes: Size of the image; sparse.
    """

    def __init__(self, folder: Path, image_bytes: int = 64 << 20) -> None:
        self.image = folder / "disk.img"
        self.root = folder / "disk"
        self.image_bytes = image_bytes
        self._mounted = False

    def __enter__(self) -> PowerCutFileSystem:
        self.root.mkdir()
        with self.image.open("wb") as file:
            file.truncate(self.image_bytes)
        try:
            _run("mkfs.ext4", "-q", "-F", str(self.image))
            self._mount()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def cut(self) -> None:
        """Cut the power: what is not on the disk by now never gets there."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def boot(self) -> None:
        """Mount again, replaying the journal; nobody may hold files of the old mount any more."""
        self._unmount()
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.root))
        self._mounted = True

    def _unmount(self) -> None:
        for attempt in range(50):
            try:
                _run("umount", str(self.root))
                break
            except subprocess.CalledProcessError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        self._mounted = False

    def _remove(self) -> None:
        if self._mounted:
            try:
                self._unmount()
            except subprocess.CalledProcessError:
                _run("umount", "--lazy", str(self.root))
        self.image.unlink(missing_ok=True)
        with suppress(OSError):
            self.root.rmdir()


class Victim:
    """The victim as a child process.

    Args:
        root: The store's root, on the file system that will lose power.
        save_prefix: 12 hex digits, so that each victim makes saves of its own.
        nodes: 1: one rename commits. 2: prepared first, then completed, as with several nodes.
        without: A kind of fsync to leave out.
    """

    def __init__(self, root: Path, save_prefix: str, *, nodes: int = 1, without: str | None = None) -> None:
        command = [sys.executable, "-m", "ckptstore.testing.power_cut", str(root), save_prefix, "--nodes", str(nodes)]
        if without is not None:
            command += ["--without", without]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def save(self) -> None:
        """Let it make one more save, without waiting."""
        assert self._child.stdin is not None
        self._child.stdin.write("save\n")
        self._child.stdin.flush()

    def acknowledged(self) -> int:
        """Wait for the next acknowledgement and return its step."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line.startswith("ack "):
            raise RuntimeError(f"the victim ended with {self._child.wait()} instead of acknowledging: {line!r}")
        return int(line.split()[1])

    def end(self) -> None:
        """Kill it and wait until it holds no file any more."""
        self._child.kill()
        self._child.communicate()


def payload_of(step: int) -> bytes:
    """What the save at this step stores: different at each step, incompressible."""
    return hashlib.shake_128(str(step).encode()).digest(PAYLOAD_BYTES)


def what_is_wrong(root: Path, save_id: str, step: int) -> str | None:
    """Compare every byte of a save with what was saved; None when all is there and equal."""
    tier = LocalTier(root)
    try:
        if not tier.exists():
            return "the store is gone"
        save = tier.find(RUN, save_id)
        if save is None:
            return "the save is gone"
        if save.state != "complete" or save.summary is None or save.damaged:
            return f"the save is {save.state}: {save.damaged}"
        payload = payload_of(step)
        shard = shard_of(save.summary.model_copy(update={"size_bytes": 0}), 0, payload)
        root_manifest = root_of([shard])
        expected = {
            shard.file: image_of(shard, payload),
            names.shard_manifest_file(0): shard.encode(),
            names.SUMMARY: root_manifest.summary.encode(),
            names.MANIFEST: root_manifest.encode(),
            names.STOCK_METADATA: stock.metadata(root_manifest, [shard]),
        }
        for name, data in expected.items():
            file = save.path / name
            if not file.exists():
                return f"{name} is gone"
            if file.read_bytes() != data:
                return f"{name} differs ({file.stat().st_size} bytes instead of {len(data)})"
        if save_id not in tier.pins(RUN):
            return "its pin is gone"
        if tier.timeline_record(RUN, step) != save_id.encode():
            return "its timeline's claim is gone or torn"
    except CkptError as error:
        return str(error)
    return None


def main() -> None:
    """Be the victim: one acknowledged save for each line read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("save_prefix")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--without", choices=KINDS)
    arguments = parser.parse_args()
    tier = LocalTier(arguments.root)
    tier.create()
    for step, _ in enumerate(sys.stdin, start=1):
        save_id = f"{arguments.save_prefix}-{step}"
        # The claim and the pin come first: the last thing before the acknowledgement is the commit alone.
        tier.claim_timeline(RUN, step, save_id.encode())
        tier.pin(RUN, save_id)
        with _leaving_out(arguments.without):
            _save(tier, step, save_id, nodes=arguments.nodes)
        sys.stdout.write(f"ack {step}\n")
        sys.stdout.flush()


def _save(tier: LocalTier, step: int, save_id: str, *, nodes: int) -> None:
    path = write_save(tier, RUN, step, save_id, payload_of(step), defer_complete=nodes > 1)
    if nodes > 1:
        complete(path, root_of(tier.shard_manifests_present(path)))


@contextmanager
def _leaving_out(kind: str | None) -> Iterator[None]:
    """Take one kind of fsync out of the protocol."""
    kept = durable.fsync_file, durable.fsync_dir, durable.fsync_parent

    def fsync_others(fd: int) -> None:
        is_shard = Path(f"/proc/self/fd/{fd}").readlink().suffix == ".distcp"
        if is_shard != (kind == "shard"):
            kept[0](fd)

    if kind in ("shard", "manifest"):
        durable.fsync_file = fsync_others
    elif kind == "dir":
        durable.fsync_dir = _nothing
    elif kind == "parent":
        durable.fsync_parent = _nothing
    try:
        yield
    finally:
        durable.fsync_file, durable.fsync_dir, durable.fsync_parent = kept


def _nothing(path: Path) -> None:
    del path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


if __name__ == "__main__":
    main()
