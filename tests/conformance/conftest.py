"""Servers for the stores: each started once, by the first test that needs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("ckptstore.testing.blob_store_tests")

from ckptstore.blob.address import parse_address  # noqa: E402 - after the rewrite is registered
from ckptstore.blob.s3 import S3BlobStore  # noqa: E402
from ckptstore.testing.oss_server import OSSServer  # noqa: E402
from ckptstore.testing.s3_server import SeaweedServer  # noqa: E402


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedServer]:
    with SeaweedServer() as server:
        yield server


@pytest.fixture(scope="session")
def oss() -> Iterator[OSSServer]:
    with OSSServer() as server:
        yield server


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """moto in a process of its own, with a bucket named ``ckptstore``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    ) as process:
        try:
            _wait_for(f"{endpoint}/moto-api/data.json")
            store = S3BlobStore(parse_address(f"s3://ckptstore?endpoint={endpoint}"), environ=MOTO_ENVIRON)
            store.make_bucket()
            store.close()
            yield endpoint
        finally:
            process.terminate()


MOTO_ENVIRON = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def moto_environ() -> dict[str, str]:
    return MOTO_ENVIRON


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
