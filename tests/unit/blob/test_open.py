"""URL -> store, and what opening costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from ckptstore.blob import BlobStore, open_blob_store, url
from ckptstore.blob.memory import MemoryBlobStore
from ckptstore.blob.retry import RetryingBlobStore
from ckptstore.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/path",
        "gs://bucket",
        "http://host/bucket",
        "file://host/path",
        "file:relative",
        "file:///",
        "file://",
    ],
)
def test_a_url_is_a_usage_error_when_no_store_is_behind_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_blob_store(text)
    assert caught.value.exit_code == 2


def test_an_unknown_scheme_names_the_known_ones_when_refused() -> None:
    with pytest.raises(ConfigError, match="file, mem, oss, s3"):
        open_blob_store("gcs://bucket")


@pytest.mark.parametrize(
    "text",
    [
        "s3://b?addressing=subdomain",
        "s3://b?endpoint=localhost:9000",
        "s3://b?sse=none",
        "s3://b?kms_key=k",
        "s3://b?sse=AES256&kms_key=k",
        "s3://b?requester_pays=maybe",
        "s3://b?checksum=sha3",
        "s3://b?retries=7",
    ],
)
def test_an_s3_url_is_refused_at_once_when_a_parameter_cannot_be_right(text: str) -> None:
    with pytest.raises(ConfigError):
        open_blob_store(text, environ={})


def test_stores_of_one_memory_name_share_their_objects_when_opened_twice() -> None:
    open_blob_store("mem://shared/a").put("k", b"1")
    assert open_blob_store("mem://shared/a").get("k") == b"1"
    assert [info.key for info in open_blob_store("mem://shared").list()] == ["a/k"]
    assert list(open_blob_store("mem://other").list()) == []


def test_retries_are_around_the_store_when_asked_for() -> None:
    assert isinstance(open_blob_store("mem://x"), RetryingBlobStore)
    assert isinstance(open_blob_store("mem://x", retry=False), MemoryBlobStore)


def test_a_third_partys_store_opens_when_its_entry_point_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("tape", f"{__name__}:open_tape", url.ENTRY_POINT_GROUP)
    broken = EntryPoint("broken", f"{__name__}:open_broken", url.ENTRY_POINT_GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: EntryPoints([entry, broken]))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[test_retries_are_around_the_store_when_asked_for.__module__])
    store = open_blob_store("tape://library/7", environ={"A": "b"}, retry=False)
    assert isinstance(store, MemoryBlobStore)
    with pytest.raises(ConfigError, match="did not return a BlobStore"):
        open_blob_store("broken://x")
    with pytest.raises(ConfigError, match="tape"):
        open_blob_store("unknown://x")


def open_tape(text: str, environ: Mapping[str, str] | None) -> BlobStore:
    assert (text, environ) == ("tape://library/7", {"A": "b"})
    return MemoryBlobStore("tape")


def open_broken(text: str, environ: Mapping[str, str] | None) -> object:
    return object()


def test_no_sdk_is_imported_when_a_store_is_only_opened(tmp_path: Path) -> None:
    script = f"""
import sys
from ckptstore.blob import open_blob_store
for text in ("s3://bucket/prefix", "oss://bucket/prefix?region=cn-beijing", "file://{tmp_path}/x", "mem://x"):
    open_blob_store(text, environ={{}}).close()
loaded = {{"boto3", "botocore", "oss2", "requests", "torch", "numpy", "pydantic"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_pip_line_is_in_the_error_when_an_extra_is_missing(tmp_path: Path) -> None:
    script = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "oss2":
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "oss2" else real(name, package)
from ckptstore.blob import open_blob_store
from ckptstore.errors import ConfigError
try:
    open_blob_store("oss://bucket/prefix?region=cn-beijing")
except ConfigError as error:
    assert "pip install 'ckptstore[oss]'" in str(error), error
else:
    raise SystemExit("opened")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
