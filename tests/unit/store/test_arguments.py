"""What a store is told of its places, and what it tells of them."""

from __future__ import annotations

import shlex

import pytest

from ckptstore import CheckpointStore, errors

URL = "s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1"


@pytest.mark.parametrize(
    ("remote", "named"), [(URL, URL), (["file:///a", "file:///b"], "URL")], ids=["one remote", "several"]
)
def test_it_can_be_pasted_as_it_is_when_there_is_one_remote(remote: object, named: str) -> None:
    store = CheckpointStore("/data/my ckpt", remote, run="bert")
    words = ["ckptctl", "push", "/data/my ckpt", "--remote", named, "--run", "bert"]
    assert shlex.split(store.push_command) == words


def test_a_url_is_no_folder_and_a_folder_no_url() -> None:
    with pytest.raises(errors.ConfigError, match="the local tier is a folder, and 's3://bucket/x' a URL"):
        CheckpointStore("s3://bucket/x")
    for wrong in ("s3:/bucket/x", "/data/bucket"):
        with pytest.raises(errors.ConfigError, match=f"'{wrong}' is not a store URL"):
            CheckpointStore("/data/ckpt", wrong)
