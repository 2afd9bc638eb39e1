"""A real browser for tests: Chromium, and everything it asked for or complained about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dashboard_server import eventually
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
)  # fmt: skip


def install_browser() -> None:
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("no chromium and chromedriver here, and no right to install them: apt-get install chromium-driver")
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "chromium", "chromium-driver"]):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode and command[1] == "install":
            pytest.skip(f"chromium can't be installed: {done.stderr.decode()[-200:]}")


class Browser:
    """Chromium, and everything it asked for or complained about."""

    def __init__(self, profile: Path) -> None:
        options = Options()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}", "about:blank"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, url: str) -> None:
        self.driver.get(url)

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str = "main") -> str:
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def charts_are_drawn(self) -> None:
        shown = "return [...document.querySelectorAll('.chart:not([hidden])')]"
        eventually(lambda: self.js(f"{shown}.length && {shown[7:]}.every((c) => c.querySelector('svg.main-svg'))"))
        eventually(lambda: "Loading" not in self.text())

    def look(self) -> None:
        """Gather what has been asked for and complained about since."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        self.complaints += [entry["message"] for entry in self.driver.get_log("browser")]

    def phone(self, width: int | None) -> None:
        if width is None:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            return
        metrics = {"width": width, "height": 780, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, value: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


#: Texts whose contrast is below WCAG's AA: 4.5, or 3 where they are large.
HARD_TO_READ = """
const parse = (c) => { const n = c.match(/[0-9.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const found = [];
const walk = (element, below, alpha) => {
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden") return;
  if (element.matches("svg, .visually-hidden, .skip, noscript, option")) return;
  const behind = over(parse(style.backgroundColor), below), seen = alpha * Number(style.opacity);
  const says = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (says && !element.disabled) {
    const [r, g, b, a] = parse(style.color), ink = over([r, g, b, a * seen], behind);
    const [hi, lo] = [light(ink), light(behind)].sort((x, y) => y - x), ratio = (hi + 0.05) / (lo + 0.05);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push([element.textContent.trim().slice(0, 40), ratio]);
  }
  for (const child of element.children) walk(child, behind, seen);
};
walk(document.body, [255, 255, 255], 1);
return found;
"""
