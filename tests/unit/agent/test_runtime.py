"""Where agents live: private, per root, one at a time, and with nothing secret around them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ckptstore.agent import runtime as runtime_module
from ckptstore.agent.runtime import RuntimeDir, agent_environment, dial, listen, try_lock
from ckptstore.errors import ConfigError


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_paths_that_are_one_directory_share_an_agent(runtime: Path) -> None:
    root = runtime / "root"
    root.mkdir()
    (runtime / "link").symlink_to(root)
    assert RuntimeDir.of(root) == RuntimeDir.of(runtime / "link") == RuntimeDir.of(runtime / "x" / ".." / "root")
    assert RuntimeDir.of(root) != RuntimeDir.of(runtime / "other")


def test_nothing_is_ever_in_the_root(runtime: Path) -> None:
    root = runtime / "root"
    place = RuntimeDir.of(root)
    place.create()
    for path in (place.lock, place.socket, place.log, place.spawn_lock):
        assert not path.is_relative_to(root)
    assert place.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", ["", "relative", "/nonexistent/dir"])
def test_the_temp_directory_is_used_when_xdg_is_unusable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    base = Path(tempfile.gettempdir()) / f"ckptstore-{os.getuid()}"
    assert RuntimeDir.of(Path("/some/root")).path.parent == base


def test_an_agent_is_found_when_xdg_differs_from_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    place = RuntimeDir.of(tmp_path / "root")
    place.create()
    place.lock.touch()
    (tmp_path / "xdg").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    assert RuntimeDir.of(tmp_path / "root") == place


def test_a_batch_job_finds_the_agent_of_the_users_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runtime_module, "USER_DIRECTORIES", str(tmp_path / "user"))
    login = tmp_path / "user" / str(os.getuid())
    login.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(login))
    service = RuntimeDir.of(tmp_path / "root")
    assert service.path.is_relative_to(login)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert not RuntimeDir.of(tmp_path / "root").path.is_relative_to(login), "it goes with the user's last session"
    service.create()
    service.lock.touch()
    assert RuntimeDir.of(tmp_path / "root") == service


def test_a_directory_that_is_not_private_is_refused(runtime: Path) -> None:
    place = RuntimeDir.of(runtime / "root")
    place.create()
    place.path.chmod(0o750)
    with pytest.raises(ConfigError, match="not a private directory"):
        place.create()
    with pytest.raises(ConfigError, match="not a private directory"):
        dial(place.socket)
    place.path.chmod(0o700)
    place.create()


def test_a_symbolic_link_in_the_way_is_refused(runtime: Path) -> None:
    (runtime / "elsewhere").mkdir(mode=0o700)
    (runtime / "ckptstore").symlink_to(runtime / "elsewhere")
    with pytest.raises(ConfigError, match="not a private directory"):
        RuntimeDir.of(runtime / "root").create()


def test_one_holds_the_lock_until_it_lets_go(runtime: Path) -> None:
    first = try_lock(runtime / "lock")
    assert first is not None
    assert try_lock(runtime / "lock") is None
    os.close(first)
    second = try_lock(runtime / "lock")
    assert second is not None
    assert not os.get_inheritable(second)
    os.close(second)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_socket_is_reached_whatever_the_length_of_its_path(tmp_path: Path, depth: int) -> None:
    folder = tmp_path
    for _ in range(depth):
        folder = folder / ("x" * 100)
        folder.mkdir()
    folder.chmod(0o700)
    path = folder / "agent.sock"
    assert dial(path) is None
    path.touch()  # what a crash left
    server = listen(path)
    assert path.stat().st_mode & 0o777 == 0o600
    client = dial(path)
    assert client is not None
    client.close()
    server.close()
    assert dial(path) is None


def test_the_environment_is_an_allow_list() -> None:
    environ = {
        "HOME": "/h",
        "PATH": "/bin",
        "AWS_SECRET_ACCESS_KEY": "s",
        "LD_PRELOAD": "x",
        "HTTPS_PROXY": "http://u:p@h",
    }
    kept = agent_environment(environ)
    assert {"HOME": "/h", "PATH": "/bin"}.items() <= kept.items()
    assert not {"AWS_SECRET_ACCESS_KEY", "LD_PRELOAD", "HTTPS_PROXY"} & set(kept)


def test_what_was_being_written_is_known_when_the_writer_was_killed(runtime: Path) -> None:
    place = RuntimeDir.of(runtime / "root")
    place.create()
    with place.staging_noted("run", "0123456789ab-1"):
        pass
    assert place.left_staging() == []
    killed = place.staging_noted("a.b_c-d", "0123456789ab-2")
    killed.__enter__()
    assert place.left_staging() == [("a.b_c-d", "0123456789ab-2")]
    assert place.left_staging() == []
    killed.__exit__(None, None, None)
