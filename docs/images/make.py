"""Make the pictures of the dashboard again: ``python docs/images/make.py``; needs chromium and selenium."""

from __future__ import annotations

import math
import random
import shutil
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

import numpy as np
from dashboard_server import Served, eventually, served
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from ckptstore.blob import open_blob_store
from ckptstore.clock import rfc3339
from ckptstore.config import StoreConfig
from ckptstore.dashboard.guard import new_token
from ckptstore.dashboard.picture import draw
from ckptstore.dashboard.report import gather
from ckptstore.format.manifest import Parent
from ckptstore.ops.history import note_restored
from ckptstore.repo import journal, timings
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteTier
from ckptstore.repo.upload import push
from ckptstore.testing.checkpoints import write_checkpoint

HERE = Path(__file__).parent
TOKEN = new_token()
FIRST, SECOND = "5f2c9a41d0be", "77e0c3b8aa12"
BEGUN = datetime.now(timezone.utc) - timedelta(hours=7.5)
RULES = {"keep_last": 4, "keep_best": 1, "keep_every_steps": 2000, "monitor": "val/loss", "mode": "min"}


def loss(step: int) -> float:
    return 3.2 * math.exp(-step / 2500) + 0.4 + random.gauss(0, 0.03)


def when(step: int, pause_s: float = 0) -> str:
    return rfc3339(BEGUN + timedelta(seconds=step * 3.6 + pause_s))


class Run:
    """A run with a model that changes a little at each save, and an embedding that does not."""

    def __init__(self, folder: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tier = LocalTier(folder / "store")
        self.remote = RemoteTier(open_blob_store(f"file://{folder}/bucket"), name, "file")
        self.name = name
        self.rng = np.random.default_rng(0)
        self.state = {key: self.rng.standard_normal(shape).astype("f4") for key, shape in shapes.items()}

    def save(self, step: int, save_id: str, *, pushed: bool = True, pause_s: float = 0, **fields: Any) -> None:
        for key, value in self.state.items():
            if "embed" not in key:
                self.state[key] = value + self.rng.standard_normal(value.shape).astype("f4") * np.float32(1e-4)
        value = loss(step)
        told = {
            "created_at": when(step, pause_s),
            "metrics": {"loss": value, "val/loss": value + 0.08, "acc": 1 - value / 4},
            **fields.pop("told", {}),
        }
        path = write_checkpoint(
            self.tier, self.state, run=self.name, step=step, save_id=save_id, world_size=2, told=told, **fields
        )
        ranks = {str(rank): {"reserve": 0.002, "plan": 0.01, "copy": 0.21 + 0.05 * rank} for rank in range(2)}
        timings.note(self.tier, self.name, save_id, {"ranks": ranks, "write": 0.62, "fsync": 0.21, "commit": 0.05})
        if pushed:
            done = push(self.tier, path, self.name, self.remote, config=StoreConfig())
            timings.note(self.tier, self.name, save_id, {"remote file": {"lag": 2.4, **done.notes()}})


def live(first: int, last: int, pause_s: float) -> list[dict[str, Any]]:
    rate = [
        3e-4 * min(1, step / 500) * (0.5 + 0.5 * math.cos(step / 8000 * math.pi)) for step in range(first, last, 20)
    ]
    return [
        {"time": when(step, pause_s), "step": step, "epoch": step // 1500, "metrics": {"loss": loss(step), "lr": lr}}
        for step, lr in zip(range(first, last, 20), rate, strict=True)
    ]


def write_store(folder: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (512, 128)}
    for layer in range(4):
        shapes |= {f"model.layers.{layer}.attention.weight": (128, 384), f"model.layers.{layer}.mlp.weight": (512, 128)}
    run = Run(folder, "llama-1b", shapes)
    for number, step in enumerate(range(500, 4001, 500), 1):
        run.save(step, f"{FIRST}-{number}", told={"tags": ("release",)} if step == 2000 else {})
    journal.append(run.tier, run.name, "live", live(20, 4320, 0))
    death = {"time": when(4325), "ended": "lost", "job": FIRST, "rank": 0, "step": 4000}
    journal.append(run.tier, run.name, "jobs", [death])
    journal.append(run.tier, run.name, "rules", [{"local": RULES, "remote": {**RULES, "keep_last": 20}}])
    parent = Parent(save_id=f"{FIRST}-7", timeline=1, step=3500)
    for number, step in enumerate(range(4000, 6001, 500), 1):
        run.save(
            step, f"{SECOND}-{number}", pause_s=3300, timeline=2, parent=parent, pushed=step < 6000,
            told={"emergency": step == 5500},
        )  # fmt: skip
    journal.append(run.tier, run.name, "live", live(3510, 6060, 3300))
    run.tier.pin(run.name, f"{FIRST}-4")
    note_restored(run.tier, run.name, 5000, f"{SECOND}-3", "file")
    other = Run(folder, "vit-small", {"model.head.weight": (256, 256)})
    for number in range(1, 5):
        other.save(number * 200, f"0a1b2c3d4e5f-{number}", extras={"loss_history": [3 / n for n in range(1, 40)]})


def photograph(site: Served, folder: Path) -> None:
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    pages = {
        "safety": ("", "light", 1100),
        "training": ("run/llama-1b/training", "light", 1100),
        "checkpoints": ("run/llama-1b/checkpoints", "light", 1240),
        "checkpoint": (f"run/llama-1b/checkpoint/{SECOND}-3/", "dark", 1100),
        "storage": ("run/llama-1b/storage", "light", 1100),
        "phone": ("run/llama-1b/", "dark", 380),
    }
    try:
        browser.get(f"{site.url}?token={TOKEN}")
        for name, (page, look, width) in pages.items():
            scheme = {"features": [{"name": "prefers-color-scheme", "value": look}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(site.url + page)
            time.sleep(3)  # charts are drawn, and the bucket has been counted
            height = min(browser.execute_script("return document.documentElement.scrollHeight"), 1500)
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": height})
            time.sleep(1)
            browser.save_screenshot(str(HERE / f"dashboard-{name}.png"))
    finally:
        browser.quit()


def main() -> None:
    random.seed(1)
    folder = Path(tempfile.gettempdir()) / "demo"  # its name is in the pictures
    folder.mkdir()
    try:
        write_store(folder)
        shown, remote = "/data/ckpt", f"file://{folder}/bucket"
        with served(str(folder / "store"), remote, shown=shown, token=TOKEN, allow_actions=True) as site:
            site.source.look_now("llama-1b")
            eventually(lambda: site.source.view("llama-1b").num_notes > 40)
            photograph(site, folder)
            facts = gather(site.source, "llama-1b", store=shown, now=datetime.now(timezone.utc))
            draw(facts, HERE / "report.png", "png")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
