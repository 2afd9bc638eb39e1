"""Names of leaves: stock DCP's, and escaped only where two would be one."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptstore.format.names import Names, fqn


class Kind(enum.Enum):
    A = 1


STOCK: list[tuple[tuple[Any, ...], str]] = [
    (("model", "layers.0.weight"), "model.layers.0.weight"),
    (("optimizer", "state", "w", "exp_avg"), "optimizer.state.w.exp_avg"),
    (("a", 0), "a.0"), (("a", "0"), "a.0"), (("a", ""), "a."), (("",), ""), (("a/b", "../c"), "a/b.../c"),
    (("é", "漢 字"), "é.漢 字"),
    (("x" * 300, "y"), "x" * 300 + ".y"), ((True, None, 1.5), "True.None.1.5"), (((1, "a"),), "(1, 'a')"),
    ((Kind.A,), "Kind.A"),
]  # fmt: skip


@pytest.mark.parametrize("path,name", STOCK, ids=lambda v: str(v)[:30])
def test_name_is_that_of_stock_dcp_when_free(path: tuple[Any, ...], name: str) -> None:
    assert fqn(path) == name


def test_name_is_that_of_stock_dcp_when_dcp_itself_flattens() -> None:
    nested_dict = pytest.importorskip("torch.distributed.checkpoint._nested_dict")
    torch = pytest.importorskip("torch")
    w = torch.zeros(1)
    state = {"model": {"a.b": w, "": w, "é/": w}, "list": [w, [w, {"x": w}]], "ints": {1: w, (1, 2): w, None: w}}
    _, mappings = nested_dict.flatten_state_dict(state)
    assert [fqn(path) for path in mappings.values()] == list(mappings)


def test_first_keeps_the_stock_name_when_two_collide() -> None:
    names = Names()
    walk = [("a", "b"), ("a.b",), ("a", "b.c"), ("a.b", "c"), ("k", 0), ("k", "0"), ("k", 0.0), ("k", "0.0")]
    assert [names.name(path) for path in walk] == [
        "a.b", '["a.b"]', "a.b.c", '["a.b","c"]', "k.0", '["k","0"]', "k.0.0", '["k","0.0"]',
    ]  # fmt: skip
    assert "a.b" in names
    assert "b" not in names


def test_name_is_escaped_when_it_can_not_be_written() -> None:
    assert fqn(("a", "\ud800")) == '["a","\\ud800"]'
    assert fqn(()) == "[]"
    assert fqn((10**5000,)).isascii()


def test_name_stays_unique_when_a_key_looks_like_an_escaped_name() -> None:
    names = Names(["a.b"])
    assert [names.name(p) for p in [('["a","b"]',), ("a", "b")]] == ['["a","b"]', '["a","b"]~2']


keys = st.text(st.sampled_from('ab.0["],~1'), max_size=4) | st.integers(0, 11) | st.booleans() | st.none() | st.floats()
paths = st.lists(st.lists(keys, min_size=1, max_size=4).map(tuple), max_size=12)


@settings(deadline=None)
@given(paths)
def test_names_are_unique_and_repeatable(walk: list[tuple[Any, ...]]) -> None:
    names, again = Names(), Names()
    given_out = [names.name(path) for path in walk]
    assert len(set(given_out)) == len(walk)
    assert given_out == [again.name(path) for path in walk]
    for name in given_out:
        name.encode()
