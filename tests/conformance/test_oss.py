"""What is particular to OSS: signatures, dates, temporary credentials, CRC64, addressing, versioned buckets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone

import pytest

from ckptstore.blob import BlobStore, open_blob_store
from ckptstore.blob.address import parse_address
from ckptstore.blob.oss import OSSBlobStore
from ckptstore.clock import SystemClock
from ckptstore.errors import CheckpointExistsError, ConfigError, CredentialsError, IntegrityError, TransientError
from ckptstore.testing.faults import FaultProxy, FlipBit, Rule
from ckptstore.testing.oss_server import OSSServer

MIB = 1024**2
BODY = bytes(range(256)) * 40


class OffsetClock(SystemClock):
    """The machine's clock and a bit."""

    offset = timedelta()

    def now(self) -> datetime:
        return super().now() + self.offset


@pytest.fixture
def clock() -> OffsetClock:
    return OffsetClock()


@pytest.fixture
def server(clock: OffsetClock) -> Iterator[OSSServer]:
    with OSSServer(clock=clock) as server:
        yield server


@pytest.fixture
def open_store() -> Iterator[Callable[..., BlobStore]]:
    opened: list[BlobStore] = []

    def make(url: str, environ: dict[str, str], **more: int) -> BlobStore:
        store = OSSBlobStore(parse_address(url), environ=environ, **more)  # type: ignore[arg-type]
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


Open = Callable[..., BlobStore]


@pytest.mark.parametrize("auth", ["v4", "v1"])
def test_a_wrong_secret_is_refused_when_requests_are_signed(server: OSSServer, open_store: Open, auth: str) -> None:
    environ = {**server.environ, "OSS_ACCESS_KEY_SECRET": "wrong"}
    store = open_store(f"{server.url()}&auth={auth}", environ)
    for use in (
        lambda: store.put("k", BODY),
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: list(store.list()),
    ):
        with pytest.raises(CredentialsError, match="SignatureDoesNotMatch"):
            use()


@pytest.mark.parametrize("auth", ["v4", "v1"])
@pytest.mark.parametrize("minutes", [-20, 20])
def test_the_error_names_the_clock_when_it_is_skewed(
    server: OSSServer, clock: OffsetClock, open_store: Open, auth: str, minutes: int
) -> None:
    store = open_store(f"{server.url()}&auth={auth}", server.environ)
    store.put("k", BODY)
    clock.offset = timedelta(minutes=minutes)
    direction = "ahead" if minutes < 0 else "behind"
    with pytest.raises(CredentialsError, match=f"clock.*1[12][0-9][0-9] s {direction}"):
        store.get("k")
    with pytest.raises(CredentialsError, match="clock"):
        store.head("k")
    clock.offset = timedelta(minutes=minutes / 2)
    assert store.get("k") == BODY


def test_a_request_signed_for_another_region_is_refused_when_it_comes(server: OSSServer, open_store: Open) -> None:
    store = open_store(f"{server.url()}&region=cn-beijing", server.environ)
    with pytest.raises(Exception, match="region"):
        store.put("k", BODY)


def test_temporary_credentials_work_until_they_expire_and_again_when_renewed(
    server: OSSServer, clock: OffsetClock
) -> None:
    environ = server.issue_token(60)
    store = open_blob_store(server.url("sts"), environ=environ)
    store.put("k", BODY)
    clock.offset = timedelta(seconds=61)
    with pytest.raises(CredentialsError, match="expired"):
        store.get("k")
    environ.update(server.issue_token(60))
    assert store.get("k") == BODY
    environ["OSS_SESSION_TOKEN"] += "x"
    with pytest.raises(CredentialsError):
        store.get("k")
    store.close()


def test_the_error_says_what_to_set_when_there_are_no_credentials(server: OSSServer, open_store: Open) -> None:
    store = open_store(server.url(), {"http_proxy": server.endpoint})
    with pytest.raises(CredentialsError, match="OSS_ACCESS_KEY_ID"):
        store.put("k", BODY)
    assert server.seen == []


def test_a_body_is_refused_before_it_is_stored_when_it_can_be_written_only_once(
    server: OSSServer, open_store: Open
) -> None:
    with FaultProxy(server.endpoint) as proxy:
        proxy.add(Rule(FlipBit(in_request=True, at_byte=5), method="PUT"))
        store = open_store(proxy.rewrite(server.url_by_address()), server.environ)
        with pytest.raises(TransientError) as caught:
            store.put("once", BODY, if_absent=True)
        assert caught.value.context["reason"] == "damaged"
        assert server.stored("once") is None


@pytest.mark.parametrize("size_bytes", [1000, 6 * MIB])
def test_damage_on_the_way_up_is_found_when_the_server_tells_its_crc(
    server: OSSServer, open_store: Open, size_bytes: int
) -> None:
    with FaultProxy(server.endpoint) as proxy:
        rule = proxy.add(Rule(FlipBit(in_request=True, at_byte=500), method="PUT"))
        url = proxy.rewrite(server.url_by_address())
        store = open_store(url, server.environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)
        with pytest.raises(TransientError, match="CRC64"):
            store.put("k", bytes(size_bytes))
        assert rule.num_applied


def test_damage_at_rest_or_on_the_way_down_is_found_when_the_whole_object_is_read(
    server: OSSServer, open_store: Open
) -> None:
    store = open_store(server.url(), server.environ)
    store.put("k", BODY)
    server.damage("k")
    with pytest.raises(TransientError, match="CRC64"):
        store.get("k")


def test_a_range_past_the_end_is_refused_though_the_service_would_return_the_whole(
    server: OSSServer, open_store: Open
) -> None:
    store = open_store(server.url(), server.environ)
    store.put("k", b"0123456789")
    with pytest.raises(IntegrityError):
        store.get("k", start=10, length=10)


def test_a_domain_of_ones_own_works_when_cname_is_set(server: OSSServer, open_store: Open) -> None:
    server.cnames["checkpoints.example.com"] = server.bucket
    url = f"oss://{server.bucket}/p?endpoint=http://checkpoints.example.com&region={server.region}&cname=true"
    open_store(url, server.environ).put("k", BODY)
    stored = server.stored("p/k")
    assert stored is not None
    assert stored.body == BODY


def test_requests_go_to_the_bucket_in_the_host_name_when_the_endpoint_is_public(
    server: OSSServer, open_store: Open
) -> None:
    open_store(server.url("p"), server.environ).put("k", BODY)
    assert server.seen == [("PUT", f"http://ckptstore.{server.public_host}/p%2Fk")]


def test_put_headers_say_how_to_keep_the_object_when_the_url_says_so(server: OSSServer, open_store: Open) -> None:
    url = server.url() + "&storage_class=IA&tags=team:nlp,project:x&sse=KMS&kms_key=abc-1&requester_pays=true"
    store = open_store(url, server.environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)
    store.put("small", BODY)
    stored = server.stored("small")
    assert stored is not None
    kept = {name: value for name, value in stored.headers.items() if name.startswith("x-oss-")}
    assert kept["x-oss-storage-class"] == "IA"
    assert kept["x-oss-tagging"] == "team=nlp&project=x"
    assert kept["x-oss-server-side-encryption"] == "KMS"
    assert kept["x-oss-server-side-encryption-key-id"] == "abc-1"
    assert kept["x-oss-request-payer"] == "requester"
    assert "x-oss-forbid-overwrite" not in kept
    assert stored.headers["content-type"] == "application/octet-stream"
    store.put("large", bytes(6 * MIB))


def test_create_only_asks_first_when_the_bucket_ignores_the_condition(server: OSSServer, open_store: Open) -> None:
    store = open_store(server.url() + "&conditional_put=false", server.environ)
    assert not store.capabilities.conditional_put
    store.put("k", b"first", if_absent=True)
    with pytest.raises(CheckpointExistsError):
        store.put("k", b"second", if_absent=True)
    assert store.get("k") == b"first"
    assert [method for method, _ in server.seen] == ["HEAD", "PUT", "HEAD", "GET"]


def test_abandoned_uploads_are_found_on_every_page_and_aborted_when_they_are_old(
    server: OSSServer, clock: OffsetClock, open_store: Open
) -> None:
    store = open_store(server.url("p"), server.environ)
    assert isinstance(store, OSSBlobStore)
    with store._request("begin", "") as bucket:
        for number in range(1_003):
            bucket.init_multipart_upload(f"p/a/{number:04d}")
        bucket.init_multipart_upload("p/b")
    later = datetime.now(timezone.utc) + timedelta(minutes=1)
    assert store.abort_uploads("a/", later - timedelta(hours=1)) == 0
    assert store.abort_uploads("a/", later) == 1_003
    assert store.abort_uploads("", later) == 1


def test_the_region_follows_from_the_endpoint_when_it_is_public() -> None:
    def region_of(url: str, **environ: str) -> tuple[str, str]:
        store = OSSBlobStore(parse_address(url), environ=environ)
        return store._connection.endpoint, store._connection._region

    internal = "https://oss-cn-shanghai-internal.aliyuncs.com"
    assert region_of(f"oss://bkt?endpoint={internal}") == (internal, "cn-shanghai")
    assert region_of("oss://bkt?region=oss-cn-beijing") == ("https://oss-cn-beijing.aliyuncs.com", "cn-beijing")
    assert region_of("oss://bkt", OSS_REGION="eu-central-1")[0] == "https://oss-eu-central-1.aliyuncs.com"
    host = "oss-cn-hongkong.aliyuncs.com"
    assert region_of("oss://bkt", OSS_ENDPOINT=host) == (f"https://{host}", "cn-hongkong")


@pytest.mark.parametrize(
    "url",
    [
        "oss://bkt/p",
        "oss://bkt/p?endpoint=http://my.domain.example",
        "oss://bkt/p?endpoint=ftp://oss-cn-beijing.aliyuncs.com",
        "oss://bkt/p?region=cn-beijing&kms_key=1",
        "oss://bkt/p?region=cn-beijing&sse=DES",
        "oss://bkt/p?region=cn-beijing&auth=v2",
        "oss://bkt/p?region=cn-beijing&cname=perhaps",
    ],
)
def test_opening_fails_when_the_url_cannot_be_right(url: str) -> None:
    with pytest.raises(ConfigError):
        OSSBlobStore(parse_address(url), environ={})


def test_no_secret_is_logged_when_everything_is_logged(
    server: OSSServer, open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    environ = server.issue_token(60)
    store = open_store(server.url(), environ)
    store.put("k", BODY)
    with pytest.raises(Exception, match="no object"):
        store.get("absent")
    for name in ("OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"):
        assert environ[name] not in caplog.text


def test_the_server_refuses_what_it_does_not_know_when_asked(server: OSSServer, open_store: Open) -> None:
    store = open_store(server.url(), server.environ)
    assert isinstance(store, OSSBlobStore)
    with pytest.raises(Exception, match="NotImplemented"), store._request("acl", "") as bucket:
        bucket.get_bucket_acl()
