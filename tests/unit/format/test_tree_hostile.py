"""A tree from a file may say anything: the answer is a value or a FormatError, and nothing else happens."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptstore.errors import FormatError
from ckptstore.format import tree, types_base
from ckptstore.format.manifest import ShardManifest

GOLDEN = json.loads((Path(__file__).parents[2] / "compat" / "tree_v1.json").read_text(encoding="utf-8"))
NODES = [case["node"] for case in GOLDEN["cases"]]

JUNK: list[Any] = [
    None, True, -1, 1.5, 2**80, "", "x", "AAAA", "nan", "__main__:X", [], [1], [[]], [1, 2, 3], ["a", 1], {}, {"a": 1},
    {"~": "tuple", "v": []}, {"~": "tensor", "v": "w"}, {"~": []}, {"~": 5},
]  # fmt: skip


def read(node: Any) -> None:
    """Every way to read a tree; each gives something or says FormatError."""
    document = {"version": 1, "tree": node}
    for run in (
        lambda: tree.decode(document, lambda ref: ref),
        lambda: tree.decode(document, lambda ref: ref, trusted="loaded", unknown="opaque"),
        lambda: list(tree.iter_leaves(document)),
        lambda: tree.tensor_names(document),
    ):
        with suppress(FormatError):
            run()


@pytest.mark.parametrize(
    "field", ["v", "name", "maxlen", "factory", "zone", "fold", "set", "private", "extra", "unset", "x"]
)
@pytest.mark.parametrize("tag", [*sorted(types_base.BY_TAG), "", "list", "unknown", "np.array", "np.scalar", "np.bits"])
def test_node_is_a_value_or_a_format_error_when_its_fields_are_junk(tag: str, field: str) -> None:
    for junk in JUNK:
        read({"~": tag, field: junk})
        read({"~": tag, "v": [], "name": "a:b", field: junk})
        read([{"~": tag, "v": junk, field: junk}])


@pytest.mark.parametrize("node", [
    {"~": "nobody"}, {"~": ""}, {"~": "dict", "v": ["a"]}, {"~": "dict", "v": ["a", 1, "a", 2]},
    {"~": "dict", "v": [1, 1, True, 2]},
    {"~": "dict", "v": [[], 1]}, {"~": "dict", "v": [{"~": "set", "v": []}, 1]}, {"~": "set", "v": [1, 1]},
    {"~": "set", "v": [[1]]},
    {"~": 5, "a": 1}, {"~": [0, 0], "a": 1, "b": 2}, {"~": [1], "a": 1}, {"~": [True, 0], "a": 1, "b": 2}, {"~x": 1},
    {"~": "tuple", "v": [], "w": 1}, {"~": "tuple"}, {"~": "int", "v": "12z"},
    {"~": "int", "v": "0x" + "f" * (1 << 19)},
    {"~": "int", "v": 5}, {"~": "float", "v": "1.5"}, {"~": "float", "v": "3ff0000000000000"},
    {"~": "float", "v": "00"},
    {"~": "bytes", "v": "A"}, {"~": "bytes", "v": "é"}, {"~": "str", "v": "gA=="}, {"~": "complex", "v": [1, 2]},
    {"~": "range", "v": [0, 1, 0]}, {"~": "range", "v": [1.5]}, {"~": "deque", "v": [1, 2], "maxlen": 1},
    {"~": "deque", "v": [], "maxlen": -1}, {"~": "defaultdict", "factory": "eval", "v": []},
    {"~": "Namespace", "v": [1, 2]},
    {"~": "datetime", "v": "yesterday"}, {"~": "datetime", "v": "2026-01-01T00:00:00", "zone": 5},
    {"~": "datetime", "v": "2026-01-01T00:00:00", "fold": 7}, {"~": "ZoneInfo", "v": "../../etc/passwd"},
    {"~": "ZoneInfo", "v": "/etc/passwd"}, {"~": "ZoneInfo", "v": "Nowhere/Atall"}, {"~": "timezone", "v": [3, 0, 0]},
    {"~": "timedelta", "v": [10**10, 0, 0]}, {"~": "Fraction", "v": [1, 0]}, {"~": "Decimal", "v": "one"},
    {"~": "UUID", "v": "x"},
    {"~": "Random", "v": [3, [0] * 624 + [10**9], None]}, {"~": "Random", "v": [3, [-1] * 625, None]},
    {"~": "tensor", "v": 1},
    float("nan"), float("inf"), (1,), b"x",
], ids=lambda n: str(n)[:50])  # fmt: skip
def test_node_is_a_format_error_when_it_lies(node: Any) -> None:
    with pytest.raises(FormatError):
        tree.decode({"version": 1, "tree": {"k": [node]}}, lambda ref: ref, trusted="loaded")
    read(node)


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "a..b/c", ".", "", "a" * 99, "a\x00b", "os:system"])
def test_time_zone_is_not_looked_up_when_its_key_is_none(key: str) -> None:
    node = {"version": 1, "tree": {"~": "ZoneInfo", "v": key}}
    for unknown in ("raise", "opaque"):
        with pytest.raises(FormatError, match="is not a time zone"):
            tree.decode(node, lambda ref: ref, unknown=unknown)  # type: ignore[arg-type]


def test_time_is_opaque_when_this_machine_lacks_its_zone() -> None:
    node = tree.encode({"at": datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC"))})
    node["tree"]["at"]["zone"]["v"] = "Mars/Olympus"
    with pytest.raises(FormatError, match="doesn't know the time zone Mars/Olympus") as caught:
        tree.decode(node, lambda ref: ref)
    assert caught.value.hint == "pip install tzdata"
    shown = tree.decode(node, lambda ref: ref, unknown="opaque")
    assert tree.encode(shown) == node


@pytest.mark.parametrize("document", [
    None, [], {}, {"tree": 1}, {"version": 1}, {"version": "1", "tree": 1}, {"version": True, "tree": 1},
    {"version": 1, "tree": 1, "more": 1}, {"version": 2, "tree": 1}, "x",
])  # fmt: skip
def test_document_is_a_format_error_when_it_is_not_a_tree(document: Any) -> None:
    for run in (tree.tensor_names, lambda d: list(tree.iter_leaves(d)), lambda d: tree.decode(d, lambda ref: ref)):
        with pytest.raises(FormatError):
            run(document)


@pytest.mark.parametrize("wrap", [
    lambda n: [n], lambda n: {"a": n}, lambda n: {"~": "tuple", "v": [n]}, lambda n: {"~": "dict", "v": [n, 1]},
    lambda n: {"~": "datetime", "v": "2026-01-01T00:00:00", "zone": n}, lambda n: {"~": "type", "name": "x", "v": n},
    lambda n: {"~": "frozenset", "v": [n]},
], ids=range(7))  # fmt: skip
def test_tree_is_a_format_error_when_it_is_too_deep(wrap: Any) -> None:
    node: Any = 1
    for _ in range(20_000):
        node = wrap(node)
    document = {"version": 1, "tree": node}
    tree.tensor_names(document)
    with pytest.raises(FormatError):
        tree.decode(document, lambda ref: ref)
    with suppress(FormatError):
        list(tree.iter_leaves(document))
    # Taken apart by hand: freeing it in one go recurses in C.
    while isinstance(node, (dict, list)):
        node = next(
            (v for v in (node.values() if isinstance(node, dict) else node) if isinstance(v, (dict, list))), None
        )


def test_manifest_is_a_format_error_when_its_tree_repeats_a_key() -> None:
    shard = ShardManifest(
        save_id="000000000000-1", step=1, rank=0, world_size=1, file="__0_0.distcp", file_bytes=0, chunk_elements=1,
        tree=tree.encode({"lr": 0.125}),
    )  # fmt: skip
    twice = shard.encode().replace(b'"lr":0.125', b'"lr":0.125,"lr":0.25')
    assert twice != shard.encode()
    with pytest.raises(FormatError, match="duplicate key"):
        ShardManifest.decode(twice, what="shard")


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A stored node with a few places overwritten by junk or by parts of other nodes."""
    node = copy.deepcopy(draw(st.sampled_from(NODES)))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(node))
        if not places:
            return draw(st.sampled_from(JUNK))
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["junk", "drop", "swap", "text"]))
        if how == "drop":
            del holder[key]
        elif how == "junk":
            holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "swap":
            holder[key] = copy.deepcopy(draw(st.sampled_from(NODES)))
        else:
            holder[key] = draw(st.text(max_size=8) | st.integers() | st.floats(allow_nan=False))
    return node


def _places(node: Any) -> Any:
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged())
def test_damaged_tree_is_a_value_or_a_format_error(node: Any) -> None:
    read(node)


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["~", "v", "name", "a", "shape", "dtype"]), inner, max_size=4)
    ),
))  # fmt: skip
def test_any_json_is_a_value_or_a_format_error(node: Any) -> None:
    read(node)
