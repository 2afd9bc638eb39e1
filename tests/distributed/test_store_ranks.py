"""The store under several ranks: one node, two simulated nodes, deaths at the moments that matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ranks import DEAD, run_ranks
from store_jobs import (
    die,
    different_step,
    fetch_on_nodes,
    go_on_on_nodes,
    latest,
    load,
    load_and_fetch,
    load_each,
    load_from,
    load_from_a_dying_remote,
    load_on_nodes,
    load_with_trouble,
    refuse_on_one_rank,
    save,
    save_in_turn,
    save_many,
    save_on_a_shared_root,
    save_on_nodes,
    stock_calls,
)

from ckptstore import CheckpointStore
from ckptstore.format.manifest import ShardManifest
from ckptstore.ops.open import open_place
from ckptstore.ops.repair import repair
from ckptstore.ops.verify import Depth, verify
from ckptstore.repo.packs import chunks_of


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


def test_values_are_those_of_the_global_state_when_loaded_at_other_world_sizes(tmp_path: Path, bucket: str) -> None:
    root = str(tmp_path / "store")
    (expected, step, tiers), (other, *_) = run_ranks(2, save, "fsdp", root, bucket, "remote")
    assert (step, tiers) == (10, {"local": "complete", "file": "complete"})
    assert other == expected
    for world_size, kind in ((1, "plain"), (3, "fsdp"), (2, "ddp")):
        for rank, result in enumerate(run_ranks(world_size, load, kind, root, bucket)):
            digest, epoch, mine, sources = result
            assert (digest, epoch, mine) == (expected, 3, rank % 2)
            assert set(sources) == {"local"}


def test_missing_shards_come_from_the_remote_when_the_rest_is_local(tmp_path: Path, bucket: str) -> None:
    root = str(tmp_path / "store")
    (expected, *_), _ = run_ranks(2, save, "fsdp", root, bucket, "remote")
    next(Path(root).rglob("__1_0.distcp")).unlink()
    sources = set()
    for digest, epoch, _, by_source in run_ranks(3, load, "fsdp", root, bucket):
        assert (digest, epoch) == (expected, 3)
        sources |= set(by_source)
    assert sources == {"local", "file", "peer"}, "what the remote gave to one rank of the node came to the others too"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_byte_is_fetched_once_when_four_ranks_share_a_fresh_node(tmp_path: Path, bucket: str, kind: str) -> None:
    (expected, *_), _ = run_ranks(2, save, "fsdp", str(tmp_path / "store"), bucket, "remote")
    results = run_ranks(4, load_and_fetch, kind, bucket)
    assert [digest for digest, *_ in results] == [expected] * 4
    fetched = sum(sources.get("file", 0) for _, sources, _ in results)
    assert fetched == results[0][2]
    assert sum(sources.get("peer", 0) for _, sources, _ in results) > 0


def damage(file: Path) -> int:
    """Flip a bit in every chunk of a shard file; the bytes of those chunks."""
    manifest = ShardManifest.decode((file.parent / "shard-00000.json").read_bytes(), what="shard")
    chunks = [chunk for row in chunks_of(manifest) for chunk in row if chunk.size_bytes]
    data = bytearray(file.read_bytes())
    for chunk in chunks:
        data[chunk.offset] ^= 1
    file.write_bytes(data)
    return sum(chunk.size_bytes for chunk in chunks)


def test_damaged_bytes_are_fetched_and_put_right_once_when_four_ranks_share_a_node(tmp_path: Path, bucket: str) -> None:
    roots = {kind: tmp_path / kind for kind in ("ddp", "fsdp")}
    (expected, *_), _ = run_ranks(2, save, "fsdp", str(roots["ddp"]), bucket, "remote")
    shutil.copytree(roots["ddp"], roots["fsdp"])
    files = {kind: next(root.rglob("__0_0.distcp")) for kind, root in roots.items()}
    was = files["ddp"].read_bytes()
    damaged_bytes = damage(files["ddp"])
    damage(files["fsdp"])
    results = run_ranks(4, load_each, {kind: str(root) for kind, root in roots.items()}, bucket)
    for kind, file in files.items():
        assert [result[kind][0] for result in results] == [expected] * 4
        assert sum(result[kind][-1].get("file", 0) for result in results) == damaged_bytes
        assert file.read_bytes() == was


def test_ddp_replicas_are_stored_once(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (expected, *_), _ = run_ranks(2, save, "ddp", str(root), None)
    info = CheckpointStore(root).latest()
    assert info is not None
    parameters = 33 * 65 + 65 + 65 * 65 + 65 + 65 * 7
    assert info.size_bytes == parameters * 4 * 3 + 5 * 4
    digest, *_ = run_ranks(1, load, "plain", str(root), None)[0]
    assert digest == expected


def test_structures_in_turn_cost_two_small_agreements_also_when_the_agent_is_replaced(tmp_path: Path) -> None:
    for calls, *is_as_saved in run_ranks(2, save_in_turn, str(tmp_path / "store")):
        assert calls == [2] * 6, "one for the save, one for the arena"
        assert all(is_as_saved)


def test_every_rank_is_told_the_key_when_one_can_not_store_its_value(tmp_path: Path) -> None:
    for (error, message), steps in run_ranks(2, refuse_on_one_rank, str(tmp_path / "store")):
        assert error == "StateError"
        assert "rank 1" in message
        assert "extra.hook" in message
        assert steps == [2]


def test_all_ranks_fail_when_they_save_different_steps(tmp_path: Path) -> None:
    for result in run_ranks(2, different_step, str(tmp_path / "store")):
        assert type(result).__name__ == "SaveFailedError"
        assert "different steps" in str(result)


def test_stock_save_and_load_of_sharded_models_go_through_the_store(tmp_path: Path) -> None:
    assert run_ranks(2, stock_calls, str(tmp_path / "store")) == [(True, 3, [10])] * 2


def test_a_load_may_take_longer_than_the_deadline_when_all_ranks_are_alive(tmp_path: Path) -> None:
    (expected, *_), _ = run_ranks(2, save, "fsdp", str(tmp_path), None)
    assert run_ranks(2, load_with_trouble, str(tmp_path), "slow") == [expected] * 2


def test_a_remote_that_dies_while_loading_is_not_asked_for_every_chunk(tmp_path: Path, bucket: str) -> None:
    run_ranks(1, save_many, str(tmp_path), bucket)
    for result in run_ranks(2, load_from_a_dying_remote, bucket):
        message, asked = result
        assert "answers no more" in message
        assert asked < 50, "of 200 chunks; each time may mean minutes of trying again"


def test_a_rank_that_dies_while_loading_is_named(tmp_path: Path) -> None:
    run_ranks(2, save, "fsdp", str(tmp_path), None)
    survivor, dead = run_ranks(2, load_with_trouble, str(tmp_path), "dies")
    assert dead == DEAD
    assert type(survivor).__name__ == "SaveFailedError", survivor
    assert "rank 1" in str(survivor)


class TestTwoNodes:
    """Two roots, two agents: prepared, then complete."""

    def test_nodes_that_share_a_root_are_told_so_before_anything_is_written(self, tmp_path: Path) -> None:
        root = tmp_path / "shared"
        for error in run_ranks(2, save_on_a_shared_root, str(root), str(tmp_path / "runtime")):
            assert type(error).__name__ == "ConfigError", error
            assert f"nodes 0, 1 share the local root {root}" in str(error)
            assert "give each node one of its own" in error.hint
        assert not list(root.glob("*/step-*"))
        assert not list(root.glob(".node-*"))

    def test_each_node_holds_its_part_and_the_same_commit(self, tmp_path: Path) -> None:
        root = str(tmp_path)
        (expected, _, tiers), _ = run_ranks(2, save_on_nodes, root, None)
        assert tiers == {"local": "complete"}
        commits = [next((tmp_path / f"node-{n}").rglob("manifest.json")).read_bytes() for n in (0, 1)]
        assert commits[0] == commits[1]
        assert not list((tmp_path / "node-0").rglob("__1_0.distcp"))
        for rank, (digest, epoch, mine, sources) in enumerate(run_ranks(2, load_on_nodes, root, None)):
            assert (digest, epoch, mine) == (expected, 3, rank)
            assert sources.get("peer", 0) < 64 < sources["local"], "only replicated scalars come from the other node"

    @pytest.mark.parametrize(
        ("kind", "nodes"),
        [
            pytest.param("fsdp", [1, 0], id="swapped nodes"),
            pytest.param("fsdp", [0, 1, 2], id="one node more"),
            pytest.param("fsdp", [2, 1, 0, 1], id="a new node first, and two ranks on another"),
            pytest.param("ddp", [1, 0, 2], id="everybody wants everything"),
        ],
    )
    def test_state_is_the_same_when_the_job_starts_on_other_nodes(
        self, tmp_path: Path, kind: str, nodes: list[int]
    ) -> None:
        (expected, *_), _ = run_ranks(2, save_on_nodes, str(tmp_path), None)
        roots = [str(tmp_path / f"node-{node}") for node in nodes]
        sources = set()
        for rank, result in enumerate(run_ranks(len(nodes), load_from, kind, roots, None)):
            digest, epoch, mine, by_source = result
            assert (digest, epoch, mine) == (expected, 3, rank % 2)
            sources |= set(by_source)
        assert "peer" in sources

    def test_missing_part_is_named_when_its_node_is_not_in_the_job(self, tmp_path: Path) -> None:
        run_ranks(2, save_on_nodes, str(tmp_path), None)
        for result in run_ranks(1, load_from, "plain", [str(tmp_path / "node-0")], None):
            assert type(result).__name__ == "IncompleteCheckpointError", result
            assert "rank 1" in str(result)
            assert "node 1" in str(result)

    def test_peers_damaged_copy_is_refused_and_named_when_there_is_no_other(self, tmp_path: Path) -> None:
        run_ranks(2, save_on_nodes, str(tmp_path), None)
        file = next((tmp_path / "node-1").rglob("__1_0.distcp"))
        manifest = ShardManifest.decode((file.parent / "shard-00001.json").read_bytes(), what="shard")
        piece = next(p for p in manifest.pieces if p.fqn == "model.0.weight")
        data = bytearray(file.read_bytes())
        data[piece.start] ^= 1
        file.write_bytes(data)
        for result in run_ranks(2, load_from, "fsdp", [str(tmp_path / f"node-{n}") for n in (1, 0)], None):
            assert type(result).__name__ == "IntegrityError", result
            assert "model.0.weight" in str(result)

    def test_damaged_copy_is_put_right_from_another_nodes_when_there_is_no_remote(self, tmp_path: Path) -> None:
        roots = [str(tmp_path / f"node-{node}") for node in (0, 1)]
        ((expected, *_),) = run_ranks(1, save, "plain", roots[0], None)
        shutil.copytree(roots[0], roots[1])
        file = next(Path(roots[0]).rglob("__0_0.distcp"))
        was = file.read_bytes()
        damaged_bytes = damage(file)
        results = run_ranks(3, load_from, "ddp", [roots[0], roots[0], roots[1]], None)
        assert [digest for digest, *_ in results] == [expected] * 3
        taken = [sources.get("peer", 0) for *_, sources in results]
        assert taken == [damaged_bytes, damaged_bytes, 0]
        assert file.read_bytes() == was

    def test_lost_file_is_brought_back_by_its_own_node_and_by_verify(self, tmp_path: Path, bucket: str) -> None:
        root, here = str(tmp_path), tmp_path / "node-1"
        (expected, *_), _ = run_ranks(2, save_on_nodes, root, bucket, "remote")
        lost = next(here.rglob("__1_0.distcp"))
        was = lost.read_bytes()
        lost.unlink()
        assert run_ranks(2, go_on_on_nodes, root, bucket, str(lost), was) == [(expected, True)] * 2
        assert not list(here.rglob("__0_0.distcp")), "the other node's part stays there"

        lost.unlink()
        tiers = open_place(str(here), bucket).tiers("default")
        found = verify(tiers, "10", everything=False, read_data=True)
        assert [finding.what for finding in found.findings] == ["__1_0.distcp is missing"]
        done = repair(tiers, found, Depth(read_data=True))
        assert (done.reasons, done.aside) == ([], [])
        assert [finding.is_repaired for finding in found.findings] == [True]
        assert lost.read_bytes() == was
        assert not list(here.rglob("__0_0.distcp"))

    def test_lost_root_is_made_good_from_the_remote(self, tmp_path: Path, bucket: str) -> None:
        root = str(tmp_path)
        (expected, *_), _ = run_ranks(2, save_on_nodes, root, bucket, "remote")
        shutil.rmtree(tmp_path / "node-1")
        for digest, epoch, _, _ in run_ranks(2, load_on_nodes, root, bucket):
            assert (digest, epoch) == (expected, 3)

    def test_replicas_are_fetched_once_per_node_or_once_per_job_as_asked(self, tmp_path: Path, bucket: str) -> None:
        (expected, *_), _ = run_ranks(2, save, "fsdp", str(tmp_path / "saved"), bucket, "remote")
        results = run_ranks(4, fetch_on_nodes, str(tmp_path), bucket, 2)
        for kind in ("ddp", "hsdp"):
            for fetch_once, times in (("per_node", 2), ("per_job", 1)):
                each = [result[kind, fetch_once] for result in results]
                assert [digest for digest, *_ in each] == [expected] * 4
                size = each[0][2]
                assert sum(fetched for _, fetched, _ in each) == times * size, (kind, fetch_once, each)

    @pytest.mark.parametrize("moment", ["between seals", "between prepares"])
    def test_save_is_never_used_when_a_part_is_nowhere(self, tmp_path: Path, bucket: str, moment: str) -> None:
        results = run_ranks(2, die, moment, str(tmp_path), bucket)
        survivor = results[0]
        assert survivor != DEAD
        assert survivor[0] == "SaveFailedError", survivor
        for step, epoch, _ in run_ranks(2, latest, str(tmp_path), bucket):
            assert (step, epoch) == (10, 3)

    @pytest.mark.parametrize("with_remote", [False, True])
    def test_save_is_rolled_forward_when_all_parts_are_durable(
        self, tmp_path: Path, bucket: str, with_remote: bool
    ) -> None:
        remote = bucket if with_remote else None
        assert run_ranks(2, die, "before complete", str(tmp_path), remote) == [DEAD, DEAD]
        found = run_ranks(2, latest, str(tmp_path), remote)
        assert [f[:2] for f in found] == [(20, 4)] * 2
