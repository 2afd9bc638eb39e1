"""What `doctor` finds out about a server: transport, addressing, checksums, and rules that would eat checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckptstore.blob import open_blob_store
from ckptstore.blob.base import Trait, transport
from ckptstore.blob.oss_traits import addressing
from ckptstore.testing.oss_server import OSSServer
from ckptstore.testing.s3_server import SeaweedServer


def traits(url: str, environ: Mapping[str, str]) -> dict[str, Trait]:
    store = open_blob_store(url, environ=dict(environ))
    try:
        found = store.traits("doctor/scratch")
        store.delete(["doctor/scratch"])
        assert [info.key for info in store.list("doctor/")] == []
    finally:
        store.close()
    return {trait.name: trait for trait in found}


@pytest.mark.parametrize(
    ("more", "is_right", "told"),
    [
        ("", True, "Content-MD5: a body that doesn't fit it is refused; checksum=crc32"),
        ("&checksum=crc32", True, "x-amz-checksum-crc32: a body that doesn't fit it is refused"),
        ("&checksum=none", False, "uploads carry none"),
    ],
)
def test_s3_checksums_are_tried_in_the_dialect_of_the_url(
    seaweed: SeaweedServer, more: str, is_right: bool, told: str
) -> None:
    found = traits(seaweed.url("traits") + more, seaweed.environ)
    assert found["checksums"].is_right is is_right
    assert found["checksums"].detail.startswith(told)
    assert is_right == (found["checksums"].fix is None)
    assert found["addressing"].detail.startswith("path")
    assert found["TLS"].is_right


def test_a_server_that_takes_any_checksum_is_found_out(moto_endpoint: str, moto_environ: dict[str, str]) -> None:
    found = traits(f"s3://ckptstore/traits?endpoint={moto_endpoint}&checksum=crc32", moto_environ)
    assert not found["checksums"].is_right
    assert "accepted all the same" in found["checksums"].detail
    assert found["checksums"].fix


def test_clear_text_is_right_only_where_it_does_not_leave_the_machine() -> None:
    assert transport("http://127.0.0.1:9000").is_right
    assert transport("https://minio.example").is_right
    clear = transport("http://minio.example:9000")
    assert not clear.is_right
    assert clear.fix == "use endpoint=https://minio.example:9000"


def test_oss_addressing_names_where_the_bucket_stands(oss: OSSServer) -> None:
    found = traits(oss.url("traits"), oss.environ)
    assert found["addressing"].detail == f"virtual: ckptstore.{oss.public_host}"
    assert not found["TLS"].is_right
    assert found["checksums"].is_right
    assert addressing("10.0.0.1", "b", is_cname=False).detail.startswith("path")
    assert "own" in addressing("ckpt.example", "b", is_cname=True).detail


RULE = "<Rule><ID>{name}</ID><Prefix>{prefix}</Prefix><Status>{status}</Status>{what}</Rule>"
EXPIRES = "<Expiration><Days>30</Days></Expiration>"


def test_oss_lifecycle_rules_that_take_objects_away_are_told() -> None:
    rules = [
        RULE.format(name="all", prefix="", status="Enabled", what=EXPIRES),
        RULE.format(name="below", prefix="ck/pt/runs/", status="Enabled", what=EXPIRES),
        RULE.format(name="off", prefix="", status="Disabled", what=EXPIRES),
        RULE.format(name="elsewhere", prefix="logs/", status="Enabled", what=EXPIRES),
        RULE.format(
            name="parts", prefix="", status="Enabled",
            what="<AbortMultipartUpload><Days>7</Days></AbortMultipartUpload>",
        ),
    ]  # fmt: skip
    move = "<Transition><Days>9</Days><StorageClass>{}</StorageClass></Transition>"
    rules += [
        RULE.format(name=name, prefix="ck/", status="Enabled", what=move.format(name))
        for name in ("IA", "Archive", "ColdArchive")
    ]
    with OSSServer() as server:
        store = open_blob_store(server.url("ck/pt"), environ=server.environ)
        assert store.deletion_rules() == [], "there are none"
        server.lifecycle = f"<LifecycleConfiguration>{''.join(rules)}</LifecycleConfiguration>"
        assert store.deletion_rules() == [
            "rule 'all' deletes objects by age",
            "rule 'below' deletes objects by age",
            "rule 'Archive' freezes objects by age",
            "rule 'ColdArchive' freezes objects by age",
        ]
        store.close()
