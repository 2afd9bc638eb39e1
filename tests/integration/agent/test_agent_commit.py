"""From sealed memory to a commit: what is on disk is what was copied, or nothing is."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from agent_node import Node, until
from fake_trainer import check_part, complete_saves, pieces_of, spec

from ckptstore.config import StoreConfig
from ckptstore.errors import LockedError, NoSpaceError, SaveFailedError
from ckptstore.format.manifest import ShardManifest, root_of
from ckptstore.repo.local import LocalTier


def test_every_byte_is_what_was_copied_when_two_ranks_seal(node: Node) -> None:
    ranks = [node.trainer(slot=slot, ranks=2, nonce="0123456789ab") for slot in (0, 1)]
    for number in (1, 2, 3):
        for trainer in ranks:
            trainer.save(number)
    for number in (1, 2, 3):
        save_id = ranks[0].save_id(number)
        for trainer in ranks:
            assert trainer.wait("local", save_id).data["summary"]["step"] == number
            assert trainer.kinds(save_id)[:2] == ["sealed", "local"]
    saves = complete_saves(node.root)
    assert [(m.summary.step, len(m.shards)) for m in saves.values()] == [(1, 2), (2, 2), (3, 2)]
    newest = next(s.path for s in LocalTier(node.root).saves("run") if s.step == 3)
    shards = {f"__{rank}_0.distcp" for rank in (0, 1)} | {f"shard-0000{rank}.json" for rank in (0, 1)}
    assert {p.name for p in newest.iterdir()} == shards | {".metadata", "manifest.json", "summary.json"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in [newest, *newest.iterdir()])


def test_a_rank_without_pieces_is_part_of_the_commit(node: Node) -> None:
    ranks = [node.trainer(slot=slot, ranks=2, nonce="0123456789ab") for slot in (0, 1)]
    ranks[1].pieces = []
    ranks[1].arena = ranks[1].client.layout([])
    for trainer in ranks:
        trainer.save(1)
    ranks[0].wait("local", ranks[0].save_id(1))
    assert len(complete_saves(node.root)) == 1


def test_nothing_is_committed_when_one_rank_has_not_sealed(node: Node) -> None:
    ranks = [node.trainer(slot=slot, ranks=2, nonce="0123456789ab") for slot in (0, 1)]
    ranks[0].save(1)
    generation = ranks[1].client.reserve(5)
    assert generation is not None
    ranks[1].fill(1, generation)
    status = ranks[0].client.status()
    assert status["runs"]["run"]["saves"] == [
        {"save_id": ranks[0].save_id(1), "step": 1, "stage": "gathering", "ranks_missing": [1]}
    ]
    assert complete_saves(node.root) == {}
    ranks[1].client.seal(generation, ranks[1].request(1))
    ranks[0].wait("local", ranks[0].save_id(1))


def test_a_save_fails_for_all_and_the_next_works_when_a_rank_is_too_late(node: Node) -> None:
    config = StoreConfig(deadline_s=0.5)
    ranks = [node.trainer(slot=slot, ranks=2, nonce="0123456789ab", config=config) for slot in (0, 1)]
    save_id = ranks[0].save(1)
    generation = ranks[1].client.reserve(5)
    assert generation is not None
    for trainer in ranks:
        failed = trainer.wait("failed", save_id)
        assert (failed.data["level"], failed.data["rank"]) == ("staged", 1)
        assert isinstance(failed.exception(), SaveFailedError)
    with pytest.raises(SaveFailedError, match="rank 1"):
        ranks[1].client.seal(generation, ranks[1].request(1))
    for trainer in ranks:
        trainer.save(2)
    ranks[0].wait("local", ranks[0].save_id(2))
    assert list(complete_saves(node.root)) == [ranks[0].save_id(2)]


def test_the_second_generation_is_filled_when_the_first_is_still_being_written(node: Node) -> None:
    node.sick_agent("slow", "1.0")
    trainer = node.trainer()
    first, second = trainer.save(1), trainer.save(2)
    assert "local" not in trainer.kinds(first)
    assert trainer.client.reserve(0.1) is None  # both are busy
    trainer.wait("local", first)
    third = trainer.save(3)
    for save_id in (second, third):
        trainer.wait("local", save_id)
    assert list(complete_saves(node.root)) == [first, second, third]


def test_a_new_layout_waits_for_the_old_saves_and_leaves_no_old_bytes(node: Node) -> None:
    node.sick_agent("slow", "0.5")
    trainer = node.trainer(kib=512)
    first = trainer.save(1)
    for kib, number in ((64, 2), (700, 3), (699, 4)):
        trainer.pieces = [spec("odd", "int8", 12345), *pieces_of(0, kib)]
        trainer.arena = trainer.client.layout(trainer.pieces)
        trainer.save(number)
    trainer.wait("local", trainer.save_id(4))
    assert len(complete_saves(node.root)) == 4
    assert first in complete_saves(node.root)


def test_a_released_generation_is_free_again(node: Node) -> None:
    trainer = node.trainer(config=StoreConfig(generations=1))
    assert len(trainer.arena.generations) == 1
    for _ in range(3):
        generation = trainer.client.reserve(5)
        assert generation == 0
        assert trainer.client.reserve(0.05) is None
        trainer.client.release(generation)
    with pytest.raises(LockedError):
        trainer.client.seal(0, trainer.request(1))


def test_a_discarded_save_leaves_nothing(node: Node) -> None:
    node.sick_agent("slow", "0.5")
    trainer = node.trainer()
    save_id = trainer.save(1)
    assert trainer.client.discard(save_id, "another node has failed")
    failed = trainer.wait("failed", save_id)
    assert failed.data["message"] == "another node has failed"
    assert complete_saves(node.root) == {}
    assert [p.name for p in (node.root / "run").iterdir() if "step" in p.name or "staging" in p.name] == []
    second = trainer.save(2)
    trainer.wait("local", second)
    assert not trainer.client.discard(second, "too late")
    assert list(complete_saves(node.root)) == [second]


@pytest.mark.parametrize(
    ("number", "count", "name"), [(errno.ENOSPC, 1, "NoSpaceError"), (errno.EROFS, 1, "StorageError")]
)
def test_a_failed_write_is_cleaned_up_and_the_next_save_works(node: Node, number: int, count: int, name: str) -> None:
    node.sick_agent("fail", str(int(number)), str(count))
    trainer = node.trainer()
    save_id = trainer.save(1)
    failed = trainer.wait("failed", save_id)
    assert (failed.data["level"], failed.data["error"]) == ("local", name)
    assert failed.data["errno"] == errno.errorcode[number]
    assert errno.errorcode[number] in failed.data["message"]
    assert [p.name for p in (node.root / "run").iterdir()] == []
    second = trainer.save(2)
    trainer.wait("local", second)
    assert list(complete_saves(node.root)) == [second]


def test_an_io_error_is_survived_when_writing_again_works(node: Node) -> None:
    node.sick_agent("fail", str(int(errno.EIO)), "1")
    trainer = node.trainer()
    save_id = trainer.save(1)
    trainer.wait("local", save_id)
    assert list(complete_saves(node.root)) == [save_id]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_is_named_and_saving_goes_on_when_there_is_room(node: Node) -> None:
    disk = node.path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=True)
    try:
        trainer = node.trainer(disk / "root", kib=1024)  # 1.5 MiB: one fits, two don't
        first = trainer.save(1)
        trainer.wait("local", first)
        second = trainer.save(2)
        failed = trainer.wait("failed", second)
        assert (failed.data["error"], failed.data["errno"]) == ("NoSpaceError", "ENOSPC")
        assert list(complete_saves(disk / "root")) == [first]
        LocalTier(disk / "root").delete("run", first)
        third = trainer.save(3)
        trainer.wait("local", third)
        assert list(complete_saves(disk / "root")) == [third]
        trainer.client.stop(10)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_prepared_parts_become_complete_when_all_nodes_are_prepared(node: Node) -> None:
    roots = [node.path / "node0", node.path / "node1"]
    nodes = [
        node.trainer(roots[i], ranks=2, local_ranks=[i], node=i, num_nodes=2, nonce="0123456789ab") for i in (0, 1)
    ]
    assert nodes[0].client.agent_id != nodes[1].client.agent_id
    save_id = nodes[0].save_id(1)
    shards = []
    for trainer in nodes:
        trainer.save(1)
        shards += [ShardManifest.model_validate(s) for s in trainer.wait("prepared", save_id).data["shards"]]
    assert all(complete_saves(root) == {} for root in roots)
    root = root_of(shards)
    for trainer in nodes:
        trainer.client.announce(save_id, "staged")
        trainer.client.complete(save_id, root.encode())
        trainer.client.complete(save_id, root.encode())
        assert trainer.wait("announced", save_id).data == {"level": "staged"}
        assert trainer.wait("local", save_id).data["summary"]["num_nodes"] == 2
    for path, rank in zip(roots, (0, 1), strict=True):
        tier = LocalTier(path)
        [save] = tier.saves("run")
        assert tier.root_manifest("run", save) == root
        check_part(save.path, tier.shard_manifest(save.path, root.shards[rank]))
    assert not nodes[0].client.discard(save_id, "too late")


def test_a_prepared_part_goes_when_it_is_discarded(node: Node) -> None:
    trainer = node.trainer(ranks=2, local_ranks=[0], num_nodes=2)
    save_id = trainer.save(1)
    trainer.wait("prepared", save_id)
    assert trainer.client.discard(save_id, "node 1 was lost")
    assert LocalTier(node.root).saves("run") == []


def test_each_claimed_timeline_is_a_new_one(node: Node) -> None:
    trainer = node.trainer()
    assert trainer.client.claim_timeline(1, {"job": "a"}) == 1
    assert trainer.client.claim_timeline(1, b'{"job":"b"}') == 2
    assert trainer.client.claim_timeline(7, {"job": "a"}) == 7
    tier = LocalTier(node.root)
    assert tier.timelines("run") == [1, 2, 7]
    assert tier.timeline_record("run", 7) == b'{"job":"a","timeline":7}'
    assert tier.timeline_record("run", 2) == b'{"job":"b"}'


def test_the_newer_store_takes_over_when_two_use_one_slot(node: Node) -> None:
    old = node.trainer()
    generation = old.client.reserve(5)
    assert generation is not None
    new = node.trainer()
    with pytest.raises(LockedError, match="taken over"):
        old.client.seal(generation, old.request(1))
    for index in range(len(old.arena.generations)):
        old.arena.generations[index][:] = b"\xff" * len(old.arena.generations[index])
    save_id = new.save(1)
    old.fill(1, generation)  # it may still be in the middle of a copy: into its own memory
    new.wait("local", save_id)
    assert list(complete_saves(node.root)) == [save_id]


def test_a_restarted_rank_gets_its_memory_back(node: Node) -> None:
    first = node.trainer()
    save_id = first.save(1)
    first.wait("local", save_id)
    before = first.client.status()["slots"]
    first.close()
    second = node.trainer()
    assert second.client.status()["slots"] == before
    second.save(1)
    second.wait("local", second.save_id(1))
    assert len(complete_saves(node.root)) == 2


def test_a_layout_larger_than_memory_is_refused_naming_the_bytes(node: Node) -> None:
    from ckptstore.errors import NoSpaceError

    trainer = node.trainer()
    with pytest.raises(NoSpaceError, match="staging needs 1099511") as info:
        trainer.client.layout([spec("huge", "float32", 1 << 38)])
    assert info.value.context["needed_bytes"] >= 1 << 40
    trainer.arena = trainer.client.layout(trainer.pieces[:1])
    trainer.pieces = trainer.pieces[:1]
    trainer.wait("local", trainer.save(1))


def test_saves_go_through_the_disk_when_memory_is_short(node: Node) -> None:
    node.sick_agent("poor")
    trainer = node.trainer()
    assert trainer.arena.is_on_disk
    save_ids = [trainer.save(step) for step in (1, 2)]
    for save_id in save_ids:
        trainer.wait("local", save_id)
    assert list(complete_saves(node.root)) == save_ids
    [slot] = trainer.client.status()["slots"]
    assert [generation["is_on_disk"] for generation in slot["generations"]] == [True]
    with pytest.raises(NoSpaceError, match="on disk: not wanted"):
        node.trainer(config=StoreConfig(stage_on_disk=False))


def test_stale_staging_is_swept_and_a_live_one_is_not(node: Node) -> None:
    tier = LocalTier(node.root)
    tier.create()
    stale, live = (Path(tier.make_run("run")) / f".staging-{nonce}-1" for nonce in ("00000000aaaa", "00000000bbbb"))
    for path in (stale, live):
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"x")
    old = 1_000_000_000
    for path in (stale / "__0_0.distcp", stale):
        os.utime(path, (old, old))
    node.trainer()
    until(lambda: not stale.exists())
    assert live.exists()
