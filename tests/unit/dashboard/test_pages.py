"""What the pages say, over a real server and real checkpoints."""

from __future__ import annotations

import csv
import io
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dashboard_server import EVIL, JOB, Served, add_save, eventually, served, write_run

from ckptstore import codec
from ckptstore.blob import open_blob_store
from ckptstore.config import StoreConfig
from ckptstore.errors import StorageError
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint

PAGES = ("run/bert/", "run/bert/training", "run/bert/checkpoints", "run/bert/storage", f"run/bert/checkpoint/{JOB}-3/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder, "bert", 4, pushed=3)
    write_run(folder, "gpt", 2)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[Served]:
    with served(str(folder / "store"), f"file://{folder}/bucket") as one:
        eventually(lambda: [r for r in one.get("/api/status.json").json["runs"] if r["levels"][1]["state"] == "behind"])
        yield one


def test_the_first_page_answers_for_every_run(both: Served) -> None:
    runs = {run["run"]: run for run in both.get("/api/status.json").json["runs"]}
    assert (runs["bert"]["verdict"], runs["gpt"]["verdict"]) == ("at risk", "safe")
    levels = {level["name"]: level for level in runs["bert"]["levels"]}
    assert (levels["local"]["step"], levels["local"]["lost_steps"]) == (400, 0)
    assert (levels["file"]["step"], levels["file"]["lost_steps"]) == (300, 100)
    (alarm,) = runs["bert"]["alarms"]
    assert "1 checkpoint" in alarm["title"]
    assert alarm["command"].startswith("ckptctl -s ")
    assert "push --all" in alarm["command"]
    page = both.get("/").text
    assert page.index("bert") < page.index("gpt"), "what needs looking at comes first"


@pytest.mark.parametrize("page", PAGES)
def test_every_page_stands_alone_and_lives_on(both: Served, page: str) -> None:
    answer = both.get(f"/{page}")
    assert answer.status == 200
    assert "<h1" in answer.text
    live = both.get(f"/{page}?live=1")
    assert all(f'id="{region}" data-live' in answer.text for region in live.json["regions"])
    again = both.get(f"/{page}?live=1", If_None_Match=live.headers["etag"])
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize(
    "page", ["run/nope/", f"run/bert/checkpoint/{JOB}-99/", "run/bert/checkpoint/..%2f..%2f/", "x"]
)
def test_what_is_not_there_is_told_kindly(both: Served, page: str) -> None:
    answer = both.get(f"/{page}")
    assert answer.status == 404
    assert "All runs" in answer.text


def test_the_checkpoint_page_tells_what_was_sent(both: Served) -> None:
    body = both.get(f"/run/bert/checkpoint/{JOB}-3/detail.json").json
    assert [bar[1] for bar in body["bars"]] == ["reserve", "copy", "write", "fsync", "commit", "encode", "upload"]
    starts = {bar[1]: bar[2] for bar in body["bars"]}
    assert starts["write"] == pytest.approx(0.21)
    assert starts["fsync"] == pytest.approx(0.51), "fsync is the end of the time for writing"
    assert starts["encode"] == pytest.approx(0.81)
    assert sum(body["bars"][-1][2:]) == pytest.approx(2.0)
    assert body["kinds"]["unchanged"][:2] == [1, 128 * 64 * 4]
    assert body["kinds"]["delta"][:2] == [1, 64 * 64 * 4]
    size = 64 * 64 * 4
    boxes = zip(body["treemap"]["label"], body["treemap"]["value"], body["treemap"]["kind"], strict=True)
    assert sorted(boxes) == [
        ("all", 3 * size, ""),
        ("embed.weight", 2 * size, "unchanged"),
        ("layer.weight", size, "delta"),
        ("model", 3 * size, ""),
    ]


def test_the_checkpoint_page_works_when_nothing_was_sent(both: Served) -> None:
    body = both.get(f"/run/bert/checkpoint/{JOB}-4/detail.json").json
    assert list(body["kinds"]) == ["unknown"]
    assert body["trouble"] is None


def test_weights_that_are_rounded_masters_are_derived_not_deltas(tmp_path: Path) -> None:
    master = np.random.default_rng(0).normal(size=(128, 160), scale=0.02).astype("f4")
    weight = np.frombuffer(codec.rounded(master.tobytes()), "<u2").reshape(master.shape)
    tier, save_id = LocalTier(tmp_path / "store"), f"{JOB}-1"
    state = {"model.weight": weight, "optim.master": master}
    path = write_checkpoint(tier, state, run="bert", step=1, save_id=save_id, dtypes={"model.weight": "bfloat16"})
    remote = RemoteTier(open_blob_store(f"file://{tmp_path}/bucket"), "bert", "file")
    push(tier, path, "bert", remote, config=StoreConfig())
    with served(str(tmp_path / "store"), f"file://{tmp_path}/bucket") as one:
        detail = f"/run/bert/checkpoint/{save_id}/detail.json"
        body = eventually(lambda: "unknown" not in (found := one.get(detail).json)["kinds"] and found)
        assert {row[0]: row[4] for row in body["largest"]} == {"model.weight": "derived", "optim.master": "full"}
        colour = re.search(r'derived: "(--[a-z-]+)"', one.get("/static/charts.js").text)
        assert colour is not None
        assert one.get("/static/app.css").text.count(f"{colour[1]}: #") == 3, "light, dark, and dark by choice"


def test_histories_come_from_the_newest_state(both: Served) -> None:
    body = both.get("/run/bert/history.json").json
    assert body["save_id"] == f"{JOB}-4"
    assert [(h["name"], h["length"]) for h in body["histories"]] == [("loss_history", 20)]
    assert body["histories"][0]["y"][:2] == [4.0, 2.0]


def test_storage_counts_what_each_tier_holds(both: Served) -> None:
    body = eventually(lambda: (b := both.get("/run/bert/storage.json").json)["stored"] and b["each_stored"][0] and b)
    size = (128 + 64) * 64 * 4
    assert body["held"] == {"local": [size, 2 * size, 3 * size, 4 * size], "file": [size, 2 * size, 3 * size, 3 * size]}
    assert body["each_stored"][1] < body["each_stored"][0]
    assert body["each_stored"][3] is None


def test_pages_tell_what_the_journal_knows(folder: Path, both: Served) -> None:
    tier = LocalTier(folder / "store")
    rules = {"keep_last": 2, "keep_best": 0, "keep_every_steps": 0, "monitor": None, "mode": "min"}
    journal.append(tier, "bert", "rules", [{"local": rules, "remote": {**rules, "keep_last": 9}}])
    look = {"time": "2026-01-01T00:00:00.000Z", "step": 200, "save_id": f"{JOB}-2", "tier": "file", "what": EVIL}
    journal.append(tier, "bert", "verified", [{**look, "depth": "bytes", "result": "damaged"}, {"time": 3}])
    table = both.get("/run/bert/checkpoints").text
    assert "may go now (local); one of the last 9 (file)" in table
    page = both.get(f"/run/bert/checkpoint/{JOB}-2/").text
    assert "Retention:</strong> may go now (local); one of the last 9 (file)." in page
    assert "&lt;script&gt;" in page
    assert "Rests on</strong> <a" in page
    assert "every byte" in both.get("/run/bert/").text
    storage = eventually(lambda: "objects" in (text := both.get("/run/bert/storage").text) and text)
    for words in ("Keeps the last 2", "pushes out step 100, 200, 300", ">deltas<", ">unchanged<", "a month"):
        assert words in storage, words


def test_names_stay_text_when_they_are_scripts(tmp_path: Path) -> None:
    add_save(tmp_path, 100, metrics={EVIL: 1.0, "=cmd|calc": 2.0}, tags=(EVIL,), versions={EVIL: EVIL})
    (tmp_path / EVIL.replace("/", "_")).mkdir()  # a run of such a name can't be: not ours, not shown
    with served(str(tmp_path)) as one:
        for page in ("", "run/bert/training", "run/bert/checkpoints", f"run/bert/checkpoint/{JOB}-100/"):
            for path in (f"/{page}", f"/run/bert/checkpoints?q={EVIL.replace(' ', '')}"):
                assert "<script>document" not in one.get(path).text
        assert "&lt;script&gt;" in one.get("/run/bert/checkpoints").text
        table = list(csv.reader(io.StringIO(one.get("/run/bert/series.csv").text)))
        assert "'=cmd|calc" in table[0]


def test_a_new_save_appears_by_itself(tmp_path: Path) -> None:
    add_save(tmp_path, 100)
    with served(str(tmp_path)) as one:
        assert one.get("/api/status.json").json["runs"][0]["newest_step"] == 100
        add_save(tmp_path, 200)
        eventually(lambda: one.get("/api/status.json").json["runs"][0]["newest_step"] == 200, 5)
        LocalTier(tmp_path).pin("bert", f"{JOB}-100")
        eventually(lambda: "pinned" in one.get("/run/bert/checkpoints").text, 5)
        shutil.rmtree(tmp_path / "bert" / f"step-{200:010d}-{JOB}-200")
        eventually(lambda: one.get("/api/status.json").json["runs"][0]["newest_step"] == 100, 5)


def test_damage_is_an_alarm(tmp_path: Path) -> None:
    for step in (100, 200):
        add_save(tmp_path, step)
    broken = tmp_path / "bert" / f"step-{200:010d}-{JOB}-200"
    for name in ("summary.json", "manifest.json"):
        (broken / name).write_text("{")
    with served(str(tmp_path)) as one:
        (run,) = one.get("/api/status.json").json["runs"]
        assert run["verdict"] == "not safe"
        assert "step 200 is damaged" in run["alarms"][0]["title"]
        assert one.get("/run/bert/checkpoints").status == 200


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("bert", "gpt"):
        add_save(tmp_path, 100, run=run)
    with served(str(tmp_path)) as one:
        view = one.source.view

        def refuses(run: str) -> object:
            if run == "bert":
                raise StorageError("the folder can't be read")
            return view(run)

        monkeypatch.setattr(one.source, "view", refuses)
        runs = {run["run"]: run for run in one.get("/api/status.json").json["runs"]}
        assert runs["bert"] == {"run": "bert", "error": "the folder can't be read"}
        assert runs["gpt"]["newest_step"] == 100


def test_a_remote_out_of_reach_is_said_not_hidden(tmp_path: Path) -> None:
    write_run(tmp_path, "bert", 1)
    remote = "s3://bucket/p?endpoint=http://127.0.0.1:9&region=x"
    with served(str(tmp_path / "store"), remote) as one:
        (run,) = one.get("/api/status.json").json["runs"]
        assert [(level["name"], level["state"]) for level in run["levels"]] == [("local", "ok"), ("s3", "unknown")]
        assert one.get("/run/bert/checkpoints").text.count("not known yet") == 1


def test_an_empty_store_is_an_invitation(tmp_path: Path) -> None:
    LocalTier(tmp_path).create()
    with served(str(tmp_path)) as one:
        assert "Nothing has been saved here yet" in one.get("/").text
        assert one.get("/api/status.json").json["runs"] == []


def test_pages_are_quick_when_there_are_many_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 1501):
        add_save(tmp_path, step, metrics={"loss": 1 / step})
    rules = {"keep_last": 700, "keep_best": 10, "keep_every_steps": 50, "monitor": "loss", "mode": "min"}
    journal.append(LocalTier(tmp_path), "bert", "rules", [{"local": rules}])
    with served(str(tmp_path)) as one:
        one.get("/")
        begun = time.process_time()  # of this process, server included: other load does not count
        pages = [one.get(f"/run/bert/{page}") for page in ("", "checkpoints", "checkpoints?page=30&sort=metric:loss")]
        assert time.process_time() - begun < 3 * 0.3
        assert all(page.status == 200 for page in pages)
        assert len(pages[1].body) < 100_000, "one page of rows, not all"
        assert "one of the last 700" in pages[1].text
