"""The dashboard in a real browser: what a person sees, and what the browser complains about."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import HARD_TO_READ, Browser, install_browser
from dashboard_server import EVIL, JOB, Served, add_save, eventually, now, served, write_run
from selenium.webdriver.common.keys import Keys

from ckptstore import CheckpointManager, CheckpointStore, StoreConfig
from ckptstore.clock import rfc3339
from ckptstore.repo import journal
from ckptstore.repo.local import LocalTier


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    install_browser()
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; afterwards it must have been silent, and must have spoken to us only."""
    chromium.open("about:blank")
    chromium.look()
    chromium.requests.clear()
    chromium.complaints.clear()
    yield chromium
    chromium.look()
    foreign = [u for u in chromium.requests if u.startswith("http") and not u.startswith("http://127.0.0.1:")]
    assert not foreign
    assert not chromium.complaints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_run(folder, "bert", 6, pushed=5)
    write_run(folder, "gpt", 2)
    root = folder / "store"
    for step in range(1, 61):
        add_save(root, step, run="long", metrics={"val/loss": 1 / step, "acc": step / 60}, emergency=step == 7)
    add_marks(root)
    return folder


def add_marks(root: Path) -> None:
    """A run that crashed at step 24 and went on from its checkpoint at step 10."""
    begun = now() - timedelta(hours=1)

    def point(step: int, after_s: int) -> dict[str, Any]:
        return {"time": rfc3339(begun + timedelta(seconds=after_s)), "step": step, "metrics": {"loss": 9.0, "lr": 0.1}}

    tier = LocalTier(root)
    for number, step in enumerate((10, 20), 1):
        add_save(root, step, run="marks", save_id=f"{JOB}-{number}", metrics={"loss": 1 / step})
    journal.append(tier, "marks", "live", [point(step, step) for step in range(2, 25, 2)])
    death = {"time": rfc3339(begun + timedelta(seconds=25)), "ended": "lost", "job": JOB, "rank": 0, "step": 20}
    journal.append(tier, "marks", "jobs", [death])
    journal.append(tier, "marks", "live", [point(step, 500 + step) for step in range(12, 43, 2)])
    parent = {"save_id": f"{JOB}-1", "timeline": 1, "step": 10}
    for number, step in enumerate((20, 30), 1):
        save_id = f"0123456789ac-{number}"
        add_save(root, step, run="marks", save_id=save_id, timeline=2, parent=parent, metrics={"loss": 1 / step})


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Served]:
    with served(str(folder / "store"), f"file://{folder}/bucket") as one:
        eventually(lambda: one.get("/api/status.json").json["runs"][0]["levels"][1]["state"] == "behind")
        yield one


#: Plotly makes a link of this where it is not escaped.
LINK = "<a href='javascript:alert(1)'>loss</a> <b>bold</b>"

PAGES = (
    "",
    "run/bert/",
    "run/long/training",
    "run/long/checkpoints",
    f"run/bert/checkpoint/{JOB}-5/",
    "run/bert/storage",
    "run/marks/checkpoints",
)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_page_is_whole(browser: Browser, site: Served, page: str, look: str) -> None:
    browser.scheme("dark" if look == "dark" else "light")
    browser.phone(360 if look == "phone" else None)
    try:
        browser.open(site.url + page)
        if "plotly" in browser.driver.page_source:
            browser.charts_are_drawn()
        assert len(browser.all("h1")) == 1
        assert browser.all("main")
        width, room = browser.js("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= room, "nothing sticks out sideways"
        dark = browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"
        assert dark == (look == "dark")
        assert not browser.js(HARD_TO_READ), "letters stand out from what is behind them"
    finally:
        browser.phone(None)
        browser.scheme("light")


@pytest.mark.parametrize("page", PAGES)
def test_page_can_be_used_without_eyes_or_mouse(browser: Browser, site: Served, page: str) -> None:
    browser.open(site.url + page)
    nameless = browser.js(
        """const all = "a, button, select, input:not([type=hidden]), progress, img";
           const says = (e) => e.getAttribute("aria-label") || e.innerText?.trim() || e.hasAttribute("alt")
             || e.closest("label")?.innerText.trim();
           return [...document.querySelectorAll(all)].filter((e) => !says(e)).map((e) => e.outerHTML)"""
    )
    assert not nameless
    assert not browser.js("return [...document.querySelectorAll('th:not([scope])')].length")
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.js("return document.activeElement.className") == "skip"
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.js("return document.activeElement.id") == "main"


def test_first_page_tells_what_is_at_risk(browser: Browser, site: Served) -> None:
    browser.open(site.url)
    card = browser.text("[data-key='bert']")
    assert "At risk" in card
    assert "100 steps" in card
    assert "push --all" in card
    browser.js("document.querySelector('[data-key=bert] button.copy').click()")
    eventually(lambda: browser.text("[data-key='bert'] button.copy") in ("Copied", "Selected"))


def test_curves_can_be_smoothed_logged_compared_and_saved(browser: Browser, site: Served) -> None:
    browser.open(f"{site.url}run/long/training")
    browser.charts_are_drawn()
    names = "return document.getElementById('curve').data.map((t) => t.name)"
    assert {"best", "emergency"} <= set(browser.js(names))
    assert "best (lowest) 0.01667 at step 60" in browser.text("#curve-words")
    browser.js("const s = document.getElementById('smooth'); s.value = 0.9; s.dispatchEvent(new Event('input'))")
    eventually(lambda: len(browser.js("return document.getElementById('curve').data")) == 4)
    browser.js("document.getElementById('log').click()")
    assert browser.js("return document.getElementById('curve').layout.yaxis.type") == "log"
    browser.js("const m = document.getElementById('metric'); m.value = 'acc'; m.dispatchEvent(new Event('change'))")
    assert "best (highest) 1.000 at step 60" in browser.text("#curve-words")
    browser.js(
        "const w = document.getElementById('with'); w.options[0].selected = true; w.dispatchEvent(new Event('change'))"
    )
    eventually(lambda: "bert: no value of acc" in browser.text("#curve-words"))
    assert browser.driver.current_url.endswith("?with=bert")
    png = browser.driver.execute_async_script(
        "const done = arguments[0]; Plotly.toImage('curve', {format: 'png'}).then(done, (e) => done(String(e)))"
    )
    assert png.startswith("data:image/png")


def test_table_turns_pages_and_sorts_by_links(browser: Browser, site: Served) -> None:
    browser.open(f"{site.url}run/long/checkpoints")
    assert len(browser.all("tbody tr")) == 50
    browser.all("a[rel=next]")[0].click()
    assert len(browser.all("tbody tr")) == 10
    next(a for a in browser.all("thead a") if a.text.startswith("acc")).click()
    assert browser.all("th[aria-sort=descending]")[0].text.startswith("acc")
    assert browser.text("tbody tr:first-child th") == "60"


def test_treemap_and_waterfall_tell_the_story_in_words_too(browser: Browser, site: Served) -> None:
    browser.open(f"{site.url}run/bert/checkpoint/{JOB}-5/")
    browser.charts_are_drawn()
    assert "Training waited 210 ms" in browser.text("#time-words")
    assert "1 unchanged (32.0 KiB), 1 delta (16.0 KiB)" in browser.text("#map-words")
    browser.js("document.querySelector('details').open = true")
    assert "model.embed.weight" in browser.text("#largest-rows")


def test_curves_show_what_happened_to_the_jobs(browser: Browser, site: Served) -> None:
    browser.open(f"{site.url}run/marks/training")
    browser.charts_are_drawn()
    names = set(browser.js("return document.getElementById('curve').data.map((t) => t.name)"))
    assert {"live", "lost work", "checkpoints", "resumed from"} <= names
    lines = browser.js("return document.getElementById('curve').layout.shapes.map((s) => [s.name, s.x0])")
    assert sorted(lines) == [["crash", 24], ["resume", 10]]
    assert "1 resume. 1 crash." in browser.text("#curve-words")
    options = browser.js("return [...document.getElementById('metric').options].map((o) => o.value)")
    assert options == ["loss", "lr", "steps_per_second"], "live metrics can be chosen as well"
    browser.js("const m = document.getElementById('metric'); m.value = 'lr'; m.dispatchEvent(new Event('change'))")
    assert "28 live values of lr, none at a checkpoint yet" in browser.text("#curve-words")
    browser.js("const a = document.getElementById('axis'); a.value = 'time'; a.dispatchEvent(new Event('change'))")
    assert len(browser.js("return document.getElementById('curve').layout.shapes")) == 2


def test_a_checkpoint_is_pinned_and_verified_by_two_clicks(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path, "bert", 2)
    token = "a-token-nobody-guesses"
    with served(str(tmp_path / "store"), f"file://{tmp_path}/bucket", token=token, allow_actions=True) as one:
        browser.open(f"{one.url}run/bert/checkpoint/{JOB}-2/?token={token}")
        assert token not in browser.driver.current_url
        browser.all("form[action=pin] button")[0].click()
        assert "pinned" in browser.text("[data-key=facts]")
        assert LocalTier(tmp_path / "store").pins("bert") == {f"{JOB}-2"}
        browser.all("form[action=verify] button")[0].click()
        eventually(lambda: "every byte is right" in browser.text("[data-key=actions]"))
        eventually(lambda: browser.text("[data-key=verified]").count("✓ good") == 2)
        browser.open("about:blank")


def test_names_stay_text_when_they_are_scripts(browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path, "bert", 1, **{EVIL: [3.0, 2.0, 1.0]})
    for step in (500, 600):
        add_save(
            tmp_path / "store",
            step,
            metrics={EVIL: float(step), "<img src=x onerror=alert(1)>": 1.0, LINK: 2.0},
            tags=(EVIL,),
        )
    with served(str(tmp_path / "store")) as one:
        for page in ("", "run/bert/", "run/bert/training", "run/bert/checkpoints", f"run/bert/checkpoint/{JOB}-600/"):
            browser.open(one.url + page)
            if page.endswith("training"):
                browser.charts_are_drawn()
                for name in browser.js("return [...document.getElementById('metric').options].map((o) => o.value)"):
                    browser.js(
                        "const m = document.getElementById('metric'); m.value = arguments[0];"
                        "m.dispatchEvent(new Event('change'))",
                        name,
                    )
                    assert browser.js("return document.querySelector('#curve .ytitle').textContent") == name
                assert EVIL in browser.js("return [...document.querySelectorAll('#metric option')].map((o) => o.text)")
            eventually(lambda: browser.text("#live-text") == "live")
            assert browser.driver.title != "owned"
            assert not browser.js("return document.querySelectorAll('main script, main img, svg script').length")
        assert EVIL in browser.text()
        browser.open("about:blank")


def test_a_report_opens_without_a_store_or_a_network(browser: Browser, folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "ckptstore.cli", "plot", str(folder / "store"), "--run", "bert"]
    command += ["--remote", f"file://{folder}/bucket", "-o", str(report), "--json"]
    made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert made["size_bytes"] == report.stat().st_size
    browser.open(f"file://{report}")
    browser.charts_are_drawn()
    words = browser.text()
    for part in ("At risk", "loss_history (30)", "local holds 288 KiB as loaded", "500", "push --all"):
        assert part in words
    assert len(browser.all(".wide tbody tr")) == 6


def test_a_report_keeps_scripts_as_text(browser: Browser, tmp_path: Path) -> None:
    close = "</script><script>document.title='owned'</script>"
    add_save(tmp_path / "store", 100, metrics={close: 1.0}, tags=(close, "<!--<script>"))
    add_save(tmp_path / "store", 200, metrics={close: 2.0})
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "ckptstore.cli", "plot", str(tmp_path / "store"), "-o", str(report)]
    subprocess.run(command, check=True, capture_output=True)
    browser.open(f"file://{report}")
    browser.charts_are_drawn()
    assert browser.driver.title == "bert · ckptstore report"
    assert close in browser.text()


def _training(root: Path, bucket: Path, steps: int, go_on: threading.Event) -> None:
    config = StoreConfig(agent_idle_exit_seconds=1)
    with CheckpointStore(root, remote=f"file://{bucket}", run="live", config=config) as store:
        for step in range(1, steps + 1):
            assert go_on.wait(60)
            go_on.clear()
            state = {"model": {"w": torch.full((256, 256), float(step))}, "loss_history": [1.0 / step] * (step + 1)}
            store.save(state, step * 10, metrics={"loss": 1 / step}, wait="remote")


def test_page_lives_during_a_real_training(browser: Browser, tmp_path: Path) -> None:
    root, bucket = tmp_path / "store", tmp_path / "bucket"
    go_on = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            _training(root, bucket, 3, go_on)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=run)
    trainer.start()
    try:
        go_on.set()
        eventually(lambda: (root / "ckptstore.json").exists() or failures)
        with served(str(root), f"file://{bucket}") as one:
            browser.open(one.url)
            _stays(browser, lambda: "newest step 10" in browser.text("[data-key='live']"))
            _stays(browser, lambda: "training here" in browser.text("[data-key='live']"))
            go_on.set()
            _stays(browser, lambda: "newest step 20" in browser.text("[data-key='live']"))
            _stays(browser, lambda: "Safe" in browser.text("[data-key='live'] header"))
            browser.open(f"{one.url}run/live/training")
            browser.charts_are_drawn()
            points = "return document.getElementById('curve').data[0].x.length"
            assert browser.js(points) == 2
            browser.js("document.getElementById('curve').dataset.mark = 'kept'")
            go_on.set()
            _stays(browser, lambda: browser.js(points) == 3)
            assert browser.js("return document.getElementById('curve').dataset.mark") == "kept", "redrawn in place"
            eventually(lambda: "loss_history (4)" in browser.text("#history-words"))
            browser.open("about:blank")
    finally:
        for _ in range(3):
            go_on.set()
            trainer.join(1)
        trainer.join(60)
    assert not failures


def test_curves_grow_between_checkpoints_of_a_real_training(browser: Browser, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = CheckpointManager(
        tmp_path / "store",
        run="live",
        save_every_steps=0,
        save_every_seconds=0,
        config=StoreConfig(agent_idle_exit_seconds=1),
    ).track(model=model, optimizer=optimizer)
    with manager:
        handle = manager.save_checkpoint(global_step=1, metrics={"loss": 2.0})
        assert handle is not None
        handle.wait("local")
        with served(str(tmp_path / "store")) as one:
            browser.open(f"{one.url}run/live/training")
            browser.charts_are_drawn()
            live = "return document.getElementById('curve').data.find((t) => t.name === 'live')?.y.length ?? 0"
            step = 1

            def grows(to: int) -> bool:
                nonlocal step
                step += 1
                manager.step(step, metrics={"loss": torch.tensor(1 / step)})
                return bool(browser.js(live) >= to)

            _stays(browser, lambda: grows(2))
            _stays(browser, lambda: grows(4))
            assert len(one.get("/run/live/series.json").json["step"]) == 1, "no checkpoint came meanwhile"
            assert "lr" in browser.js("return [...document.getElementById('metric').options].map((o) => o.value)")
            browser.open(f"{one.url}run/live/storage")
            assert "Keeps the last 5, the best 1" in browser.text()
            browser.open("about:blank")


def _stays(browser: Browser, look: Callable[[], object]) -> None:
    """It becomes true without the page being loaded again, and the focus stays where it was."""
    browser.js("window.mark = 1; document.getElementById('theme').focus()")
    eventually(look, 30)
    assert browser.js("return window.mark") == 1
    assert browser.js("return document.activeElement.id") == "theme"


def test_page_says_so_when_it_is_not_live_any_more(chromium: Browser, tmp_path: Path) -> None:
    add_save(tmp_path, 100)
    with served(str(tmp_path)) as one:
        chromium.open(one.url)
        assert chromium.text("#live-text") == "live"
    eventually(lambda: "does not answer" in chromium.text("#live-text"), 30)
    assert "100" in chromium.text(), "what was last known stays"
    chromium.open("about:blank")
