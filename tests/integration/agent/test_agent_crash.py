"""Processes die: what was sealed by all is committed, what wasn't never is."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from agent_node import Node, until
from fake_trainer import ForkServer, check_part, complete_saves

from ckptstore.agent import client
from ckptstore.blob import open_blob_store
from ckptstore.clock import new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import TransientError
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier

pytestmark = pytest.mark.crash

KILLS = int(os.environ.get("CKPTSTORE_TEST_KILLS", "40"))
"""Random moments tried by each loop here; a nightly run may ask for more."""


def remote_tier(node: Node) -> RemoteTier:
    return RemoteTier(open_blob_store(node.remote), "run", "file")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def check_remote(node: Node, save_id: str) -> None:
    """The remote alone gives back the local directory, byte for byte."""
    tier = LocalTier(node.path / f"fresh-{new_nonce()}")
    tier.create()
    save = LocalTier(node.root).find("run", save_id)
    assert save is not None
    assert contents(pull(remote_tier(node), save_id, tier)) == contents(save.path)


def test_a_save_is_committed_and_uploaded_when_its_trainer_is_killed_after_the_seal(
    node: Node, forks: ForkServer
) -> None:
    remotes = {"file": node.remote}
    child = forks.start(root=str(node.root), saves=1, nonce="0123456789ab", remotes=remotes, die_when_sealed=True)
    forks.wait(child, "dying")
    save_id = "0123456789ab-1"
    until(lambda: save_id in {s.save_id for s in remote_tier(node).saves()})
    assert list(complete_saves(node.root)) == [save_id]
    check_remote(node, save_id)


def test_a_save_is_never_committed_when_its_trainer_is_killed_in_mid_copy(node: Node, forks: ForkServer) -> None:
    watcher = node.trainer(slot=0, ranks=2, nonce="0123456789ab")
    child = forks.start(root=str(node.root), slot=1, ranks=2, nonce="0123456789ab", saves=1, hang_at=1)
    pid = forks.wait(child, "filling", 1)["pid"]
    save_id = watcher.save(1)
    os.kill(pid, signal.SIGKILL)
    failed = watcher.wait("failed", save_id)
    assert (failed.data["level"], failed.data["error"], failed.data["rank"]) == ("staged", "SaveFailedError", 1)
    assert "rank 1 was lost" in failed.data["message"]  # noticed, not waited for
    assert complete_saves(node.root) == {}
    forks.wait(forks.start(root=str(node.root), slot=1, ranks=2, nonce="0123456789ac", saves=1), "attached")
    watcher.nonce = "0123456789ac"
    watcher.wait("local", watcher.save(1))
    assert list(complete_saves(node.root)) == ["0123456789ac-1"]


def test_a_late_seal_is_refused_when_a_rank_died_in_its_copy_of_that_save(node: Node, forks: ForkServer) -> None:
    watcher = node.trainer(slot=0, ranks=2, nonce="0123456789ab")
    child = forks.start(root=str(node.root), slot=1, ranks=2, nonce="0123456789ab", saves=1, hang_at=1)
    pid = forks.wait(child, "filling", 1)["pid"]
    generation = watcher.client.reserve(5)
    assert generation is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not watcher.client.status()["slots"][1]["is_attached"])
    with pytest.raises(Exception, match="lost"):
        watcher.client.seal(generation, watcher.request(1))
    assert complete_saves(node.root) == {}


def test_commits_are_whole_when_a_lone_trainer_is_killed_at_random_moments(node: Node, forks: ForkServer) -> None:
    """Each complete save holds exactly its own pattern, and only saves that were sealed are complete."""
    chance = random.Random(1)
    node.trainer(slot=1, ranks=2)  # keeps the agent, and with it the arena that is used again and again
    in_copy = 0
    for _ in range(KILLS):
        nonce = new_nonce()
        child = forks.start(root=str(node.root), nonce=nonce, saves=50, kib=1024)
        # From where the child is, not by the clock: on a busy machine it may not have moved for a long time.
        number = chance.randint(0, 4)
        pid = forks.wait(child, *(("filling", number) if number else ("attached",)))["pid"]
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
        begun = {line["number"] for line in forks.reported(child, "filling")}
        sealed = {line["number"] for line in forks.reported(child, "sealed")}
        in_copy += len(begun - sealed) > 0
        until(lambda: not node._trainers[0].client.status()["runs"]["run"]["saves"])
        complete = {int(save_id.split("-")[1]) for save_id in complete_saves(node.root) if save_id.startswith(nonce)}
        # It may have died between a seal and its word of it.
        assert sealed <= complete <= begun, (begun, sealed, complete)
        for save in LocalTier(node.root).saves("run"):
            LocalTier(node.root).delete("run", save.save_id)
    assert in_copy >= KILLS // 5, f"only {in_copy} of {KILLS} kills hit a copy: the test has lost its edge"


def test_saves_are_whole_or_absent_when_one_of_two_ranks_is_killed_at_random_moments(
    node: Node, forks: ForkServer
) -> None:
    chance = random.Random(2)
    for _ in range(KILLS // 2):
        nonce = new_nonce()
        children = [
            forks.start(root=str(node.root), nonce=nonce, slot=slot, ranks=2, saves=50, kib=512) for slot in (0, 1)
        ]
        pids = [forks.wait(child, "attached")["pid"] for child in children]
        time.sleep(chance.uniform(0.0, 0.06))
        chance.shuffle(pids)
        for pid in pids:
            with suppress(ProcessLookupError):  # the survivor ends by itself when it hears of the loss
                os.kill(pid, signal.SIGKILL)
            time.sleep(chance.choice([0.0, 0.01]))
        until(lambda pids=pids: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        sealed = [{line["number"] for line in forks.reported(child, "sealed")} for child in children]
        until(lambda: not _observed(node)["saves"])
        complete = {int(s.split("-")[1]) for s in complete_saves(node.root) if s.startswith(nonce)}
        assert complete <= {n + d for n in sealed[0] | {0} for d in (0, 1)} & {
            n + d for n in sealed[1] | {0} for d in (0, 1)
        }
        for save in LocalTier(node.root).saves("run"):
            LocalTier(node.root).delete("run", save.save_id)


def _observed(node: Node) -> dict[str, object]:
    from ckptstore.agent.client import AgentClient

    observer = AgentClient.observe(node.root)
    assert observer is not None
    try:
        run: dict[str, object] = observer.status()["runs"]["run"]
        return run
    finally:
        observer.close()


def test_the_client_hears_of_it_and_uploads_are_finished_by_a_new_agent_when_the_agent_is_killed(node: Node) -> None:
    (node.path / "bucket").rmdir()  # the remote is not there yet: the upload stays pending
    trainer = node.trainer(remotes={"file": node.remote})
    save_id = trainer.save(1)
    trainer.wait("local", save_id)
    failed = trainer.wait("failed", save_id)
    assert (failed.data["level"], failed.data["remote"], failed.data["error"]) == ("remote", "file", "NoStoreError")
    os.kill(trainer.client.agent_pid, signal.SIGKILL)
    trainer.wait("lost")
    with pytest.raises(TransientError):
        trainer.client.status()
    assert trainer.kinds().count("lost") == 1
    (node.path / "bucket").mkdir()
    again = node.trainer(remotes={"file": node.remote})
    assert again.client.agent_id != trainer.client.agent_id
    again.wait("remote", save_id)
    check_remote(node, save_id)
    second = again.save(1)
    again.wait("remote", second)


def test_every_commit_reaches_the_remote_when_the_agent_is_killed_again_and_again(node: Node) -> None:
    chance = random.Random(3)
    saved: list[str] = []
    for _ in range(max(4, KILLS // 12)):
        trainer = node.trainer(remotes={"file": node.remote}, kib=2048)
        save_id = trainer.save(1)
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(trainer.client.agent_pid, signal.SIGKILL)
        trainer.wait("lost")
        if "local" in trainer.kinds(save_id):
            saved.append(save_id)
        trainer.close()
    trainer = node.trainer(remotes={"file": node.remote}, kib=2048)
    assert trainer.client.drain(60)
    complete = complete_saves(node.root)
    assert set(saved) <= set(complete)
    assert {s.save_id for s in remote_tier(node).saves()} == set(complete)
    for save_id in complete:
        check_remote(node, save_id)
    for save in LocalTier(node.root).saves("run"):
        for rank in (0,):
            check_part(save.path, LocalTier(node.root).shard_manifest(save.path, rank))


def test_what_a_killed_agent_was_writing_is_removed_by_the_next(node: Node) -> None:
    process = node.sick_agent("slow", "30")
    trainer = node.trainer()
    save_id = trainer.save(1)
    until(lambda: (node.root / "run" / f".staging-{save_id}" / "__0_0.distcp").exists())
    process.kill()
    process.wait(10)
    foreign = node.root / "run" / ".staging-00000000aaaa-1"  # a restore in progress, say
    foreign.mkdir()
    again = node.trainer()
    assert [path.name for path in (node.root / "run").iterdir()] == [foreign.name]
    again.wait("local", again.save(1))


def test_no_call_waits_for_an_agent_that_hangs(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_TIMEOUT_S", 1.0)
    talker, listener = node.trainer(), node.trainer(ranks=3, slot=1)
    claimer = node.trainer(ranks=3, slot=2, config=StoreConfig(deadline_s=1))
    os.kill(talker.client.agent_pid, signal.SIGSTOP)
    try:
        with pytest.raises(TransientError):
            talker.client.discard(f"{new_nonce()}-1", "more than the socket holds" * 100_000)
        with pytest.raises(TransientError, match="within 1 s"):
            listener.client.release(0)
        with pytest.raises(TransientError, match="claim_timeline"):
            claimer.client.claim_timeline(1, {})
        for trainer in (talker, listener):
            trainer.wait("lost")
            with pytest.raises(TransientError, match="is gone"):
                trainer.client.discard(f"{new_nonce()}-1", "nobody is asked any more")
    finally:
        os.kill(talker.client.agent_pid, signal.SIGCONT)
    again = node.trainer()
    again.wait("local", again.save(1))


def test_a_trainer_gets_a_new_agent_when_the_root_was_replaced_under_the_old_one(node: Node) -> None:
    old = node.trainer()
    shutil.rmtree(node.root)
    again = node.trainer()
    assert again.client.agent_id != old.client.agent_id
    again.wait("local", again.save(1))
    assert len(complete_saves(node.root)) == 1
