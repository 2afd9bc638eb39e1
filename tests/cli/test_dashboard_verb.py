"""`ckptctl dashboard` and `ckptctl plot` as a person starts them."""

from __future__ import annotations

import json
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
from dashboard_server import add_save

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


def get(url: str, body: bytes | None = None, **headers: str) -> str:
    """The page; with a body, what a POST of it leads to. Headers do not follow a redirect to elsewhere."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as answer:
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


@pytest.mark.parametrize(
    ("name", "code"), [("report.gif", 2), ("there.html", 14), ("no/such/folder.html", 1), ("there.html/x.html", 1)]
)
def test_plot_refuses_when_it_can_not_write(root: Path, tmp_path: Path, name: str, code: int) -> None:
    (tmp_path / "there.html").write_text("mine")
    command = [*COMMAND, "plot", str(root), "-o", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "there.html").read_text() == "mine"


def test_torch_and_the_sdks_stay_out_of_the_dashboard() -> None:
    code = "import sys, ckptstore.dashboard.serve; print({'torch', 'boto3', 'oss2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("kind", "begins"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml")])
def test_plot_draws_a_picture_without_a_browser(root: Path, tmp_path: Path, kind: str, begins: bytes) -> None:
    report = tmp_path / f"report.{kind}"
    # An odd name must stay a name: matplotlib reads formulas between dollars, and this is none.
    add_save(root, 200, metrics={"loss $\\frac{1$ 损失": 0.5, "b": "nan"})
    command = [*COMMAND, "plot", str(root), "-o", str(report), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert report.read_bytes().startswith(begins)
    assert json.loads(done.stdout)["size_bytes"] == report.stat().st_size > 5000
    assert [path.name for path in tmp_path.glob(".report*")] == []


def test_dashboard_lets_nobody_act_without_the_token(root: Path) -> None:
    page = "run/bert/checkpoint/0123456789ab-1/"
    with dashboard(str(root), "--allow-actions") as address:
        bare, _, token = address.partition("?token=")
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Origin": bare.rstrip("/")}):
            with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
                get(f"{bare}{page}pin", b"", **headers)
        assert not LocalTier(root).pins("bert")
        assert "pinned" in get(f"{bare}{page}pin", b"", Authorization=f"Bearer {token}")
        assert LocalTier(root).pins("bert") == {"0123456789ab-1"}
