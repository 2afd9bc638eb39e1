"""Every Python block of the README and the docs runs as pasted, in the order of its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text()))


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # The pages name /tmp for a bucket to try things out; each test has its own.
    code = code.replace("/tmp/", f"{folder}/")
    environ = {**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_python_blocks_run_as_pasted(page: Path, tmp_path: Path) -> None:
    result = run(blocks(page), tmp_path)
    assert result.returncode == 0, result.stderr


def test_quick_start_resumes_when_run_twice(tmp_path: Path) -> None:
    code = blocks(ROOT / "README.md")
    for _ in range(2):
        assert run(code, tmp_path).returncode == 0
    listed = subprocess.run(
        [sys.executable, "-m", "ckptstore.cli", "list", "checkpoints"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == ["10", "20", "30", "40", "50", "60"]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_configuration_page_lists_every_field_with_its_default() -> None:
    from ckptstore.config import StoreConfig

    page = (ROOT / "docs/reference/configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.M))
    assert set(rows) == set(StoreConfig.model_fields)
    for name, default in rows.items():
        assert eval(default) == StoreConfig.model_fields[name].default  # our own page


def test_errors_page_lists_every_class_with_its_code() -> None:
    from ckptstore import errors

    page = (ROOT / "docs/reference/errors.md").read_text()
    rows = {name: int(code) for name, code in re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \|", page, re.M)}
    classes = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if isinstance(cls, type)
        and issubclass(cls, errors.CkptError)
        and name not in ("CkptError", "ConflictError", "NotFoundError")
    }
    assert rows == classes
