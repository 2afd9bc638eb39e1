"""The markers a state is written with."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ckptstore
from ckptstore.dcp.markers import per_rank, trainable


def test_value_is_the_object_itself_when_wrapped_per_rank() -> None:
    value = {"seed": 1}
    marked = per_rank(value)
    assert marked.value is value
    assert isinstance(marked, per_rank)
    assert marked == per_rank({"seed": 1})
    assert repr(marked) == "per_rank({'seed': 1})"
    marked.value = {"seed": 2}
    assert marked != per_rank({"seed": 1})


def test_module_is_kept_when_marked_trainable() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2)
    marked = trainable(module)
    assert marked.module is module
    assert isinstance(marked, trainable)


@pytest.mark.parametrize("value", [None, {}, "model", lambda: None])
def test_trainable_says_so_when_it_gets_no_module(value: object) -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        trainable(value)  # type: ignore[arg-type]


def test_markers_are_public_and_torch_free_when_imported() -> None:
    assert ckptstore.per_rank is per_rank
    assert ckptstore.trainable is trainable
    code = "import sys; import ckptstore; ckptstore.per_rank(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
