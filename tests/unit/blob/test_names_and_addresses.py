"""Keys, URLs, ranges, parts: the pure pieces."""

from __future__ import annotations

import string
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.blob.address import parse_address
from ckptstore.blob.keys import check_prefix, is_key
from ckptstore.blob.multipart import MAX_PARTS, parts_of
from ckptstore.blob.ranges import exact_range
from ckptstore.errors import ConfigError, IntegrityError

SEGMENTS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=12).filter(
    lambda segment: segment not in (".", "..")
)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=6).map("/".join)


@given(KEYS)
def test_a_key_is_accepted_with_all_its_beginnings_when_the_grammar_allows_it(key: str) -> None:
    assert is_key(key)
    for end in range(len(key) + 1):
        assert check_prefix(key[:end]) == key[:end]


@given(
    KEYS, st.sampled_from(["/", "//", "/../", "/./", "\\", " ", "\0", "\n", "é", "~", "%2e", "?", "#"]), st.integers(0)
)
def test_a_key_is_refused_when_something_foreign_is_put_into_it(key: str, foreign: str, where: int) -> None:
    cut = where % (len(key) + 1)
    changed = key[:cut] + foreign + key[cut:]
    within = foreign == "/" and is_key(changed)
    assert within or not is_key(changed)


@given(st.text())
def test_a_key_never_leaves_its_folder_when_it_is_any_text(text: str) -> None:
    if is_key(text):
        assert not text.startswith("/")
        assert not {"", ".", ".."} & set(text.split("/"))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.none() | st.integers(0, 10**6))
def test_a_range_is_exact_or_refused_when_sizes_are_any(size: int, start: int, length: int | None) -> None:
    fits = start <= size and (length is None or start + length <= size)
    if fits:
        first, last = exact_range(size, start, length, what="it")
        assert first == start
        assert last - first == (size - start if length is None else length)
    else:
        with pytest.raises(IntegrityError):
            exact_range(size, start, length, what="it")


@given(st.integers(1, 5 * 1024**4), st.integers(5 * 1024**2, 64 * 1024**2))
def test_parts_cover_the_body_within_the_servers_limits_when_sizes_are_any(size: int, part: int) -> None:
    parts = parts_of(size, part)
    assert len(parts) <= MAX_PARTS
    assert parts[0].start == 0
    assert parts[-1].stop == size
    assert all(before.stop == after.start for before, after in pairwise(parts))
    sizes = {piece.stop - piece.start for piece in parts[:-1]}
    assert len(sizes) <= 1
    assert all(part <= piece <= 5 * 1024**3 for piece in sizes)
    assert [piece.number for piece in parts] == list(range(1, len(parts) + 1))


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@bucket/prefix",
        "s3://user@bucket/prefix",
        "s3://bucket/prefix?aws_secret_access_key=wJalrXUtnFEMI",
        "s3://bucket/prefix?session_token=wJalrXUtnFEMI",
        "s3://bucket/prefix?X-Amz-Signature=wJalrXUtnFEMI",
        "s3://bucket/prefix?endpoint=http://key:wJalrXUtnFEMI@host:9000",
        "oss://bucket/prefix?OSSAccessKeyId=wJalrXUtnFEMI",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated_when_found(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(url)
    assert "wJalrXUtnFEMI" not in str(caught.value) + repr(caught.value.context)
    assert "credentials" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "bucket/prefix", "/abs/path", "s3:bucket", "s3://b?region=a&region=b", "s3://b/p#f", "s3://[b/p"]
)
def test_a_url_is_refused_when_it_is_none_or_ambiguous(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(url)


@pytest.mark.parametrize("url", ["s3:///prefix", "s3://b/a//c", "s3://b/a/../c", "s3://b/a%20b", "s3://b/p?unknown=1"])
def test_a_bucket_url_is_refused_when_its_parts_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(url).bucket_and_prefix(())


@given(KEYS)
def test_bucket_and_prefix_are_those_of_the_url_when_it_is_well_formed(key: str) -> None:
    for url in (f"s3://bucket/{key}", f"s3://bucket/{key}/"):
        assert parse_address(url).bucket_and_prefix(()) == ("bucket", f"{key}/")
    assert parse_address("s3://bucket").bucket_and_prefix(()) == ("bucket", "")
