"""What goes in comes out, by every way back, or is refused by key before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import state_tables
import torch
from sameness import assert_same

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.errors import StateError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

VALUES, TENSORS = list(state_tables.values()), list(state_tables.tensors())
QUICK = StoreConfig(agent_idle_exit_seconds=5)


def whole_state() -> dict[str, Any]:
    return {"values": state_tables.values(), "tensors": state_tables.tensors()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A local root and a bucket that hold the same checkpoint."""
    folder = tmp_path_factory.mktemp("tables")
    bucket = f"file://{folder}/bucket"
    with CheckpointStore(folder / "store", remote=bucket, config=QUICK) as store:
        store.save(whole_state(), 1, wait="remote")
    return folder / "store", bucket


def _load(store: CheckpointStore) -> Any:
    """Into a target that holds nothing yet."""
    state = {name: dict.fromkeys(table) for name, table in whole_state().items()}
    store.load(state)
    return state


def _load_in_place(store: CheckpointStore) -> Any:
    """Into a target that holds the like already."""
    state = whole_state()
    state["values"]["array under a key with a nan"] = None  # such a key is found by nobody
    for tensor in state["tensors"].values():
        if not tensor.is_inference() and type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            raw = tensor.detach()
            if not raw.is_nested and not raw.is_quantized and torch._debug_has_internal_overlap(raw) == 0:
                raw = raw.view(torch.uint8) if raw.itemsize == 1 else raw
                if raw.dtype is not torch.bits16:
                    raw.zero_()
    store.load(state)
    return state


WAYS: dict[str, Callable[[Path, str], Any]] = {
    "load from local": lambda root, _: _load(CheckpointStore(root)),
    "load from remote": lambda _, bucket: _load(CheckpointStore(None, remote=bucket)),
    "load in place": lambda root, _: _load_in_place(CheckpointStore(root)),
    "read from local": lambda root, _: CheckpointStore(root).read(),
    "read from remote": lambda _, bucket: CheckpointStore(None, remote=bucket).read(),
}


@pytest.fixture(scope="module", params=WAYS, ids=list(WAYS))
def back(request: pytest.FixtureRequest, saved: tuple[Path, str]) -> Any:
    return WAYS[request.param](*saved)


@pytest.mark.parametrize("name", VALUES)
def test_value_comes_back_when_stored(back: Any, name: str) -> None:
    assert_same(state_tables.values()[name], back["values"][name], name)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_comes_back_when_stored(back: Any, name: str) -> None:
    original, restored = state_tables.tensors()[name], back["tensors"][name]
    if type(restored) is torch.nn.Parameter:
        original = original.detach() if type(original) is not torch.nn.Parameter else original
        restored = restored.detach()
    assert_same(original, restored, name)


def test_everything_comes_back_when_read_in_a_fresh_process(saved: tuple[Path, str]) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1])\n"
        "import state_tables; from sameness import assert_same; from ckptstore import CheckpointStore\n"
        "expected = {'values': state_tables.values(), 'tensors': state_tables.tensors()}\n"
        "for store in (CheckpointStore(sys.argv[2]), CheckpointStore(None, remote=sys.argv[3])):\n"
        "    assert_same(expected, store.read(), 'state')\n"
        "    state = {name: dict.fromkeys(table) for name, table in expected.items()}\n"
        "    store.load(state)\n"
        "    assert_same(expected, state, 'state')\n"
        "print('same')\n"
    )
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", code, support, str(saved[0]), saved[1]],
        capture_output=True, text=True, timeout=150, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    "name", ["tensor in a dataclass", "large array big-endian", "registered by tensors", "dataclass of sparse"]
)
def test_one_object_comes_back_when_only_that_is_asked_for(saved: tuple[Path, str], name: str) -> None:
    with CheckpointStore(saved[0]) as store:
        expected, only = state_tables.values()[name], [f"values.{name}"]
        assert_same({"values": {name: expected}}, store.read(only=only))
        state = {"values": dict.fromkeys(state_tables.values())}
        info = store.load(state, only=only)
        assert info is not None
        assert_same(expected, state["values"][name])
        assert [key for key, value in state["values"].items() if value is not None] == [name]


def test_stock_dcp_finds_the_parts_of_composite_tensors_under_their_names(saved: tuple[Path, str]) -> None:
    import torch.distributed.checkpoint as dcp

    folder = next(saved[0].rglob(".metadata")).parent
    expected = state_tables.tensors()["sparse_csr"]
    target: dict[str, Any] = {
        "tensors.sparse_csr.values": torch.zeros(4),
        "tensors.sparse_csr.crow_indices": torch.zeros(5, dtype=torch.int64),
        "tensors": {"strided": torch.zeros(5, dtype=torch.int64)},
    }
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert torch.equal(target["tensors.sparse_csr.values"], expected.values())
    assert torch.equal(target["tensors.sparse_csr.crow_indices"], expected.crow_indices())
    assert torch.equal(target["tensors"]["strided"], state_tables.tensors()["strided"])


def test_every_dtype_of_torch_is_in_the_table() -> None:
    known = {tensor.dtype for tensor in state_tables.tensors().values()}
    assert {value for value in vars(torch).values() if isinstance(value, torch.dtype)} - known == set()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointStore]:
    with CheckpointStore(tmp_path_factory.mktemp("refused") / "store", config=QUICK) as store:
        yield store


@pytest.mark.parametrize("name", state_tables.REFUSED)
def test_value_is_refused_by_key_and_nothing_is_written_when_it_can_not_be_stored(
    empty_store: CheckpointStore, name: str
) -> None:
    bad = state_tables.REFUSED[name]()
    with pytest.raises(StateError, match=r"deep\.bad") as caught:
        empty_store.save({"fine": torch.ones(3), "deep": {"good": 1, "bad": bad}}, 1)
    assert str(caught.value.context["key"]).startswith("deep.bad")
    assert empty_store.local is not None
    assert [path for path in empty_store.local.rglob("*") if "step-" in path.name or "staging" in path.name] == []


@pytest.mark.parametrize("name", [n for n in TENSORS if not n.startswith("torch.")])
def test_tensor_of_a_module_comes_back_in_place_when_stored(tmp_path: Path, name: str) -> None:
    """As a buffer: the module keeps the object that it registered."""
    from memory_checkpoint import save

    from ckptstore.dcp.loader import load_into

    def module() -> torch.nn.Module:
        holder = torch.nn.Module()
        holder.register_buffer("t", state_tables.tensors()[name].detach())
        return holder

    source, target = module(), module()
    held = target.t
    load_into({"m": target}, save({"m": source}))
    assert target.t is held
    assert_same(source.t, target.t, name)
