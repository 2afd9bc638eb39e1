"""Byte ranges, answered exactly or not at all."""

from __future__ import annotations

from ckptstore.errors import IntegrityError


def exact_range(size_bytes: int, start: int, length: int | None, *, what: str) -> tuple[int, int]:
    """First and past-the-last byte of a range within an object of this size.

    Raises:
        IntegrityError: the range reaches past the end.
    """
    end = size_bytes if length is None else start + length
    if start > size_bytes or end > size_bytes:
        raise past_the_end(what, start, length, size_bytes)
    return start, end


def past_the_end(what: str, start: int, length: int | None, size_bytes: int | None) -> IntegrityError:
    """The error for a range that an object doesn't have."""
    has = "fewer" if size_bytes is None else f"only {size_bytes}"
    wanted = f"bytes from {start} on" if length is None else f"bytes {start} to {start + length}"
    return IntegrityError(f"{what} has {has} bytes; {wanted} were asked for", size_bytes=size_bytes, start=start)
