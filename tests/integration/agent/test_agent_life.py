"""The agent process: one per root, small, private, inherits nothing, and leaves when it should."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from agent_node import Node, is_served, until
from fake_trainer import ForkServer, complete_saves

from ckptstore.agent import conversation
from ckptstore.agent.client import AgentClient
from ckptstore.agent.protocol import PROTOCOL, Channel
from ckptstore.agent.runtime import RuntimeDir, dial
from ckptstore.config import StoreConfig
from ckptstore.errors import CkptError, ConfigError, TransientError

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_one_agent_serves_all_when_many_trainers_start_at_once(node: Node, forks: ForkServer) -> None:
    node._roots.add(node.root)
    children = [forks.start(root=str(node.root), slot=slot, ranks=8, linger_s=20) for slot in range(8)]
    agents = {forks.wait(child, "attached")["agent_pid"] for child in children}
    assert len(agents) == 1
    assert agents == {node.agent_pid()}
    assert node.log().count(" of /") == 1, "a second agent was started"


def test_the_loser_leaves_with_its_own_exit_code_when_two_agents_race(node: Node) -> None:
    node._roots.add(node.root)
    command = [sys.executable, "-m", "ckptstore.agent", "--root", str(node.root), "--idle-exit-seconds", "20"]
    agents = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    try:
        loser = until(lambda: next((a for a in agents if a.poll() is not None), None))
        assert loser.returncode == 11
        until(lambda: is_served(node.root))
        winner = next(a for a in agents if a is not loser)
        assert winner.poll() is None
    finally:
        for agent in agents:
            agent.terminate()
            agent.communicate(timeout=30)
    assert winner.returncode == 0


def test_starting_is_quick_and_idling_is_small(node: Node) -> None:
    begun = time.monotonic()
    trainer = node.trainer(remotes={"file": node.remote})
    took = time.monotonic() - begun
    trainer.wait("remote", trainer.save(1))
    process = psutil.Process(trainer.client.agent_pid)
    rss = trainer.client.status()["rss_bytes"]
    assert rss["own"] + rss["files"] < 80e6, rss
    assert process.nice() == 19
    assert process.ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert process.ppid() != os.getpid(), "the agent is the trainer's child: it would be a zombie one day"
    assert os.getsid(process.pid) != os.getsid(0)
    assert process.cwd() == "/"
    assert took < 5, took  # 0.3 s on an idle machine
    modules = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in modules


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs to use only one of them")
def test_the_agent_keeps_to_its_cpu_budget(node: Node) -> None:
    one = node.trainer(config=StoreConfig(agent_cpus=1))
    one.wait("local", one.save(1))
    threads = [int(thread) for thread in os.listdir(f"/proc/{one.client.agent_pid}/task")]
    assert {len(os.sched_getaffinity(thread)) for thread in threads} == {1}
    node.trainer()
    assert os.sched_getaffinity(one.client.agent_pid) == os.sched_getaffinity(0)


def test_nothing_of_the_trainer_is_inherited(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_TOKEN", SECRET)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        trainer = node.trainer(environ={"AWS_SECRET_ACCESS_KEY": SECRET}, remotes={"file": node.remote})
        trainer.wait("remote", trainer.save(1))
        pid = trainer.client.agent_pid
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert SECRET.encode() not in environ
        assert b"MY_TOKEN" not in environ
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        pipe = Path(f"/proc/self/fd/{writer}").readlink()
        links = {fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert pipe not in links
        assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
        assert Path(f"/proc/{pid}/fd/1").readlink() == node.runtime().log
    finally:
        os.close(reader)
        os.close(writer)


def test_no_secret_is_logged_or_shown_when_uploads_fail(node: Node) -> None:
    url = "s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=us-east-1"
    environ = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}
    trainer = node.trainer(remotes={"s3": url, "bad": "nope://x"}, environ=environ)
    save_id = trainer.save(1)
    trainer.wait("local", save_id)
    failed = trainer.wait("failed", save_id)
    assert (failed.data["remote"], failed.data["error"]) == ("bad", "ConfigError")
    status = trainer.client.status()
    assert [u["save_id"] for u in status["runs"]["run"]["remotes"]["s3"]["queue"]] == [save_id]
    with pytest.raises(CkptError):
        trainer.client._call("attach", run="run", slot="x", environ={"K": SECRET}, remotes={}, config={})
    everything = node.log() + json.dumps(status) + repr(trainer.events)
    assert SECRET not in everything


def test_the_trainers_stdout_pipe_is_not_held_when_it_ends(node: Node) -> None:
    node._roots.add(node.root)
    code = f"""
        from pathlib import Path
        from ckptstore.agent.client import AgentClient
        from ckptstore.config import StoreConfig
        AgentClient.connect(Path({str(node.root)!r}), run="run", slot=0, remotes={{}}, environ={{}},
                            config=StoreConfig(), on_event=print)
        print("attached", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "attached\n"
    assert node.agent_pid() is not None, "the agent must outlive its trainer"


def test_it_leaves_when_idle_and_stays_while_a_trainer_is_attached(node: Node) -> None:
    trainer = node.trainer(config=StoreConfig(agent_idle_exit_seconds=0.5))
    pid = trainer.client.agent_pid
    time.sleep(2)
    assert not is_gone(pid)
    trainer.wait("local", trainer.save(1))
    trainer.close()
    until(lambda: is_gone(pid), 20)
    assert not node.runtime().socket.exists()
    assert AgentClient.observe(node.root) is None
    again = node.trainer()
    assert again.client.agent_pid != pid


def test_it_leaves_within_ten_seconds_when_its_root_is_gone(node: Node) -> None:
    trainer = node.trainer()
    trainer.wait("local", trainer.save(1))
    pid = trainer.client.agent_pid
    shutil.rmtree(node.root)
    until(lambda: is_gone(pid), 10)
    trainer.wait("lost")
    assert not node.root.exists(), "the root was raised from the dead"


def test_it_is_found_again_when_somebody_removed_its_socket_or_runtime_directory(node: Node) -> None:
    trainer = node.trainer()
    runtime = node.runtime()
    for number, remove in enumerate((runtime.socket.unlink, lambda: shutil.rmtree(runtime.path)), start=1):
        remove()
        until(lambda: is_served(node.root))
        assert node.trainer(ranks=3, slot=number).client.agent_id == trainer.client.agent_id
    assert node.agent_pid() == trainer.client.agent_pid, "the lock of the new directory is its own"
    trainer.wait("local", trainer.save(1))


def test_it_leaves_when_another_directory_has_its_roots_name(node: Node) -> None:
    trainer = node.trainer()
    pid = trainer.client.agent_pid
    node.root.rename(node.path / "elsewhere")
    node.root.mkdir()
    until(lambda: is_gone(pid), 10)


def test_open_work_is_finished_when_it_is_told_to_leave(node: Node) -> None:
    process = node.sick_agent("slow", "1.0")
    trainer = node.trainer(remotes={"file": node.remote})
    save_id = trainer.save(1)
    trainer.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert list(complete_saves(node.root)) == [save_id]
    assert list((node.path / "bucket").rglob(f"*{save_id}.json"))


def test_it_does_not_wait_longer_when_told_to_leave_twice(node: Node) -> None:
    process = node.sick_agent("slow", "30")
    trainer = node.trainer()
    trainer.save(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    trainer.wait("lost")
    assert complete_saves(node.root) == {}


def test_stop_waits_for_work_and_drain_says_whether_all_is_safe(node: Node) -> None:
    trainer = node.trainer(remotes={"file": node.remote})
    save_id = trainer.save(1)
    assert trainer.client.drain(60)
    assert [e.kind for e in trainer.events if e.save_id == save_id] == ["sealed", "local", "remote"]
    observer = AgentClient.observe(node.root)
    assert observer is not None
    observer.settle("run", 5)
    assert observer.stop(20)
    trainer.wait("lost")
    until(lambda: is_gone(observer.agent_pid))


def test_drain_does_not_wait_for_what_cannot_happen(node: Node) -> None:
    (node.path / "bucket").rmdir()
    trainer = node.trainer(remotes={"file": node.remote})
    trainer.wait("failed", trainer.save(1))
    begun = time.monotonic()
    assert not trainer.client.drain(60)
    assert time.monotonic() - begun < 20


def test_looking_starts_nothing(node: Node) -> None:
    assert AgentClient.observe(node.root) is None
    assert not node.root.exists()
    assert not node.runtime().path.exists()


def test_a_forked_child_owns_nothing_of_its_parents_connection(node: Node) -> None:
    trainer = node.trainer()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        try:
            trainer.client.status()
        except TransientError as error:
            results.put(str(error))
        trainer.client.close()

    process = context.Process(target=child)
    process.start()
    assert "parent process" in results.get()
    process.join(20)
    assert process.exitcode == 0
    trainer.wait("local", trainer.save(1))
    assert "lost" not in trainer.kinds()


def test_the_loss_of_a_trainer_is_noticed_when_a_child_of_it_lives_on(node: Node, forks: ForkServer) -> None:
    """A library may fork in C, where no hook closes our descriptor."""
    code = f"""
        import ctypes, os, time
        from pathlib import Path
        from ckptstore.agent.client import AgentClient
        from ckptstore.config import StoreConfig
        AgentClient.connect(Path({str(node.root)!r}), run="run", slot=1, remotes={{}}, environ={{}},
                            config=StoreConfig(), on_event=print, rank=1)
        child = ctypes.CDLL(None).fork()
        if child:
            print(child, flush=True)
        time.sleep(60)
    """
    watcher = node.trainer(slot=0, ranks=2)
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        save_id = watcher.save(1)
        process.kill()
        process.wait(10)
        assert "rank 1 was lost" in watcher.wait("failed", save_id).data["message"]
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_another_protocol_is_a_clear_error_and_an_idle_old_agent_makes_room(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = node.trainer()
    pid = old.client.agent_pid
    monkeypatch.setattr(conversation, "PROTOCOL", PROTOCOL + 1)  # we are the newer trainer now
    with pytest.raises(CkptError) as busy:
        node.trainer()
    assert "agent" in str(busy.value)
    with pytest.raises(ConfigError, match=f"speaks protocol {PROTOCOL}, not {PROTOCOL + 1}"):
        AgentClient.observe(node.root)
    old.close()
    config = StoreConfig(agent_start_timeout_s=2.0)
    with pytest.raises(CkptError):
        node.trainer(config=config)  # a new one is started, which is of the old protocol again
    assert is_gone(pid)


def test_garbage_on_the_socket_harms_nobody(node: Node) -> None:
    trainer = node.trainer()
    for garbage in (b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"GET / HTTP/1.1\r\n\r\n", b"\0\0"):
        sock = dial(node.runtime().socket)
        assert sock is not None
        with sock:
            sock.settimeout(10)
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    sock = dial(node.runtime().socket)
    assert sock is not None
    channel = Channel(sock, accept_fds=False)
    for request in ({"op": "status"}, {"op": "no"}, {}, {"op": "__init__"}):
        channel.send({"id": 1, **request})
        received = channel.receive()
        assert received is not None
        assert received[0]["error"]["class"] == "ConfigError"
    channel.close()
    trainer.wait("local", trainer.save(1))


def test_a_runtime_directory_of_somebody_else_is_refused(node: Node) -> None:
    base = node.path / "run" / "ckptstore"
    base.mkdir(mode=0o755)
    base.chmod(0o755)
    with pytest.raises(ConfigError, match="not a private directory"):
        node.trainer()


def test_long_paths_work(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = node.path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    trainer = node.trainer()
    assert len(str(RuntimeDir.of(node.root).socket)) > 200
    trainer.wait("local", trainer.save(1))


def test_roots_have_agents_of_their_own_and_runs_share_one(node: Node) -> None:
    first, second = node.trainer(run="a"), node.trainer(run="b")
    other = node.trainer(node.path / "other")
    assert first.client.agent_id == second.client.agent_id != other.client.agent_id
    for trainer in (first, second, other):
        trainer.wait("local", trainer.save(1))
    assert len(complete_saves(node.root, "a")) == len(complete_saves(node.root, "b")) == 1


def test_calls_from_many_threads_are_answered(node: Node) -> None:
    trainer = node.trainer()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert trainer.client.status()["agent_id"] == trainer.client.agent_id
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    trainer.wait("local", trainer.save(1))
    for thread in threads:
        thread.join(60)
    assert errors == []
