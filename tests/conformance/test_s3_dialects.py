"""What S3 servers differ in: checksums, addressing, credentials, TLS, headers."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptstore.blob.address import parse_address
from ckptstore.blob.s3 import S3BlobStore
from ckptstore.errors import ConfigError, CredentialsError, StorageError, TransientError
from ckptstore.testing.faults import FaultProxy, FlipBit, Rule
from ckptstore.testing.s3_server import SeaweedServer

MIB = 1024**2
BODY = bytes(range(256)) * 40
Open = Callable[..., S3BlobStore]


@pytest.fixture
def open_store() -> Iterator[Open]:
    opened: list[S3BlobStore] = []

    def make(url: str, environ: dict[str, str] | None, **more: int) -> S3BlobStore:
        opened.append(S3BlobStore(parse_address(url), environ=environ, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any AWS settings."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def moto_proxy(moto_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(moto_endpoint) as proxy:
        yield proxy


# checksums


@pytest.mark.parametrize("checksum", ["auto", "md5", "crc32"])
def test_a_body_damaged_on_its_way_is_refused_when_a_checksum_goes_along(
    seaweed: SeaweedServer, open_store: Open, checksum: str
) -> None:
    with FaultProxy(seaweed.endpoint) as proxy:
        url = proxy.rewrite(seaweed.url(f"damaged-{checksum}")) + f"&checksum={checksum}"
        store = open_store(url, dict(seaweed.environ), single_put_bytes=5 * MIB, part_bytes=5 * MIB)
        store.put("large", bytes(6 * MIB))
        store.put("small", BODY)
        for number, key in enumerate(("small", "large")):
            proxy.clear()
            rule = proxy.add(Rule(FlipBit(in_request=True, at_byte=900), method="PUT"))
            with pytest.raises(TransientError) as caught:
                store.put(key, [BODY[::-1], bytes(6 * MIB)][number])
            assert caught.value.context["reason"] == "damaged"
            assert rule.num_applied
        assert store.get("small") == BODY


def test_bodies_go_without_trailers_and_with_md5_when_the_server_is_not_amazons(
    moto_proxy: FaultProxy, moto_environ: dict[str, str], open_store: Open
) -> None:
    store = open_store(f"s3://ckptstore/headers?endpoint={moto_proxy.endpoint}", moto_environ)
    store.put("k", BODY)
    store.delete(["k"])
    put, delete = moto_proxy.seen
    assert put.headers["content-md5"] == base64.b64encode(hashlib.md5(BODY).digest()).decode()
    assert put.headers["content-length"] == str(len(BODY))
    assert "content-md5" in delete.headers, "DeleteObjects needs it on servers that don't know CRC32"
    for seen in (put, delete):
        assert "aws-chunked" not in seen.headers.get("content-encoding", "")
        assert "x-amz-trailer" not in seen.headers
    assert not any(name.startswith(("x-amz-checksum", "x-amz-sdk")) for name in put.headers)


def test_a_crc_takes_md5s_place_when_the_url_says_so(
    moto_proxy: FaultProxy, moto_environ: dict[str, str], open_store: Open
) -> None:
    store = open_store(f"s3://ckptstore/crc?endpoint={moto_proxy.endpoint}&checksum=crc32", moto_environ)
    store.put("k", BODY)
    (put,) = moto_proxy.seen
    assert put.headers["x-amz-checksum-crc32"] == base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()
    assert "content-md5" not in put.headers


# headers


def test_put_headers_say_how_to_keep_the_object_when_the_url_says_so(
    moto_proxy: FaultProxy, moto_environ: dict[str, str], open_store: Open
) -> None:
    url = (
        f"s3://ckptstore/kept?endpoint={moto_proxy.endpoint}"
        "&storage_class=STANDARD_IA&sse=aws:kms&kms_key=arn:aws:kms:us-east-1:1:key/2&requester_pays=true"
    )
    store = open_store(url, moto_environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)
    store.put("small", BODY)
    store.put("large", bytes(6 * MIB))
    kept = [seen for seen in moto_proxy.seen if seen.path.endswith(("/small", "?uploads"))]
    assert len(kept) == 2
    for seen in kept:
        assert seen.headers["x-amz-storage-class"] == "STANDARD_IA"
        assert seen.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert seen.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "arn:aws:kms:us-east-1:1:key/2"
    store.get("small")
    store.head("small")
    list(store.list())
    store.delete(["small"])
    assert all(seen.headers["x-amz-request-payer"] == "requester" for seen in moto_proxy.seen)


def test_objects_are_tagged_and_classed_on_the_server_when_the_url_says_so(
    seaweed: SeaweedServer, open_store: Open
) -> None:
    url = seaweed.url("tagged") + "&tags=team:nlp,project:a%20b&storage_class=STANDARD_IA&sse=AES256"
    store = open_store(url, dict(seaweed.environ), single_put_bytes=5 * MIB, part_bytes=5 * MIB)
    store.put("small", BODY, if_absent=True)
    store.put("large", bytes(6 * MIB))
    client = store._connection._connected()
    for key in ("small", "large"):
        place = {"Bucket": seaweed.bucket, "Key": f"tagged/{key}"}
        tags = {tag["Key"]: tag["Value"] for tag in client.get_object_tagging(**place)["TagSet"]}  # type: ignore[arg-type]
        assert tags == {"team": "nlp", "project": "a b"}
        found = client.head_object(**place)  # type: ignore[arg-type]
        assert (found["StorageClass"], found["ServerSideEncryption"]) == ("STANDARD_IA", "AES256")
    assert store.get("small") == BODY


@pytest.mark.parametrize("how", ["env", "file"])
def test_only_who_has_the_key_reads_when_it_is_the_customers(
    seaweed: SeaweedServer, open_store: Open, tmp_path: Path, how: str
) -> None:
    key, environ = base64.b64encode(os.urandom(32)), dict(seaweed.environ)
    (tmp_path / "key").write_bytes(key + b"\n")
    place = "env:AWS_CKPT_KEY" if how == "env" else f"file:{tmp_path / 'key'}"
    sized = {"single_put_bytes": 5 * MIB, "part_bytes": 5 * MIB}
    url = seaweed.url(f"customer-{how}")
    store = open_store(f"{url}&sse_c={place}", {**environ, "AWS_CKPT_KEY": key.decode()}, **sized)
    large = os.urandom(6 * MIB)
    store.put("small", BODY, if_absent=True)
    store.put("large", large, if_absent=True)
    assert store.get("small", start=3, length=5) == BODY[3:8]
    assert store.get("large") == large
    info = store.head("large")
    assert info is not None
    assert info.size_bytes == len(large)
    with pytest.raises(StorageError):
        open_store(url, environ).get("small")
    other = open_store(f"{url}&sse_c=env:AWS_CKPT_KEY", {**environ, "AWS_CKPT_KEY": "x" * 32})
    with pytest.raises(StorageError):
        other.get("small")
    assert key.decode() not in f"{store.url} {store!r} {store._kept!r}"


@pytest.mark.parametrize(
    ("options", "environ", "error"),
    [
        ("sse_c=AAAA", {}, ConfigError),
        ("sse_c=env:HOME", {}, ConfigError),
        ("sse_c=file:relative", {}, ConfigError),
        ("sse_c=env:AWS_K&sse=AES256", {"AWS_K": "k" * 32}, ConfigError),
        ("sse_c=env:AWS_K", {}, CredentialsError),
        ("sse_c=env:AWS_K", {"AWS_K": "short"}, CredentialsError),
        ("sse_c=file:/does/not/exist", {}, CredentialsError),
        ("tags=alone", {}, ConfigError),
        ("tags=a:", {}, ConfigError),
    ],
)
def test_opening_fails_when_what_is_asked_for_is_not_to_be_had(
    open_store: Open, options: str, environ: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        open_store(f"s3://bucket/p?{options}", environ)


def test_create_only_asks_first_when_the_server_has_no_conditions(
    moto_proxy: FaultProxy, moto_environ: dict[str, str], open_store: Open
) -> None:
    store = open_store(f"s3://ckptstore/uncond?endpoint={moto_proxy.endpoint}&conditional_put=false", moto_environ)
    assert not store.capabilities.conditional_put
    store.put("k", b"first", if_absent=True)
    with pytest.raises(Exception, match="exists already"):
        store.put("k", b"second", if_absent=True)
    assert [seen.method for seen in moto_proxy.seen if seen.path.endswith("/k")] == ["HEAD", "PUT", "HEAD"]
    assert not any("if-none-match" in seen.headers for seen in moto_proxy.seen)


@pytest.mark.parametrize(
    ("endpoint", "conditional", "style"),
    [
        ("https://oss-cn-beijing.aliyuncs.com", False, "virtual"),
        ("https://minio.example.com", True, "path"),
        ("https://s3.eu-west-1.amazonaws.com", True, "auto"),
        ("http://127.0.0.1:9000", True, "path"),
    ],
)
def test_the_dialect_follows_from_the_endpoint_when_it_is_known(
    open_store: Open, moto_environ: dict[str, str], endpoint: str, conditional: bool, style: str
) -> None:
    store = open_store(f"s3://bucket/p?endpoint={endpoint}", moto_environ)
    assert store.capabilities.conditional_put is conditional
    client = store._connection._connected()
    assert client.meta.config.s3["addressing_style"] == style  # type: ignore[attr-defined]
    amazon = "amazonaws" in endpoint
    assert client.meta.config.request_checksum_calculation == ("when_supported" if amazon else "when_required")  # type: ignore[attr-defined]
    assert client.meta.config.retries["total_max_attempts"] == 1  # type: ignore[attr-defined]


def test_a_virtual_host_is_used_when_asked_for(
    moto_proxy: FaultProxy, moto_environ: dict[str, str], open_store: Open
) -> None:
    """``localhost`` instead of the address, since an address can't have a bucket in front of it."""
    endpoint = moto_proxy.endpoint.replace("127.0.0.1", "localhost")
    store = open_store(f"s3://ckptstore/p?endpoint={endpoint}&addressing=virtual", moto_environ)
    client = store._connection._connected()
    url = client.generate_presigned_url("get_object", Params={"Bucket": "ckptstore", "Key": "k"})
    assert url.startswith(endpoint.replace("://", "://ckptstore."))


# credentials and endpoints


@pytest.mark.usefixtures("no_aws")
def test_the_error_says_what_to_set_when_there_are_no_credentials(open_store: Open) -> None:
    store = open_store("s3://bucket/p?endpoint=http://127.0.0.1:9", {})
    for use in (
        lambda: store.put("k", b""),
        lambda: store.get("k"),
        lambda: store.head("k"),
        lambda: list(store.list()),
    ):
        with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
            use()


@pytest.mark.usefixtures("no_aws")
def test_a_secret_alone_is_refused_when_the_key_is_missing_or_the_other_way_round(open_store: Open) -> None:
    store = open_store("s3://bucket/p?endpoint=http://127.0.0.1:9", {"AWS_ACCESS_KEY_ID": "AKIA"})
    with pytest.raises(CredentialsError):
        store.get("k")


@pytest.mark.usefixtures("no_aws")
def test_the_processs_environment_is_used_when_none_is_given(
    seaweed: SeaweedServer, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweed.endpoint)
    store = open_store(f"s3://{seaweed.bucket}/from-environ", None)
    store.put("k", BODY)
    assert store.get("k") == BODY


@pytest.mark.usefixtures("no_aws")
@pytest.mark.parametrize("how", ["url", "environ", "process", "endpoint in profile"])
def test_a_profile_is_used_when_named(
    seaweed: SeaweedServer, open_store: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[trainer]\n"
        f"aws_access_key_id = {seaweed.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {seaweed.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    endpoint = f"endpoint_url = {seaweed.endpoint}\n" if how.startswith("endpoint") else ""
    (tmp_path / ".aws/config").write_text(f"[profile trainer]\nregion = us-east-1\n{endpoint}")
    url, environ = f"s3://{seaweed.bucket}/profile?endpoint={seaweed.endpoint}", {}
    if how == "url":
        # keys in the environment don't win over a profile that the URL names
        url, environ = f"{url}&profile=trainer", {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    elif how == "environ":
        environ = {"AWS_PROFILE": "trainer"}
    elif how == "process":
        monkeypatch.setenv("AWS_PROFILE", "trainer")
    else:
        url, environ = f"s3://{seaweed.bucket}/profile", {"AWS_PROFILE": "trainer"}
    store = open_store(url, environ)
    store.put("k", BODY)
    assert store.get("k") == BODY


@pytest.mark.usefixtures("no_aws")
def test_a_profile_that_does_not_exist_is_a_usage_error_when_named(open_store: Open) -> None:
    store = open_store("s3://bucket/p?profile=nobody", {})
    with pytest.raises(ConfigError, match="nobody"):
        store.get("k")


def test_no_secret_is_in_any_error_or_url_when_requests_fail(seaweed: SeaweedServer, open_store: Open) -> None:
    environ = {**seaweed.environ, "AWS_SECRET_ACCESS_KEY": "wrong-secret-7781", "AWS_SESSION_TOKEN": "token-9932"}
    store = open_store(seaweed.url("secret"), environ)
    with pytest.raises(Exception, match=r"does not accept the credentials|expired") as caught:
        store.put("k", BODY)
    text = f"{caught.value!r} {caught.value} {store.url}"
    assert "7781" not in text
    assert "9932" not in text


# TLS


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *extra], check=True, capture_output=True)
    with SeaweedServer(certificate=(certificate, key)) as server:
        yield server


def test_everything_works_over_tls_when_the_ca_is_given(tls_server: SeaweedServer, open_store: Open) -> None:
    environ = dict(tls_server.environ)
    store = open_store(tls_server.url("tls"), environ, single_put_bytes=5 * MIB, part_bytes=5 * MIB)
    large = bytes(6 * MIB)
    store.put("small", BODY, if_absent=True)
    store.put("large", large, if_absent=True)
    assert store.get("small", start=1, length=9) == BODY[1:10]
    assert store.get("large") == large
    assert sorted(info.key for info in store.list()) == ["large", "small"]
    store.delete(["small", "large"])
    assert list(store.list()) == []


def test_a_certificate_nobody_vouches_for_is_refused_when_the_ca_is_not_given(
    tls_server: SeaweedServer, open_store: Open
) -> None:
    environ = {name: value for name, value in tls_server.environ.items() if name != "AWS_CA_BUNDLE"}
    store = open_store(tls_server.url("tls"), environ)
    with pytest.raises(ConfigError, match="AWS_CA_BUNDLE"):
        store.get("k")


# the server itself


def test_the_server_keeps_its_data_when_it_is_killed_and_restarted(tmp_path: Path, open_store: Open) -> None:
    with SeaweedServer(tmp_path / "data") as server:
        store = open_store(server.url("kept"), dict(server.environ))
        store.put("k", BODY)
        server.kill()
        with pytest.raises(TransientError):
            store.get("k")
        server.restart()
        deadline = time.monotonic() + 60
        while True:  # it takes writes some seconds before it finds again what it had
            try:
                assert store.get("k") == BODY
                break
            except TransientError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_the_server_dies_with_its_starter_when_that_one_is_killed(tmp_path: Path) -> None:
    script = """
import os, signal, threading
from ckptstore.testing.s3_server import SeaweedServer
server = SeaweedServer()
thread = threading.Thread(target=server.__enter__)
thread.start(); thread.join()          # the thread that started it is gone, and the server lives
server.restart()
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == -9, ran.stderr
    pid = int(ran.stdout)
    for _ in range(100):
        if not _is_running(pid):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail(f"the server {pid} outlived its starter")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
