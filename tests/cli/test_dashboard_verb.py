"""`ckptctl dashboard` and `ckptctl plot` as a person starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptstore.repo.local import LocalTier
from ckptstore.testing.local_saves import write_save

COMMAND = [sys.executable, "-m", "ckptstore.cli"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tier = LocalTier(tmp_path / "store")
    tier.create()
    write_save(tier, "bert", 100, "0123456789ab-1")
    return tier.root


@contextmanager
def dashboard(*args: str, **environ: str) -> Iterator[str]:
    """The address that the dashboard printed."""
    process = subprocess.Popen(
        [*COMMAND, "dashboard", *args, "--port", "0"], stdout=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(15) in (0, 130)
        process.stdout.close()


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return str(answer.read().decode())


def test_dashboard_answers_at_the_address_it_prints(root: Path) -> None:
    with dashboard(str(root)) as address:
        assert address.startswith("http://127.0.0.1:")
        assert "bert" in get(address)


def test_dashboard_makes_a_token_when_others_can_reach_it(root: Path) -> None:
    with dashboard(str(root), "--host", "0.0.0.0") as address:
        address = address.replace("0.0.0.0", "127.0.0.1")
        bare, _, token = address.partition("?token=")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(bare)
        assert "bert" in get(bare, Authorization=f"Bearer {token}")


def test_dashboard_takes_the_token_of_the_environment(root: Path) -> None:
    with dashboard(str(root), CKPTSTORE_DASHBOARD_TOKEN="a-token-of-our-own") as address:
        assert address.endswith("?token=a-token-of-our-own")


def test_dashboard_refuses_when_there_is_no_store(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "dashboard", str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert done.returncode == 10


@pytest.mark.parametrize(("name", "code"), [("report.png", 2), ("there.html", 14), ("no/such/folder.html", 1)])
def test_plot_refuses_when_it_can_not_write(root: Path, tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "there.html").write_text("mine")
    command = [*COMMAND, "plot", str(root), "-o", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "there.html").read_text() == "mine"


def test_torch_and_the_sdks_stay_out_of_the_dashboard() -> None:
    code = "import sys, ckptstore.dashboard.serve; print({'torch', 'boto3', 'oss2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
