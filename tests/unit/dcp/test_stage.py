"""Staging: exactly the pieces' bytes, exactly in their places."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptstore.dcp.binder import Binder, bind
from ckptstore.dcp.planner import plan
from ckptstore.dcp.stage import Stage, copy_pieces
from ckptstore.format.stock import layout


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_in_its_place_and_nothing_else_is_touched(threads: int) -> None:
    state = {
        "big": torch.randn(3000, 3000), "odd": torch.randn(7, 5).t(), "half": torch.randn(9).bfloat16(),
        "conj": torch.randn(4, dtype=torch.complex64).conj(), "empty": torch.zeros(0), "scalar": torch.tensor(3),
        "long": torch.randn(6_000_000), "row": torch.randn(1, 5_000_000),
    }  # fmt: skip
    binding = bind(state)
    made = plan(binding)
    places = layout(made.pieces)
    image = bytearray(b"\xaa" * places.image_bytes)
    assert copy_pieces(made, binding, image, places.starts, threads) == sum(p.size_bytes for p in made.pieces)
    untouched = bytearray(image)
    for piece, start in zip(made.pieces, places.starts, strict=True):
        expected = state[piece.fqn].resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert image[start : start + piece.size_bytes] == expected, piece.fqn
        untouched[start : start + piece.size_bytes] = b"\xaa" * piece.size_bytes
    assert untouched == b"\xaa" * places.image_bytes


def test_each_copy_shows_the_values_of_its_own_call() -> None:
    model = nn.Linear(4, 4)
    binder = Binder()
    made = plan(binder.bind({"m": model}))
    places = layout(made.pieces)
    stage = Stage(made, places.starts)
    images = [bytearray(places.image_bytes), bytearray(places.image_bytes)]
    seen = []
    for number in range(4):
        model.weight = nn.Parameter(torch.full((4, 4), float(number)))
        stage.copy(binder.bind({"m": model}), images[number % 2])
        start = places.starts[made.indexes[0]]
        seen.append(torch.frombuffer(images[number % 2], dtype=torch.float32, offset=start, count=1).item())
    assert seen == [0.0, 1.0, 2.0, 3.0]


def test_an_image_can_be_unmapped_once_the_stage_forgets_it() -> None:
    import mmap

    binding = bind({"x": torch.ones(3)})
    made = plan(binding)
    places = layout(made.pieces)
    image = mmap.mmap(-1, places.image_bytes)
    stage = Stage(made, places.starts)
    stage.copy(binding, image)
    stage.forget()
    image.close()
    assert image.closed
