"""How objects are kept, as the URL says: storage class, tags, encryption at rest, and a key of the customer's own."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ckptstore.blob.address import Address
from ckptstore.errors import CredentialsError

#: Parameters of the URL that are dealt with here.
KEPT = frozenset({"storage_class", "tags", "sse", "kms_key", "sse_c"})
_KEY_BYTES = 32


@dataclass(frozen=True)
class Kept:
    """Parameters of requests.

    Attributes:
        at_rest: of those that create an object.
        for_customer: of all that write or read one encrypted with a customer's key. Never shown.
    """

    at_rest: Mapping[str, Any] = field(default_factory=dict)
    for_customer: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, address: Address, environ: Mapping[str, str] | None) -> Kept:
        """What this URL asks for.

        Raises:
            ConfigError: it contradicts itself.
            CredentialsError: the customer's key can't be had, or is none.
        """
        at_rest: dict[str, Any] = {}
        if storage_class := address.params.get("storage_class"):
            at_rest["StorageClass"] = storage_class
        if "tags" in address.params:
            at_rest["Tagging"] = urlencode(address.tags("tags"))
        encryption, kms_key = address.params.get("sse"), address.params.get("kms_key")
        if encryption is not None:
            at_rest["ServerSideEncryption"] = address.choice("sse", ("AES256", "aws:kms", "aws:kms:dsse"), "AES256")
        if kms_key is not None:
            if not (encryption or "").startswith("aws:kms"):
                raise address.refuse("has kms_key without sse=aws:kms", hint="add sse=aws:kms, or take kms_key out")
            at_rest["SSEKMSKeyId"] = kms_key
        place = address.params.get("sse_c")
        if place is None:
            return cls(at_rest)
        if encryption is not None:
            raise address.refuse("has both sse and sse_c", hint="an object is encrypted one way: take one of them out")
        key = _customer_key(address, place, os.environ if environ is None else environ)
        return cls(at_rest, {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key})


def _customer_key(address: Address, place: str, environ: Mapping[str, str]) -> bytes:
    """The key, from where the URL says it is."""
    kind, _, name = place.partition(":")
    if kind == "env" and name.startswith("AWS_"):  # which is what trainers pass on to their agent
        text = environ.get(name, "").encode()
    elif kind == "file" and name.startswith("/"):
        try:
            text = Path(name).read_bytes()
        except OSError as error:
            raise CredentialsError(
                f"the customer's key in {name} can't be read: {error.strerror}", url=address.url
            ) from None
    else:
        raise address.refuse(
            "has an sse_c that names no place", hint="write sse_c=env:AWS_NAME or sse_c=file:/abs/path"
        )
    if len(text) == _KEY_BYTES:
        return text
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != _KEY_BYTES:
        raise CredentialsError(
            f"sse_c={place} holds no key of 256 bits",
            hint="32 bytes, or their base64: openssl rand -base64 32",
            url=address.url,
        )
    return key
