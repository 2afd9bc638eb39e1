"""How many threads a rank copies with."""

from __future__ import annotations

import os

import pytest
import torch

from ckptstore.store.session import _copy_threads


@pytest.mark.parametrize(
    ("cores", "ranks", "torch_threads", "beside_training", "expected"),
    [
        (2, 1, 2, False, 2),
        (96, 8, 1, False, 4),  # torchrun
        (96, 8, 1, True, 1),
        (8, 8, 1, False, 1),
        (4, 8, 1, False, 1),
        (16, 2, 64, False, 4),
        (2, 1, 1, False, 2),
        (2, 1, 2, True, 2),
    ],
)
def test_a_rank_copies_with_its_share_of_the_cores(
    cores: int, ranks: int, torch_threads: int, beside_training: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    assert _copy_threads(ranks, beside_training=beside_training) == expected
