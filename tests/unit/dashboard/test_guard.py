"""Who gets an answer from the dashboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_server import Served, add_save, served

from ckptstore.dashboard.guard import is_loopback
from ckptstore.dashboard.serve import serve
from ckptstore.errors import ConfigError
from ckptstore.ops.open import open_place

TOKEN = "a-token-nobody-guesses"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guard") / "store"
    add_save(root, 100)
    return root


@pytest.fixture(scope="module")
def open_one(root: Path) -> Iterator[Served]:
    with served(str(root)) as one:
        yield one


@pytest.fixture(scope="module")
def locked(root: Path) -> Iterator[Served]:
    with served(str(root), token=TOKEN, prefix="/ckpt") as one:
        yield one


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "169.254.169.254"])
def test_refuses_when_the_host_is_not_ours(open_one: Served, host: str) -> None:
    assert open_one.get("/", Host=host).status == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8350", "LOCALHOST", "[::1]:8350"])
def test_answers_when_the_host_is_this_machine(open_one: Served, host: str) -> None:
    assert open_one.get("/", Host=host).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_refuses_when_another_site_asks(open_one: Served, origin: str) -> None:
    assert open_one.get("/api/status.json", Origin=origin).status == 403


def test_answers_when_our_own_page_asks(open_one: Served) -> None:
    assert open_one.get("/api/status.json", Origin=open_one.url.rstrip("/")).status == 200


def test_refuses_when_another_site_embeds_us(open_one: Served) -> None:
    assert open_one.get("/static/app.js", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    assert open_one.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_refuses_when_it_is_asked_to_change_something(open_one: Served, method: str) -> None:
    assert open_one.get("/", method).status == 405


@pytest.mark.parametrize("path", ["/", "/run/bert/training", "/nope", "/api/status.json", "/static/app.js"])
def test_the_content_policy_allows_nothing_inline(open_one: Served, path: str) -> None:
    answer = open_one.get(path)
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    if answer.headers["content-type"].startswith("text/html"):
        assert not re.search(r"\son[a-z]+\s*=|\sstyle\s*=|<script(?![^>]*\ssrc=)", answer.text)


def test_a_nonce_is_never_used_twice(open_one: Served) -> None:
    first, second = (open_one.get("/run/bert/training") for _ in range(2))
    nonces = [set(re.findall(r'nonce="([^"]+)"', answer.text)) for answer in (first, second)]
    assert all(len(found) == 1 for found in nonces)
    assert nonces[0] != nonces[1]


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/app.py", "/run/../../etc/"])
def test_serves_no_other_files(open_one: Served, path: str) -> None:
    assert open_one.get(path).status == 404


def test_asks_for_the_token_when_there_is_one(locked: Served) -> None:
    for path in ("/ckpt/", "/ckpt/api/status.json", "/ckpt/static/app.js"):
        assert locked.get(path).status == 401
    assert locked.get("/ckpt/", Authorization="Bearer wrong").status == 401
    assert locked.get("/ckpt/?token=wrong").status == 401
    assert locked.get("/ckpt/", Authorization=f"Bearer {TOKEN}").status == 200


def test_the_token_moves_from_the_address_into_a_cookie(locked: Served) -> None:
    answer = locked.get(f"/ckpt/run/bert/checkpoints?q=1&token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "checkpoints?q=1")
    cookie = answer.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    page = locked.get("/ckpt/", Cookie=cookie.partition(";")[0])
    assert page.status == 200
    assert TOKEN not in page.text


def test_every_address_is_relative_when_a_proxy_leaves_a_prefix(locked: Served) -> None:
    page = locked.get("/ckpt/run/bert/checkpoints", Authorization=f"Bearer {TOKEN}").text
    found = re.findall(r'(?:href|src|action)="([^"]*)"', page)
    assert found
    assert not [address for address in found if address.startswith("/") or "://" in address]
    assert locked.get("/ckpt").headers["location"] == "ckpt/"
    assert locked.get("/other/").status == 404


@pytest.mark.parametrize(("host", "token"), [("0.0.0.0", None), ("::", None), ("127.0.0.1", "short")])
def test_does_not_serve_when_others_could_look(root: Path, host: str, token: str | None) -> None:
    place = open_place(str(root))
    with pytest.raises(ConfigError, match="token"):
        serve(place, store="s", host=host, port=0, token=token, announce=lambda _: None)


def test_loopback_is_known() -> None:
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.1", "0.0.0.0", "node7")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
