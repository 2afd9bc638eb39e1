"""What the server behind an S3 URL is like, found out by trying: for `doctor`."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ckptstore.blob.base import Trait, transport
from ckptstore.blob.bucket import md5_base64
from ckptstore.blob.s3.connection import S3Connection
from ckptstore.errors import StorageError

_BODY = b"ckptstore doctor\n"
_MD5, _CRC32 = "Content-MD5", "x-amz-checksum-crc32"


def traits(connection: S3Connection, name: str, along: Mapping[str, Any]) -> list[Trait]:
    """TLS, addressing and checksums; writes the object ``name`` up to four times, with what goes along with uploads.

    Raises:
        CkptError: the server can't be asked.
    """
    with connection.request("look at the endpoint", name) as client:
        host = urlsplit(client.generate_presigned_url("get_object", {"Bucket": connection.bucket, "Key": name}))
        endpoint = client.meta.endpoint_url
    return [
        transport(endpoint),
        _addressing(host.hostname or "", connection.bucket),
        _checksums(connection, name, along),
    ]


def _addressing(host: str, bucket: str) -> Trait:
    if host.startswith(f"{bucket}."):
        return Trait("addressing", True, "virtual: the bucket is part of the host name")
    return Trait("addressing", True, "path: the bucket is the first part of the path")


def _checksums(connection: S3Connection, name: str, along: Mapping[str, Any]) -> Trait:
    """Whether the server notices a body that isn't what its checksum says, in the dialect in use and in the other."""
    with connection.request("look at the endpoint", name) as client:
        used = connection.dialect(client)
    checked = {
        _MD5: _is_checked(connection, name, along, "ContentMD5", md5_base64(_BODY), md5_base64(b"other")),
        _CRC32: _is_checked(connection, name, along, "ChecksumCRC32", *_crc32_pair()),
    }
    if used is None:
        return Trait("checksums", False, "uploads carry none", "take checksum=none out of the URL")
    if not checked[used]:
        other = "crc32" if used == _MD5 else "md5"
        better = checked[_CRC32 if used == _MD5 else _MD5]
        fix = f"add checksum={other} to the URL: the server checks that" if better else "`verify --read-data` finds it"
        return Trait("checksums", False, f"{used} is sent, but a body it doesn't fit is accepted all the same", fix)
    more = (
        "; checksum=crc32 in the URL works too and takes half the CPU time" if used == _MD5 and checked[_CRC32] else ""
    )
    return Trait("checksums", True, f"{used}: a body that doesn't fit it is refused{more}")


def _is_checked(
    connection: S3Connection, name: str, along: Mapping[str, Any], field: str, right: str, wrong: str
) -> bool:
    for value, is_right in ((right, True), (wrong, False)):
        body: dict[str, Any] = {"Bucket": connection.bucket, "Key": name, "Body": _BODY, field: value, **along}
        try:
            with connection.request("try a checksum", name) as client:
                client.put_object(**body)
        except StorageError as error:
            if error.context.get("reason") not in (None, "damaged"):
                raise  # it can't be reached now: that says nothing
            if is_right:
                return False
        else:
            if not is_right:
                return False
    return True


def _crc32_pair() -> tuple[str, str]:
    value = zlib.crc32(_BODY)
    right, wrong = (base64.b64encode(number.to_bytes(4, "big")).decode() for number in (value, value ^ 1))
    return right, wrong
