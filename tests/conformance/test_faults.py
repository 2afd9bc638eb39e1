"""What goes wrong on the way to a real server (the letters and numbers are those of the cases each test covers)."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from ckptstore.blob import BlobStore, ObjectInfo, open_blob_store
from ckptstore.blob.address import parse_address
from ckptstore.blob.base import once
from ckptstore.blob.oss import OSSBlobStore
from ckptstore.blob.retry import Retrier, Retry, RetryingBlobStore, RetryPolicy
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.errors import (
    CheckpointExistsError,
    CkptError,
    ConfigError,
    CredentialsError,
    NoSpaceError,
    NoStoreError,
    StorageError,
    TransientError,
)
from ckptstore.testing.faults import (
    CutReply,
    EditReply,
    Fault,
    FaultProxy,
    FlipBit,
    Hang,
    LoseReply,
    Reply,
    Reset,
    Rule,
)
from ckptstore.testing.oss_server import OSSServer
from ckptstore.testing.s3_server import SeaweedServer

MIB = 1024**2
BODY = Random(1).randbytes(200_000)
LARGE = Random(2).randbytes(11 * MIB)

REFUSALS = [
    Reply(503, "SlowDown"),
    Reply(503),
    Reply(500, "InternalError"),
    Reply(502),
    Reply(504),
    Reply(429, "TooManyRequests"),
    Reply(408, "RequestTimeout"),
    Reply(409, "OperationAborted"),
]
BREAKS = [Reset(), LoseReply(), Hang()]
CUTS = [CutReply(70), CutReply(70, reset=True), CutReply(0)]


class Bench:
    """A store behind a proxy, with what it retried; ``direct`` is the same store without the proxy."""

    def __init__(self, server: SeaweedServer | OSSServer, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy
        self.environ = dict(server.environ)
        self.prefix = uuid.uuid4().hex
        self.retries: list[Retry] = []
        self.direct = self.open(server.endpoint, retry=False)
        self.store = self.open(proxy.endpoint, retry=True)
        self.bare = self.open(proxy.endpoint, retry=False)

    @property
    def secret_name(self) -> str:
        return "OSS_ACCESS_KEY_SECRET" if isinstance(self.server, OSSServer) else "AWS_SECRET_ACCESS_KEY"

    def open(self, endpoint: str, *, retry: bool, attempts: int = 5) -> BlobStore:
        scheme = "oss" if isinstance(self.server, OSSServer) else "s3"
        path = f"{self.server.bucket}/faults/{self.prefix}"
        address = parse_address(f"{scheme}://{path}?endpoint={endpoint}&region={self.server.region}")
        policy = RetryPolicy(attempts=attempts, deadline_s=30, first_wait_s=0.01, max_wait_s=0.1)
        retrier = Retrier(policy, on_retry=self.retries.append)
        make: type[OSSBlobStore] | type[S3BlobStore] = OSSBlobStore if scheme == "oss" else S3BlobStore
        inner = make(
            address,
            environ=self.environ,
            attempts=retrier if retry else once,
            single_put_bytes=5 * MIB,
            part_bytes=5 * MIB,
            read_timeout_s=0.5,
        )
        return RetryingBlobStore(inner, retrier) if retry else inner

    def close(self) -> None:
        for store in (self.direct, self.store, self.bare):
            store.close()


@pytest.fixture(scope="module", params=["s3", "oss"])
def server_and_proxy(
    request: pytest.FixtureRequest, seaweed: SeaweedServer, oss: OSSServer
) -> Iterator[tuple[SeaweedServer | OSSServer, FaultProxy]]:
    server = seaweed if request.param == "s3" else oss
    with FaultProxy(server.endpoint) as proxy:
        yield server, proxy


@pytest.fixture
def bench(server_and_proxy: tuple[SeaweedServer | OSSServer, FaultProxy]) -> Iterator[Bench]:
    server, proxy = server_and_proxy
    proxy.clear()
    bench = Bench(server, proxy)
    yield bench
    bench.close()


# B7: what passes


@pytest.mark.parametrize("fault", [*REFUSALS, *BREAKS, Reset(1000), FlipBit(in_request=True, at_byte=777)], ids=str)
def test_put_succeeds_when_the_first_two_requests_fail(bench: Bench, fault: Fault) -> None:
    rule = bench.proxy.add(Rule(fault, method="PUT", nth=[1, 2]))
    bench.store.put("b7/put", BODY)
    assert rule.num_applied == 2
    assert len(bench.retries) == 2
    assert bench.direct.get("b7/put") == BODY


@pytest.mark.parametrize("fault", [*REFUSALS, *BREAKS, *CUTS], ids=str)
def test_get_succeeds_when_the_first_two_requests_fail(bench: Bench, fault: Fault) -> None:
    bench.direct.put("b7/get", BODY)
    rule = bench.proxy.add(Rule(fault, method="GET", nth=[1, 2]))
    assert bench.store.get("b7/get", start=100, length=150_000) == BODY[100:150_100]
    assert rule.num_applied == 2


@pytest.mark.parametrize("fault", [REFUSALS[0], REFUSALS[1], *BREAKS], ids=str)
def test_head_and_delete_succeed_when_the_first_requests_fail(bench: Bench, fault: Fault) -> None:
    bench.direct.put("b7/head", BODY)
    rules = [Rule(fault, method="HEAD", nth=[1]), Rule(fault, method="POST", path="delete", nth=[1])]
    bench.proxy.add(*rules)
    assert bench.store.head("b7/head") is not None
    bench.store.delete(["b7/head"])
    assert [rule.num_applied for rule in rules] == [1, 1]
    assert bench.direct.head("b7/head") is None


@pytest.mark.parametrize("fault", [*REFUSALS[:3], *BREAKS[:2], *CUTS, CutReply(2)], ids=str)
def test_nothing_is_returned_when_every_request_fails(bench: Bench, fault: Fault) -> None:
    bench.direct.put("b7/never", BODY)
    bench.proxy.add(Rule(fault))
    uses: list[Callable[[], object]] = [lambda: bench.store.get("b7/never"), lambda: list(bench.store.list())]
    if not isinstance(fault, CutReply):
        uses += [lambda: bench.store.head("b7/never"), lambda: bench.store.put("b7/never", b"other", if_absent=True)]
    for use in uses:
        bench.retries.clear()
        bench.proxy.seen.clear()
        with pytest.raises(TransientError) as caught:
            use()
        assert caught.value.context["attempts"] == 5
        assert "5 attempts" in str(caught.value)
        assert len(bench.retries) == 4
        assert len(bench.proxy.seen) == 5, "somebody else tried again as well"
    assert bench.direct.get("b7/never") == BODY


def test_one_part_is_sent_again_when_its_request_fails(bench: Bench) -> None:
    bench.proxy.add(Rule(Reset(1000), method="PUT", path="partNumber=2", nth=[1]))
    bench.store.put("b7/parts", LARGE)
    assert bench.proxy.count("PUT", "partNumber=") == 3 + 1
    assert bench.direct.get("b7/parts") == LARGE


def test_attempts_do_not_multiply_when_a_part_keeps_failing(bench: Bench) -> None:
    bench.proxy.add(Rule(Reply(503, "SlowDown"), method="PUT", path=r"partNumber=1\b"))
    with pytest.raises(TransientError) as caught:
        bench.store.put("b7/parts", LARGE)
    assert caught.value.context["attempts"] == 5
    assert bench.proxy.count("PUT", r"partNumber=1\b") == 5
    assert bench.proxy.count("POST", "uploads") == 1
    assert bench.proxy.count("DELETE", "uploadId") == 1, "the upload was left behind"
    assert bench.direct.head("b7/parts") is None


def test_every_byte_arrives_when_one_request_in_four_fails(bench: Bench) -> None:
    faults: list[Fault] = [Reply(503, "SlowDown"), Reset(), LoseReply(), Reset(5000), CutReply(50), Reply(500)]
    bench.proxy.add(*(Rule(fault, probability=0.05) for fault in faults))
    bodies = {f"soak/{number}": Random(number).randbytes(20_000 + number) for number in range(60)}
    store = bench.open(bench.proxy.endpoint, retry=True, attempts=12)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: store.put(*item, if_absent=True), bodies.items()))
        assert dict(zip(bodies, pool.map(store.get, bodies), strict=True)) == bodies
    assert sorted(info.key for info in store.list("soak/")) == sorted(bodies)
    store.close()
    assert len(bench.retries) > 5


def test_retries_bridge_the_gap_when_the_server_is_killed_and_comes_back() -> None:
    with SeaweedServer() as server:
        retrier = Retrier(RetryPolicy(attempts=200, deadline_s=60, first_wait_s=0.2, max_wait_s=0.3))
        store = RetryingBlobStore(S3BlobStore(parse_address(server.url("gap")), environ=server.environ), retrier)
        store.put("before", BODY)
        server.kill()
        restart = threading.Timer(0.5, server.restart)
        restart.start()
        store.put("after", BODY, if_absent=True)
        assert store.get("before") == store.get("after") == BODY
        restart.join()
        store.close()


# B3: the answer is lost, the deed is done


@pytest.mark.parametrize("if_absent", [False, True])
def test_put_is_a_success_when_its_answer_was_lost(bench: Bench, if_absent: bool) -> None:
    bench.proxy.add(Rule(LoseReply(), method="PUT", nth=[1]))
    bench.store.put("b3/put", BODY, if_absent=if_absent)
    assert len(bench.retries) == 1
    assert bench.direct.get("b3/put") == BODY


def test_put_if_absent_is_a_conflict_when_another_writer_came_between(bench: Bench) -> None:
    for theirs in (b"theirs", BODY[:-1] + bytes([BODY[-1] ^ 1])):
        bench.direct.put("b3/theirs", theirs)
        bench.proxy.clear()
        bench.proxy.add(Rule(Reset(), method="PUT", nth=[1]))
        with pytest.raises(CheckpointExistsError):
            bench.store.put("b3/theirs", BODY, if_absent=True)
        assert bench.direct.get("b3/theirs") == theirs


def test_put_if_absent_is_a_conflict_when_equal_bytes_were_there_before(bench: Bench) -> None:
    bench.direct.put("b3/before", BODY)
    with pytest.raises(CheckpointExistsError):
        bench.store.put("b3/before", BODY, if_absent=True)


@pytest.mark.parametrize("if_absent", [False, True])
def test_parts_are_not_sent_again_when_the_answer_to_complete_was_lost(bench: Bench, if_absent: bool) -> None:
    bench.proxy.add(Rule(LoseReply(), method="POST", path="uploadId=", nth=[1]))
    bench.store.put("b3/complete", LARGE, if_absent=if_absent)
    slow = sum(retry.reason == "timeout" for retry in bench.retries)  # half a second is little on a busy machine
    assert bench.proxy.count("PUT", "partNumber=") <= 3 + slow
    assert bench.proxy.count("POST", "uploadId=") == 2
    assert bench.direct.get("b3/complete") == LARGE


@pytest.mark.parametrize("fault", [Reply(500, "InternalError"), Reset(), Reply(200, "InternalError")], ids=str)
def test_complete_is_repeated_when_it_failed(bench: Bench, fault: Fault) -> None:
    bench.proxy.add(Rule(fault, method="POST", path="uploadId=", nth=[1]))
    bench.store.put("b3/complete", LARGE, if_absent=True)
    assert bench.proxy.count("PUT", "partNumber=") == 3
    assert bench.direct.get("b3/complete") == LARGE


def test_an_upload_is_begun_again_when_somebody_aborted_it(bench: Bench) -> None:
    bench.proxy.add(Rule(Reply(404, "NoSuchUpload"), method="PUT", path=r"partNumber=2\b", nth=[1]))
    bench.store.put("b3/aborted", LARGE, if_absent=True)
    assert bench.proxy.count("POST", "uploads") == 2
    assert bench.direct.get("b3/aborted") == LARGE


def test_a_success_is_not_believed_when_it_comes_from_a_portal(bench: Bench) -> None:
    """A proxy that answers 200 to everything stores nothing, and what it returns is no object."""
    bench.direct.put("b3/known", BODY)
    rule = bench.proxy.add(Rule(Reply(200, headers=(("X-Portal", "please log in"),))))
    uses: list[Callable[[], object]] = [
        lambda: bench.store.put("b3/portal", BODY),
        lambda: bench.store.put("b3/portal", LARGE),
        lambda: bench.store.get("b3/known"),
        lambda: bench.store.head("b3/known"),
        lambda: list(bench.store.list()),
        lambda: bench.store.delete(["b3/known"]),
    ]
    for use in uses:
        with pytest.raises(TransientError):
            use()
    assert rule.num_applied == 5 * len(uses)
    assert bench.direct.get("b3/known") == BODY


@pytest.mark.parametrize(("method", "path"), [("PUT", "partNumber"), ("POST", "uploadId=")])
def test_an_upload_fails_when_its_second_half_goes_to_a_portal(bench: Bench, method: str, path: str) -> None:
    bench.proxy.add(Rule(Reply(200), method=method, path=path))
    with pytest.raises(TransientError):
        bench.store.put("b3/portal", LARGE)
    assert bench.direct.head("b3/portal") is None


# B5: credentials


def test_credentials_are_read_again_when_they_expire_amid_an_upload(bench: Bench) -> None:
    bench.store.put("b5/first", BODY)
    bench.proxy.add(Rule(Reply(400, "ExpiredToken"), method="PUT", path="partNumber=2", nth=[1]))
    bench.store.put("b5/large", LARGE)
    assert bench.proxy.count("PUT", "partNumber=") == 4, "parts that had arrived were sent again"

    good = bench.environ[bench.secret_name]
    bench.environ[bench.secret_name] = "no longer"
    bench.proxy.add(Rule(Reply(400, "ExpiredToken"), method="PUT", nth=[1]))
    with pytest.raises(CredentialsError):
        bench.store.put("b5/next", BODY)
    bench.environ[bench.secret_name] = good
    bench.proxy.add(Rule(Reply(400, "ExpiredToken"), method="PUT", nth=[1]))
    bench.store.put("b5/next", BODY)
    assert bench.direct.get("b5/next") == BODY


def test_the_error_names_credentials_when_new_ones_have_expired_as_well(bench: Bench) -> None:
    bench.proxy.add(Rule(Reply(400, "ExpiredToken"), method="GET"))
    with pytest.raises(CredentialsError, match="expired"):
        bench.store.get("b5/get")
    assert bench.proxy.count("GET") == 2


# B10: listings


def _fill(bench: Bench, num: int) -> list[str]:
    keys = [f"b10/{number:05d}" for number in range(num)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: bench.direct.put(key, b"."), keys))
    return keys


def test_a_listing_goes_on_where_it_was_when_its_second_page_fails(bench: Bench) -> None:
    keys = _fill(bench, 1_010)
    bench.proxy.add(Rule(Reply(503, "SlowDown"), path="continuation-token=[^&]", nth=[1]))
    assert sorted(info.key for info in bench.store.list("b10/")) == keys
    assert bench.proxy.count("GET", "list-type=2") == 3

    bench.proxy.clear()
    bench.proxy.add(Rule(Reply(503, "SlowDown"), path="continuation-token=[^&]"))
    for store in (bench.store, bench.bare):
        with pytest.raises(TransientError):
            list(store.list("b10/"))


def _truncated_without_token(body: bytes) -> bytes:
    return re.sub(rb"<IsTruncated>false</IsTruncated>", b"<IsTruncated>true</IsTruncated>", body)


@pytest.mark.parametrize(
    "fault",
    [
        Reply(200),
        Reply(204),
        CutReply(40),
        EditReply(lambda body: body[: len(body) // 2]),
        EditReply(_truncated_without_token),
        EditReply(lambda body: b"<html>captive portal</html>"),
        Reply(404),
        Reply(403, "AccessDenied"),
        Reply(301, "PermanentRedirect"),
        Reply(404, "NoSuchBucket"),
    ],
    ids=str,
)
def test_a_listing_raises_when_it_is_not_a_whole_listing(bench: Bench, fault: Fault) -> None:
    _fill(bench, 3)
    bench.proxy.add(Rule(fault, method="GET"))
    for store in (bench.store, bench.bare):
        with pytest.raises(CkptError):
            list(store.list("b10/"))


def test_an_object_is_yielded_once_when_a_listing_is_begun_again() -> None:
    class Flaky(BlobStore):
        """Breaks after two objects, once."""

        url, scheme, broken = "test://flaky", "test", False

        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            for number in range(4):
                if number == 2 and not self.broken:
                    self.broken = True
                    raise TransientError("cut")
                yield ObjectInfo(f"{prefix}{number}", 1)

        def put(self, *_: object, **__: object) -> None: ...
        def get(self, *_: object, **__: object) -> bytes:
            return b""

        def head(self, key: str) -> None: ...
        def delete(self, keys: object) -> None: ...

    store = RetryingBlobStore(Flaky(), Retrier(RetryPolicy(first_wait_s=0)))
    assert [info.key for info in store.list("k")] == ["k0", "k1", "k2", "k3"]


# B12: what doesn't pass


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (Reply(404, "NoSuchBucket"), NoStoreError, "there is no bucket"),
        (Reply(403, "AccessDenied"), CredentialsError, "AccessDenied"),
        (Reply(403, "InvalidAccessKeyId"), CredentialsError, "does not accept the credentials"),
        (Reply(403, "SignatureDoesNotMatch"), CredentialsError, "does not accept the credentials"),
        (Reply(403, "RequestTimeTooSkewed", (("Date", "Wed, 25 Nov 2020 10:00:00 GMT"),)), CredentialsError, "clock"),
        (Reply(403, "QuotaExceeded"), NoSpaceError, "QuotaExceeded"),
        (Reply(507), NoSpaceError, "507"),
        (Reply(400, "AuthorizationHeaderMalformed"), ConfigError, "AuthorizationHeaderMalformed"),
        (Reply(400, "EntityTooLarge"), StorageError, "EntityTooLarge"),
        (Reply(501, "NotImplemented"), StorageError, "NotImplemented"),
        (Reply(403, "InvalidObjectState"), StorageError, "InvalidObjectState"),
    ],
    ids=lambda value: str(getattr(value, "code", "")),
)
def test_a_permanent_refusal_stops_at_once_when_it_comes(
    bench: Bench, fault: Fault, expected: type[CkptError], words: str
) -> None:
    bench.proxy.add(Rule(fault))
    for use in (lambda: bench.store.put("b12/k", BODY), lambda: bench.store.get("b12/k")):
        bench.proxy.seen.clear()
        with pytest.raises(expected, match=words) as caught:
            use()
        assert not isinstance(caught.value, TransientError)
        assert len(bench.proxy.seen) == 1
        assert bench.environ[bench.secret_name] not in str(caught.value) + repr(caught.value.context)
    assert bench.retries == []


def test_head_tells_why_when_it_is_refused_without_a_body(bench: Bench) -> None:
    if isinstance(bench.server, OSSServer):
        return  # it tells why in a header
    bench.proxy.add(Rule(Reply(403), method="HEAD"), Rule(Reply(403, "InvalidAccessKeyId"), method="GET"))
    with pytest.raises(CredentialsError, match="InvalidAccessKeyId"):
        bench.store.head("b12/k")


@pytest.mark.parametrize("scheme", ["s3", "oss"])
def test_a_server_that_cannot_be_reached_is_transient_when_nothing_listens(scheme: str) -> None:
    keys = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "OSS_ACCESS_KEY_ID": "k",
        "OSS_ACCESS_KEY_SECRET": "s",
    }
    store = open_blob_store(f"{scheme}://bucket/p?endpoint=http://127.0.0.1:9&region=r", environ=keys, retry=False)
    uses: list[Callable[[], object]] = [
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: list(store.list()),
        lambda: store.put("k", b""),
    ]
    for use in uses:
        with pytest.raises(TransientError) as caught:
            use()
        assert caught.value.context["reason"] == "unreachable"
    store.close()


@pytest.mark.parametrize("scheme", ["s3", "oss"])
def test_an_endpoint_whose_name_nobody_knows_is_told_apart_from_a_silent_one(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    keys = {f"{prefix}_{name}": "k" for prefix in ("AWS", "OSS") for name in ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET")}
    keys["AWS_SECRET_ACCESS_KEY"] = "s"
    url = f"{scheme}://bucket/p?endpoint=http://no-such-host.invalid&region=r"
    store = open_blob_store(url, environ=keys, retry=False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TransientError, match=r"the name of http://no-such-host\.invalid can't be resolved") as caught:
        store.get("k")
    store.close()
    assert caught.value.context["reason"] == "unreachable"
    assert "spelling" in (caught.value.hint or "")


@pytest.mark.filterwarnings("always::ResourceWarning")
@pytest.mark.parametrize(
    "fault",
    [Reply(200), Reply(403, "AccessDenied"), CutReply(70), EditReply(lambda body: b"<html>" + bytes(300_000))],
    ids=str,
)
def test_no_connection_is_left_open_when_answers_are_bad(
    bench: Bench, fault: Fault, recwarn: pytest.WarningsRecorder
) -> None:
    bench.direct.put("open/k", BODY)
    bench.proxy.add(Rule(fault))
    uses: list[Callable[[], object]] = [
        lambda: bench.bare.put("open/k", BODY),
        lambda: bench.bare.put("open/large", LARGE),
        lambda: bench.bare.get("open/k"),
        lambda: bench.bare.get("open/k", max_bytes=5),
        lambda: bench.bare.get("open/absent"),
        lambda: bench.bare.head("open/k"),
        lambda: list(bench.bare.list()),
        lambda: bench.bare.delete(["open/k"]),
    ]
    for use in uses:
        with contextlib.suppress(CkptError):
            use()
    bench.bare.close()
    gc.collect()
    assert [str(warning.message) for warning in recwarn if "unclosed" in str(warning.message)] == []
