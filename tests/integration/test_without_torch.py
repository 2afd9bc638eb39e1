"""A machine without PyTorch: what only looks at checkpoints works, everything else says what to install."""

from __future__ import annotations

from pathlib import Path

from commands import run_python

from ckptstore.repo.local import LocalTier
from ckptstore.testing.checkpoints import write_checkpoint

CODE = """
import builtins, importlib.util, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else real(name, *a)

from ckptstore import CheckpointStore, StoreConfig, errors, per_rank, register_type, trainable

with CheckpointStore(sys.argv[1], run="bert") as store:
    assert [info.step for info in store.checkpoints()] == [1, 2]
    assert store.latest().step == 2
    assert store.best("cost").step == 1
    store.pin(1)
    store.unpin(1)
    store.delete(1)
    assert [info.step for info in store.checkpoints()] == [2]
    assert CheckpointStore(sys.argv[1] + "-absent").checkpoints() == []
    calls = {
        "save()": lambda: store.save({"n": 1}, 3),
        "load()": lambda: store.load({"n": 1}),
        "read()": store.read,
        "reader()": store.reader,
        "writer()": lambda: store.writer(3),
        "CheckpointManager": lambda: importlib.import_module("ckptstore").CheckpointManager,
    }
    for name, call in calls.items():
        try:
            call()
        except errors.ConfigError as error:
            assert str(error) == f"{name} needs PyTorch (pip install 'ckptstore[torch]')", error
        else:
            raise AssertionError(name)
assert "torch" not in sys.modules
"""


def test_looking_needs_no_torch_and_the_rest_says_what_to_install(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "store")
    for step in (1, 2):
        told = {"metrics": {"cost": float(step)}}
        write_checkpoint(tier, {}, run="bert", step=step, save_id=f"0123456789ab-{step}", told=told)
    done = run_python("-c", CODE, tmp_path / "store")
    assert done.code == 0, done.err
