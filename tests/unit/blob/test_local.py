"""A folder as a store: what is on the disk, and when."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ckptstore.blob.address import parse_address
from ckptstore.blob.local import LocalBlobStore
from ckptstore.errors import CredentialsError, NoSpaceError, NoStoreError, NotFoundError, StorageError, TransientError


@pytest.fixture
def store(tmp_path: Path) -> LocalBlobStore:
    return LocalBlobStore.from_address(parse_address(f"file://{tmp_path}/store"))


def test_files_are_private_when_put(store: LocalBlobStore, tmp_path: Path) -> None:
    store.put("a/b/c", b"x")
    assert stat.S_IMODE((tmp_path / "store/a/b/c").stat().st_mode) == 0o600
    for folder in ("store", "store/a", "store/a/b"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("if_absent", [False, True])
def test_bytes_and_names_are_on_the_disk_in_order_when_put_returns(
    store: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    events: list[str] = []

    def watch(name: str, describe: object) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            events.append(f"{name} {describe(*args)}")  # type: ignore[operator]
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def of_descriptor(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)).split("~")[0]

    watch("fsync", of_descriptor)
    watch("mkdir", lambda path, *_: str(Path(path).relative_to(tmp_path)))
    watch("link", lambda source, target, *_: str(Path(target).relative_to(tmp_path)))
    watch("replace", lambda source, target: str(Path(target).relative_to(tmp_path)))
    store.put("a/k", b"x", if_absent=if_absent)
    assert events == [
        "mkdir store",
        "fsync .",
        "mkdir store/a",
        "fsync store",
        "fsync store/a/k",
        f"{'link' if if_absent else 'replace'} store/a/k",
        "fsync store/a",
    ]


def test_files_being_written_are_no_objects_when_listed(store: LocalBlobStore, tmp_path: Path) -> None:
    store.put("a/k", b"x")
    (tmp_path / "store/a/k~0123456789ab").write_bytes(b"half")
    (tmp_path / "store/a/with space").write_bytes(b"foreign")
    (tmp_path / "store/a/link").symlink_to(tmp_path / "store/a/k")
    (tmp_path / "store/a/loop").symlink_to(tmp_path / "store/a", target_is_directory=True)
    (tmp_path / "store/empty").mkdir()
    assert [info.key for info in store.list()] == ["a/k"]


def test_leftovers_of_dead_writers_are_removed_when_they_are_old(store: LocalBlobStore, tmp_path: Path) -> None:
    store.put("a/k", b"x")
    old = time.time() - 3 * 24 * 3600
    kept, removed = tmp_path / "store/a/k~0123456789ab", tmp_path / "store/a/j~0123456789ab"
    foreign = [tmp_path / "store/a/notes~", tmp_path / "store/a/emacs~backup", tmp_path / "store/a/b c~0123456789ab"]
    for path in (kept, removed, *foreign):
        path.write_bytes(b"half")
    for path in (removed, *foreign):
        os.utime(path, (old, old))
    assert store.abort_uploads("", datetime.now(timezone.utc) + timedelta(days=1)) == 1
    assert not removed.exists()
    assert all(path.exists() for path in (kept, *foreign))
    assert store.get("a/k") == b"x"


def test_a_symlink_is_not_followed_when_read_or_replaced(store: LocalBlobStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    store.put("k", b"x")
    (tmp_path / "store/link").symlink_to(secret)
    with pytest.raises(NotFoundError):
        store.get("link")
    assert store.head("link") is None
    store.put("link", b"ours")
    assert secret.read_bytes() == b"secret"
    assert store.get("link") == b"ours"


def test_a_folder_that_is_not_mounted_is_no_empty_store_when_listed(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path / "mnt" / "store")
    with pytest.raises(NoStoreError, match="mount") as caught:
        list(store.list())
    assert caught.value.context["bucket"] == str(tmp_path / "mnt")
    with pytest.raises(NoStoreError):
        store.put("k", b"x")
    assert not (tmp_path / "mnt").exists()


def test_the_errno_is_named_and_nothing_is_left_when_the_disk_is_full(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; it works without root."""
    script = f"""
import resource, signal
from pathlib import Path
from ckptstore.blob.local import LocalBlobStore
from ckptstore.errors import NoSpaceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = LocalBlobStore(Path({str(tmp_path)!r}) / "store")
store.put("small", b"x" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    store.put("large", b"x" * 100_000)
except NoSpaceError as error:
    assert "EFBIG" in str(error) and error.context["errno"] == "EFBIG", error
else:
    raise SystemExit("it fitted")
assert [info.key for info in store.list()] == ["small"]
store.put("next", b"y")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["next", "small"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("ENOSPC", NoSpaceError),
        ("EDQUOT", NoSpaceError),
        ("EROFS", CredentialsError),
        ("EACCES", CredentialsError),
        ("EMFILE", TransientError),
        ("ESTALE", TransientError),
        ("EIO", StorageError),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "write", "replace"])
def test_the_errno_decides_the_error_when_a_call_fails(
    store: LocalBlobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    expected: type[StorageError],
    call: str,
) -> None:
    import errno

    store.put("k", b"old")

    def fail(*_: object) -> None:
        raise OSError(getattr(errno, code), "as planned")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(expected, match=code) as caught:
        store.put("k", b"new")
    assert type(caught.value) is expected
    monkeypatch.undo()
    assert store.get("k") == b"old"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["k"]


def test_put_says_what_is_in_the_way_when_a_file_stands_for_a_folder(store: LocalBlobStore) -> None:
    store.put("a", b"x")
    with pytest.raises(StorageError, match="in the way") as caught:
        store.put("a/b", b"y")
    assert not isinstance(caught.value, NotFoundError)
    with pytest.raises(NotFoundError):
        store.get("a/b")
    assert store.head("a/b") is None


def test_create_only_says_so_when_the_file_system_has_no_hard_links(
    store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match="hard links"):
        store.put("k", b"x", if_absent=True)


def test_folders_are_made_once_when_many_writers_come_at_a_time(store: LocalBlobStore) -> None:
    keys = [f"new/deep/er/{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x", if_absent=True), keys))
    assert sorted(info.key for info in store.list()) == sorted(keys)


def test_a_writer_that_is_killed_leaves_no_object_when_it_was_amid_a_put(store: LocalBlobStore, tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from ckptstore.blob.local import LocalBlobStore
os.fsync = lambda descriptor: os._exit(9)
LocalBlobStore(Path({str(tmp_path)!r}) / "store").put("k", b"new")
"""
    store.put("other", b"x")
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert [info.key for info in store.list()] == ["other"]
    store.put("k", b"again", if_absent=True)
