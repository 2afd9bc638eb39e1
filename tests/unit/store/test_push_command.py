"""The command that finishes a store's uploads."""

from __future__ import annotations

import shlex

import pytest

from ckptstore import CheckpointStore

URL = "s3://bucket/prefix?endpoint=http://127.0.0.1:9000&region=us-east-1"


@pytest.mark.parametrize(
    ("remote", "named"), [(URL, URL), (["file:///a", "file:///b"], "URL")], ids=["one remote", "several"]
)
def test_it_can_be_pasted_as_it_is_when_there_is_one_remote(remote: object, named: str) -> None:
    store = CheckpointStore("/data/my ckpt", remote, run="bert")  # type: ignore[arg-type]
    words = ["ckptctl", "push", "/data/my ckpt", "--remote", named, "--run", "bert"]
    assert shlex.split(store.push_command) == words
