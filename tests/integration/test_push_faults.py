"""Whole pushes and restores through a proxy that breaks what it is told to, against a real S3 server.

The letters and numbers are those of the cases each test covers. Where the others are tested:

B2 a process ends before its upload   integration/agent/test_agent_upload.py, crash/test_store_crash.py
B3 a lost answer, request by request  conformance/test_faults.py
B4 a forgotten upload in parts        conformance/test_faults.py (nothing else is remembered)
B5 credentials change for real        integration/test_credentials.py, conformance/test_oss.py
B6 clocks                             conformance/test_faults.py, conformance/test_oss.py, unit/repo/test_gc.py
B8 sizes and numbers of parts         unit/blob/test_names_and_addresses.py, conformance/test_blob_stores.py
B9 dialects                           conformance/test_s3_dialects.py, conformance/test_oss.py
B10 listings page by page             conformance/test_faults.py; what gc believes of them unit/repo/test_gc.py
B12 each refusal and its sentence     conformance/test_faults.py
B13 two jobs in one run               unit/ops/test_two_jobs.py
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptstore.agent.protocol import Event
from ckptstore.agent.uploader import Uploader
from ckptstore.blob.address import parse_address
from ckptstore.blob.retry import Retrier, Retry, RetryingBlobStore, RetryPolicy
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.clock import SYSTEM_CLOCK, new_nonce
from ckptstore.config import StoreConfig
from ckptstore.errors import CredentialsError, StorageError, TransientError
from ckptstore.ops.open import RunTiers
from ckptstore.ops.verify import verify
from ckptstore.repo.fetch import pull
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import PushResult, push
from ckptstore.testing.checkpoints import Array, write_checkpoint
from ckptstore.testing.faults import CutReply, EditReply, Fault, FaultProxy, FlipBit, LoseReply, Reply, Reset, Rule
from ckptstore.testing.s3_server import SeaweedServer

MIB = 1 << 20
CONFIG = StoreConfig(pack_bytes=MIB, upload_concurrency=2)
ATTEMPTS = 5
State = dict[str, Array]


class Bench:
    """A local tier, and one bucket behind a proxy; ``direct`` reaches the same objects without it."""

    def __init__(self, server: SeaweedServer, proxy: FaultProxy, path: Path) -> None:
        self.proxy = proxy
        self.environ = dict(server.environ)
        self.tier = LocalTier(path / "local")
        self.prefix = uuid.uuid4().hex
        self.nonce = new_nonce()
        self.url = proxy.rewrite(server.url(self.prefix))
        self.retries: list[Retry] = []
        self._stores: list[RetryingBlobStore] = []
        self.direct = self._open(server.url(self.prefix))
        self._path = path

    def _open(self, url: str, **options: int) -> RetryingBlobStore:
        policy = RetryPolicy(attempts=ATTEMPTS, deadline_s=30, first_wait_s=0.01, max_wait_s=0.05)
        retrier = Retrier(policy, on_retry=self.retries.append)
        inner = S3BlobStore(parse_address(url), environ=self.environ, attempts=retrier, read_timeout_s=2, **options)
        self._stores.append(RetryingBlobStore(inner, retrier))
        return self._stores[-1]

    def remote(self, run: str = "default", **options: int) -> RemoteTier:
        """As a fresh process sees it."""
        return RemoteTier(self._open(self.url, **options), run, "s3")

    def write(self, step: int, *, seed: int | None = None, layers: int = 12, **options: object) -> Path:
        rng = np.random.default_rng(step if seed is None else seed)
        state: State = {f"w{n}": rng.normal(size=(256, 256)).astype("float32") for n in range(layers)}
        return write_checkpoint(self.tier, state, step=step, save_id=f"{self.nonce}-{step}", **options)  # type: ignore[arg-type]

    def push(self, path: Path, **options: int) -> PushResult:
        return push(self.tier, path, "default", self.remote(**options), config=CONFIG)

    def assert_restores(self, path: Path, *, direct: bool = True) -> None:
        """What is in the bucket is this checkpoint, byte for byte."""
        fresh = LocalTier(self._path / uuid.uuid4().hex)
        fresh.create()
        remote = RemoteTier(self.direct, "default", "s3") if direct else self.remote()
        pulled = pull(remote, path.name.split("-", 2)[2], fresh)
        for file in path.iterdir():
            assert (pulled / file.name).read_bytes() == file.read_bytes(), file.name
        shutil.rmtree(fresh.root)

    def committed(self) -> list[int]:
        return [save.step for save in RemoteTier(self.direct, "default", "s3").saves()]

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture(scope="module")
def server_and_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SeaweedServer, FaultProxy]]:
    with SeaweedServer(tmp_path_factory.mktemp("s3")) as server, FaultProxy(server.endpoint) as proxy:
        yield server, proxy


@pytest.fixture
def bench(server_and_proxy: tuple[SeaweedServer, FaultProxy], tmp_path: Path) -> Iterator[Bench]:
    server, proxy = server_and_proxy
    proxy.clear()
    made = Bench(server, proxy, tmp_path)
    yield made
    made.close()
    proxy.clear()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# B1, B2


def test_nothing_is_visible_and_nothing_is_lost_when_the_push_breaks_anywhere(bench: Bench) -> None:
    path = bench.write(1)
    for nth in (1, 4, 6, 8):
        bench.proxy.clear()
        bench.proxy.add(Rule(Reply(403, "AccessDenied"), method="PUT", nth=range(nth, 1000)))
        with pytest.raises(CredentialsError):
            bench.push(path)
        assert bench.committed() == []
    bench.proxy.clear()
    result = bench.push(path)
    assert result.committed is not None
    assert result.sent_bytes < result.stored_bytes, "what was sent before the refusals is not sent again"
    bench.assert_restores(path)


# B3


@pytest.mark.parametrize(
    "part", ["intents/", "packs/", "shards/", "summaries/", "commits/", "names/", "ckptstore.json"]
)
def test_push_commits_once_when_the_answer_to_a_put_was_lost(bench: Bench, part: str) -> None:
    path = bench.write(1)
    rule = bench.proxy.add(Rule(LoseReply(), method="PUT", path=part, nth=[1]))
    result = bench.push(path)
    assert rule.num_applied == 1
    assert result.committed is not None
    assert result.sent_bytes == result.stored_bytes
    assert bench.committed() == [1]
    assert bench.proxy.count("PUT", part) <= rule.num_matched
    assert [info.key for info in bench.direct.list("runs/default/intents/")] == []
    bench.assert_restores(path)


def test_push_commits_when_every_third_answer_is_lost(bench: Bench) -> None:
    path = bench.write(1)
    rule = bench.proxy.add(Rule(LoseReply(), nth=range(1, 200, 3)))
    assert bench.push(path).committed is not None
    assert rule.num_applied > 4
    bench.assert_restores(path)


@pytest.mark.parametrize(
    "fault", [LoseReply(), Reset(100_000), Reply(503, "SlowDown"), FlipBit(in_request=True, at_byte=5000)], ids=str
)
def test_parts_of_a_large_pack_are_sent_again_one_by_one(bench: Bench, fault: Fault) -> None:
    """B3, B8: packs that need several parts; the completing request is among those that break."""
    path = bench.write(1, layers=60)
    config = CONFIG.model_copy(update={"pack_bytes": 32 * MIB})
    sized = {"single_put_bytes": 5 * MIB, "part_bytes": 5 * MIB}
    parts = bench.proxy.add(Rule(fault, method="PUT", path="partNumber=2", nth=[1]))
    done = Rule(
        fault if not isinstance(fault, FlipBit | Reset) else LoseReply(), method="POST", path="uploadId=", nth=[1]
    )
    bench.proxy.add(done)
    result = push(bench.tier, path, "default", bench.remote(**sized), config=config)
    assert result.committed is not None
    assert (parts.num_applied, done.num_applied) == (1, 1)
    assert bench.proxy.count("PUT", "partNumber=1&") <= 2
    assert result.sent_bytes == result.stored_bytes
    bench.assert_restores(path)


# B5


def test_upload_goes_on_when_a_trainer_brings_new_credentials(bench: Bench) -> None:
    """Credentials expire after some packs; the queue stays and says so; a new attachment's are used; nothing twice."""
    path = bench.write(1)
    events: list[Event] = []
    bench.proxy.add(Rule(Reply(403, "ExpiredToken"), method="PUT", path="packs/", nth=range(3, 10_000)))
    config = CONFIG.model_copy(update={"upload_concurrency": 1})
    old = {**bench.environ, "AWS_SESSION_TOKEN": "old"}
    del old["AWS_SESSION_TOKEN"]
    uploader = Uploader(
        bench.tier, "default", "s3", bench.url, old, config, events.append, lambda root: None, SYSTEM_CLOCK
    )
    try:
        until(lambda: events)
        assert (events[0].kind, events[0].data["error"]) == ("failed", "CredentialsError")
        described = uploader.describe()
        assert described["is_refused"]
        assert described["queue"][0]["step"] == 1
        assert bench.committed() == []
        sent = {info.key for info in bench.direct.list("runs/default/packs/")}
        assert len(sent) == 2
        bench.proxy.clear()
        uploader.refresh(dict(bench.environ), config)
        until(uploader.is_settled)
        assert events[-1].kind == "remote"
        assert events[-1].data["sent_bytes"] < events[-1].data["stored_bytes"]
        assert not [s for s in bench.proxy.seen if s.method == "PUT" and any(k in s.path for k in sent)]
        assert "AWS" not in repr(uploader.describe())
    finally:
        uploader.stop()
        uploader.join(10)
    bench.assert_restores(path)


def test_push_uses_credentials_that_were_renewed_under_it(bench: Bench) -> None:
    """The environment is kept current: an expiry costs one more request."""
    path = bench.write(1)
    rule = bench.proxy.add(Rule(Reply(403, "ExpiredToken"), method="PUT", path="packs/", nth=[2]))
    assert bench.push(path).committed is not None
    assert rule.num_applied == 1
    assert [retry.reason for retry in bench.retries] == ["expired"]


# B7


def test_push_commits_when_a_third_of_all_requests_fail(bench: Bench) -> None:
    path = bench.write(1)
    storm = [Reply(503, "SlowDown"), Reply(500, "InternalError"), Reset(), CutReply(20), LoseReply()]
    rules = [Rule(fault, probability=0.1) for fault in storm]
    bench.proxy.add(*rules)
    deadline = time.monotonic() + 60
    while True:
        try:
            result = bench.push(path)
            break
        except TransientError:
            assert time.monotonic() < deadline
    assert result.committed is not None
    assert sum(rule.num_applied for rule in rules) > 2
    bench.proxy.clear()
    bench.assert_restores(path)


def test_attempts_have_a_budget_when_the_server_only_says_slow_down(bench: Bench) -> None:
    path = bench.write(1)
    bench.proxy.add(Rule(Reply(503, "SlowDown"), method="PUT", path="packs/"))
    began = time.monotonic()
    with pytest.raises(TransientError, match="gave up after 5 attempts"):
        bench.push(path)
    assert time.monotonic() - began < 20
    in_flight = CONFIG.upload_concurrency + 1
    assert bench.proxy.count("PUT", "packs/") <= ATTEMPTS * in_flight, "attempts don't multiply"
    assert bench.committed() == []
    bench.proxy.clear()
    assert bench.push(path).committed is not None


# B10


def _empty(body: bytes) -> bytes:
    """A listing as it was before anything was written."""
    head, _, rest = body.partition(b"<Contents>")
    if not rest:
        return body
    return re.sub(rb"<KeyCount>[0-9]+<", b"<KeyCount>0<", head + rest.rpartition(b"</Contents>")[2])


def test_saves_are_sent_whole_when_the_listing_of_commits_is_stale(bench: Bench) -> None:
    bench.push(bench.write(1, seed=0))
    second = bench.write(2, seed=0)
    rule = bench.proxy.add(Rule(EditReply(_empty), method="GET", path="commits", nth=[1]))
    result = bench.push(second)
    assert rule.num_applied == 1
    assert result.reused_bytes == 0, "a save that isn't listed is not relied on"
    assert bench.committed() == [1, 2]
    bench.assert_restores(second)


def parts_of_two_nodes(bench: Bench, step: int) -> tuple[tuple[LocalTier, Path], tuple[LocalTier, Path]]:
    """A save of two ranks whose parts are on different disks, prepared on each."""
    path = bench.write(step, world_size=2)
    other = LocalTier(bench.tier.root.parent / "other")
    twin = shutil.copytree(path, other.root / "default" / path.name)
    for folder, rank in ((path, 1), (twin, 0)):
        (folder / f"shard-{rank:05d}.json").unlink()
        (folder / "manifest.json").unlink()
    return (bench.tier, path), (other, twin)


def test_the_commit_comes_later_when_the_listing_of_shards_is_stale(bench: Bench) -> None:
    (here, path), (there, twin) = parts_of_two_nodes(bench, 1)
    assert push(there, twin, "default", bench.remote(), config=CONFIG).committed is None
    bench.proxy.add(Rule(EditReply(_empty), method="GET", path="prefix=[^&]*shards", nth=[1]))
    assert bench.push(path).committed is None
    assert bench.committed() == []
    assert bench.push(path).committed is not None
    bench.proxy.clear()
    events: list[Event] = []
    (here, _), (there, twin) = parts_of_two_nodes(bench, 2)
    push(there, twin, "default", bench.remote(), config=CONFIG)
    bench.proxy.add(Rule(EditReply(_empty), method="GET", path="prefix=[^&]*shards", nth=[1, 2]))
    uploader = Uploader(here, "default", "s3", bench.url, bench.environ, CONFIG, events.append, ignore, SYSTEM_CLOCK)
    try:
        until(lambda: events and uploader.is_settled())
    finally:
        uploader.stop()
        uploader.join(10)
    assert [(event.kind, event.step) for event in events] == [("remote", 2)]
    assert bench.committed() == [1, 2]


def ignore(root: object) -> None:
    del root


@pytest.mark.parametrize("fault", [Reply(500, "InternalError"), CutReply(150), Reply(403, "AccessDenied")], ids=str)
def test_push_raises_when_the_remote_can_not_be_listed(bench: Bench, fault: Fault) -> None:
    path = bench.write(1)
    bench.proxy.add(Rule(fault, method="GET", path="list-type"))
    with pytest.raises(StorageError):
        bench.push(path)
    assert not list(bench.direct.list("runs/default/packs/")), "an error is never an empty remote"


# B11


def test_damage_on_the_way_is_refused_and_sent_again(bench: Bench) -> None:
    path = bench.write(1)
    rule = bench.proxy.add(Rule(FlipBit(in_request=True, at_byte=70_000), method="PUT", path="packs/", nth=[1, 2]))
    assert bench.push(path).committed is not None
    assert rule.num_applied == 2
    bench.assert_restores(path)


@pytest.mark.parametrize(
    "fault", [FlipBit(at_byte=70_000), CutReply(50_000), CutReply(50_000, reset=True), Reply(503, "SlowDown")], ids=str
)
def test_restore_is_whole_when_answers_are_damaged_or_short(bench: Bench, fault: Fault) -> None:
    path = bench.write(1)
    bench.push(path)
    rule = bench.proxy.add(Rule(fault, method="GET", path="packs/", nth=[1, 2]))
    bench.assert_restores(path, direct=False)
    assert rule.num_applied == 2


def test_damage_at_rest_is_found_and_push_repairs_it(bench: Bench) -> None:
    """B11, B14: a pack rots, another is removed by somebody's lifecycle rule."""
    path = bench.write(1)
    bench.push(path)
    packs = sorted(info.key for info in bench.direct.list("runs/default/packs/"))
    data = bytearray(bench.direct.get(packs[0]))
    data[len(data) // 2] ^= 1
    bench.direct.put(packs[0], data)
    bench.direct.delete([packs[1]])
    remote = RemoteTier(bench.direct, "default", "s3")
    found = verify(RunTiers("default", None, (remote,)), None, everything=False, read_data=True)
    assert {finding.kind for finding in found.findings} == {"damage"}
    assert any("missing" in finding.what for finding in found.findings)
    rotten = packs[0].removeprefix("runs/default/")
    push(bench.tier, path, "default", bench.remote(), config=CONFIG, distrust={rotten})
    assert not verify(RunTiers("default", None, (remote,)), None, everything=False, read_data=True).findings
    bench.assert_restores(path)


# B12, B13


def test_a_refusal_stops_the_push_at_once(bench: Bench) -> None:
    path = bench.write(1)
    bench.proxy.add(Rule(Reply(403, "AccessDenied"), method="PUT", path="packs/"))
    with pytest.raises(CredentialsError):
        bench.push(path)
    assert bench.proxy.count("PUT", "packs/") <= CONFIG.upload_concurrency + 1
    assert bench.retries == []


def test_runs_with_similar_names_do_not_mix(bench: Bench) -> None:
    for run in ("a", "a.b", "a-b"):
        save_id = f"{new_nonce()}-1"
        path = write_checkpoint(bench.tier, {"w": np.ones(9, "float32")}, run=run, save_id=save_id)
        assert push(bench.tier, path, run, bench.remote(run), config=CONFIG).reused_bytes == 0
        assert [save.save_id for save in bench.remote(run).saves()] == [save_id]
