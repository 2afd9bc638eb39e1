"""Pin, unpin and verify from a page: who may, and what comes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from dashboard_server import JOB, Served, eventually, served, write_run

from ckptstore.errors import ConfigError
from ckptstore.ops.history import verified
from ckptstore.repo.local import LocalTier

TOKEN = "a-token-nobody-guesses"
PAGE = f"/run/bert/checkpoint/{JOB}-2/"
FORM = {"Content_Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("actions")
    write_run(folder, "bert", 3)
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Served]:
    with served(str(folder / "store"), f"file://{folder}/bucket", token=TOKEN, allow_actions=True) as one:
        yield one


@pytest.fixture(scope="module")
def visitor(site: Served) -> dict[str, str]:
    """What a browser sends that came with the token."""
    cookie = site.get(f"/?token={TOKEN}").headers["set-cookie"].partition(";")[0]
    return {"Cookie": cookie, "Origin": site.url.rstrip("/"), **FORM}


@pytest.fixture(scope="module")
def form(site: Served, visitor: dict[str, str]) -> str:
    page = site.get(PAGE, **visitor).text
    return urlencode({"form_token": re.findall(r'name="form_token" value="([0-9a-f]{64})"', page)[0]})


def pins(folder: Path) -> set[str]:
    return LocalTier(folder / "store").pins("bert")


def test_a_pin_is_set_and_taken_back(site: Served, folder: Path, visitor: dict[str, str], form: str) -> None:
    done = site.get(f"{PAGE}pin", "POST", form, **visitor)
    assert (done.status, done.headers["location"]) == (303, "./")
    assert pins(folder) == {f"{JOB}-2"}
    assert list((folder / "bucket/runs/bert/pins").iterdir()), "in every tier that has it"
    assert 'action="unpin"' in site.get(PAGE, **visitor).text, "the next page shows it"
    site.get(f"{PAGE}unpin", "POST", form, **visitor)
    assert pins(folder) == set()


def test_a_verification_reads_every_byte_and_is_remembered(
    site: Served, folder: Path, visitor: dict[str, str], form: str
) -> None:
    assert site.get(f"{PAGE}verify", "POST", form, **visitor).status == 303
    eventually(lambda: "every byte is right" in site.get(PAGE, **visitor).text)
    records = verified(LocalTier(folder / "store"), "bert", f"{JOB}-2")
    assert [(r["tier"], r["depth"], r["result"]) for r in records] == [
        ("local", "bytes", "good"),
        ("file", "bytes", "good"),
    ]
    assert site.get(PAGE, **visitor).text.count("✓ good") == 2


def test_a_verification_finds_damage(tmp_path: Path) -> None:
    write_run(tmp_path, "bert", 1, pushed=0)
    (shard,) = (tmp_path / "store").rglob("__0_0.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with served(str(tmp_path / "store"), token=TOKEN, allow_actions=True) as one:
        page, bearer = f"/run/bert/checkpoint/{JOB}-1/", {"Authorization": f"Bearer {TOKEN}"}
        assert one.get(f"{page}verify", "POST", **bearer).status == 303, "a script brings the token itself"
        eventually(lambda: 'class="bad">damaged' in one.get(page, **bearer).text)


@pytest.mark.parametrize(
    ("missing", "status"),
    [
        ({"Origin": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Cookie": "ckptstore_dashboard=guess"}, 401),
        ({"Cookie": ""}, 401),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
    ],
)
def test_nothing_happens_when_somebody_else_asks(
    site: Served, folder: Path, visitor: dict[str, str], form: str, missing: dict[str, str], status: int
) -> None:
    headers = {name: value for name, value in {**visitor, **missing}.items() if value}
    assert site.get(f"{PAGE}pin", "POST", form, **headers).status == status
    assert pins(folder) == set()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (f"{PAGE}pin", "", 403),
        (f"{PAGE}pin", "form_token=" + "0" * 64, 403),
        (f"{PAGE}pin", "form_token=" + "0" * 5000, 413),
        (f"{PAGE}delete", None, 404),
        (f"/run/bert/checkpoint/{JOB}-9/pin", None, 404),
        ("/", None, 405),
    ],
)
def test_only_our_forms_and_these_actions_count(
    site: Served, folder: Path, visitor: dict[str, str], form: str, path: str, body: str | None, status: int
) -> None:
    assert site.get(path, "POST", form if body is None else body, **visitor).status == status
    assert pins(folder) == set()
    assert site.get(f"{PAGE}pin", **visitor).status in (404, 405), "looking changes nothing"


def test_a_bearer_spares_the_form_token_only_when_it_is_the_token(
    site: Served, folder: Path, visitor: dict[str, str]
) -> None:
    for junk in ("Bearer junk", "Bearer ", f"Basic {TOKEN}"):
        assert site.get(f"{PAGE}pin", "POST", "", **visitor, Authorization=junk).status == 403
    assert pins(folder) == set()


def test_a_form_without_a_length_is_bounded_too(site: Served, folder: Path, visitor: dict[str, str], form: str) -> None:
    parts = [form.encode(), b"&more=", b"0" * 5000]
    assert site.get(f"{PAGE}pin", "POST", iter(parts), **visitor).status == 413
    assert pins(folder) == set()
    assert site.get(f"{PAGE}unpin", "POST", iter(parts[:2]), **visitor).status == 303


def test_there_are_no_actions_unless_they_were_allowed(folder: Path) -> None:
    with served(str(folder / "store"), token=TOKEN) as one:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert one.get(f"{PAGE}pin", "POST", **bearer).status == 405
        assert "<form method" not in one.get(PAGE, **bearer).text
    with pytest.raises(ConfigError, match="token"), served(str(folder / "store"), allow_actions=True):
        pass
