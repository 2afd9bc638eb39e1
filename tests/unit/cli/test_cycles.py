"""When cycles are looked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from ckptstore.cli.app import main


@pytest.fixture
def usual() -> Iterator[tuple[int, int, int]]:
    usual = gc.get_threshold()
    yield usual
    gc.set_threshold(*usual)


@pytest.mark.parametrize(("args", "is_short"), [("version", True), ("agent --help", False), ("run --help", False)])
def test_only_short_verbs_let_cycles_wait(
    usual: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, args: str, is_short: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["ckptctl", *args.split()])
    with pytest.raises(SystemExit):
        main()
    assert (gc.get_threshold() != usual) == is_short
