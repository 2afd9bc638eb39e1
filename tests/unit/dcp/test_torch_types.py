"""Torch's small types in the state tree."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ckptstore.dcp import torch_types  # noqa: E402, F401 - registers the types; torch may be absent
from ckptstore.errors import FormatError, StateError  # noqa: E402
from ckptstore.format import tree  # noqa: E402
from ckptstore.format.manifest import canonical  # noqa: E402


def through_json(value: object) -> Any:
    return tree.decode(json.loads(canonical(tree.encode(value))), lambda ref: ref)


DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
LAYOUTS = sorted({v for v in vars(torch).values() if isinstance(v, torch.layout)}, key=str)
FORMATS = sorted({v for v in vars(torch).values() if isinstance(v, torch.memory_format)}, key=str)


@pytest.mark.parametrize("value", [*DTYPES, *LAYOUTS, *FORMATS], ids=str)
def test_singleton_comes_back_itself_when_stored(value: object) -> None:
    assert through_json({"k": value})["k"] is value


@pytest.mark.parametrize("value", [
    torch.device("cpu"), torch.device("cuda", 3), torch.device("meta"), torch.Size([2, 0, 3]), torch.Size([]),
], ids=str)  # fmt: skip
def test_value_comes_back_equal_and_of_its_type_when_stored(value: object) -> None:
    back = through_json({"k": value, value: 1})
    assert back == {"k": value, value: 1}
    assert type(back["k"]) is type(value)


def test_generator_continues_when_stored() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    copy = through_json(generator)
    assert copy is not generator
    assert copy.device == generator.device
    assert torch.equal(torch.randn(9, generator=copy), torch.randn(9, generator=generator))


def test_tensor_is_refused_by_key_when_nobody_took_it_out() -> None:
    with pytest.raises(StateError, match=r"torch\.Tensor") as caught:
        tree.encode({"a": {"w": torch.zeros(1)}})
    assert caught.value.context["key"] == "a.w"


def typed(name: str, value: object) -> dict[str, Any]:
    return {"version": 1, "tree": {"~": "type", "name": name, "v": value}}


@pytest.mark.parametrize("name,value", [
    ("torch.dtype", "torch.load"), ("torch.dtype", "torch.os"), ("torch.dtype", "float99"), ("torch.dtype", 5),
    ("torch.dtype", "__name__"), ("torch.device", "nowhere:0"), ("torch.device", 3), ("torch.Size", [1.5]),
    ("torch.Size", "ab"),
    ("torch.Size", [-(2**70)]), ("torch.layout", "torch.float32"), ("torch.memory_format", None),
    ("torch.Generator", {}),
    ("torch.Generator", {"device": "cpu", "state": {"~": "bytes", "v": "AAAA"}}),
    ("torch.Generator", {"device": "meta:99999999999", "state": {"~": "bytes", "v": "AAAA"}}),
])  # fmt: skip
def test_node_is_a_format_error_when_it_lies_about_torch(name: str, value: object) -> None:
    with pytest.raises(FormatError):
        tree.decode(typed(name, value), lambda ref: ref)


def test_generator_state_is_refused_when_its_contents_are_made_up() -> None:
    node = tree.encode(torch.Generator())
    size = len(through_json(node["tree"]["v"]["state"]["v"]))
    node["tree"]["v"]["state"]["v"] = ("////" * size)[:size]
    with pytest.raises(FormatError):
        tree.decode(node, lambda ref: ref)


def test_values_are_shown_as_opaque_when_the_process_has_no_torch() -> None:
    node = tree.encode({"dtype": torch.float8_e4m3fn, "n": (1,)})
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from ckptstore.format import tree\n"
        f"back = tree.decode(json.loads({canonical(node).decode()!r}), lambda ref: ref, unknown='opaque')\n"
        "print(back['dtype'].name, back['n'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[0] == "torch.dtype (1,)"
