"""The table of dtypes against torch's own."""

from __future__ import annotations

import pytest
import torch

from ckptstore.errors import FormatError
from ckptstore.format.dtypes import DTYPES, dtype_of, itemsize

TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
QUANTIZED = {"qint8", "qint32", "quint8", "quint4x2", "quint2x4"}


def test_table_has_every_dtype_of_torch_when_quantized_ones_are_left_out() -> None:
    assert set(DTYPES) == set(TORCH_DTYPES) - QUANTIZED


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_sizes_and_kinds_are_those_of_torch_when_looked_up(name: str) -> None:
    theirs, ours = TORCH_DTYPES[name], DTYPES[name]

    assert itemsize(name) == theirs.itemsize
    assert (ours.kind == "float") == theirs.is_floating_point
    assert (ours.kind == "complex") == theirs.is_complex
    assert itemsize(ours.stock_dtype) == itemsize(name)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_storage_classes_are_those_of_torch_when_they_have_one(name: str) -> None:
    classes = {str(d).removeprefix("torch."): s for d, s in torch.storage._dtype_to_storage_type_map().items()}
    stock = DTYPES[name].stock_dtype

    assert DTYPES[name].stock_global == classes.get(stock, stock)


@pytest.mark.parametrize("name", ["qint8", "float3", "torch.float32", ""])
def test_unknown_names_are_refused_when_looked_up(name: str) -> None:
    with pytest.raises(FormatError, match="unknown"):
        dtype_of(name)
