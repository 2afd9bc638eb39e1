"""What a bucket of Alibaba OSS is like: its lifecycle rules, and how it is reached. For `doctor`."""

from __future__ import annotations

import ipaddress
from typing import Any

from ckptstore.blob.base import Trait

#: Storage classes that have to be thawed before they can be read.
_FROZEN = frozenset({"Archive", "ColdArchive", "DeepColdArchive"})

#: Not a matter of the server's goodwill: the client compares.
CHECKSUMS = Trait("checksums", True, "the CRC-64 of what was stored comes back with each upload and is compared")


def addressing(host: str, bucket: str, *, is_cname: bool) -> Trait:
    """Where the bucket's name stands in requests."""
    if is_cname:
        return Trait("addressing", True, f"{host} is a domain of the bucket's own")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return Trait("addressing", True, f"virtual: {bucket}.{host}")
    return Trait("addressing", True, "path: the endpoint is a bare address")


def deletes(rule: Any, prefix: str) -> str | None:
    """What a lifecycle rule does to objects below ``prefix``, if it takes them away.

    Args:
        rule: An ``oss2.models.LifecycleRule``.
        prefix: The store's own.
    """
    start = rule.prefix or ""
    if rule.status != "Enabled" or not (start.startswith(prefix) or prefix.startswith(start)):
        return None
    name = f"rule {rule.id or start!r}"
    ages = rule.expiration
    if ages is not None and (ages.days is not None or ages.date is not None or ages.created_before_date is not None):
        return f"{name} deletes objects by age"
    if any(move.storage_class in _FROZEN for move in rule.storage_transitions or ()):
        return f"{name} freezes objects by age"
    return None
