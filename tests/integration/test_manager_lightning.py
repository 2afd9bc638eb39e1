"""Lightning's own checkpoints in a store, and the callback with several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import CONFIG

pl = pytest.importorskip("lightning.pytorch")

from ckptstore import CheckpointStore, errors  # noqa: E402  # after the skip
from ckptstore.integrations.lightning import CkptstoreCallback, CkptstoreCheckpointIO  # noqa: E402  # needs Lightning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.seen: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, epochs: int, **options: Any) -> Any:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(1))), batch_size=4)


def test_lightnings_own_checkpoints_are_kept_in_the_store_and_resumed_from(tmp_path: Path) -> None:
    straight = Module()
    trainer(tmp_path / "x", 4, enable_checkpointing=False).fit(straight, loader())

    def fit(epochs: int, path: str | None) -> Module:
        module = Module()
        io = CkptstoreCheckpointIO(tmp_path / "store", config=CONFIG)
        saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "ckpt", save_top_k=1, save_last=False)
        trainer(tmp_path, epochs, callbacks=[saving], plugins=[io]).fit(module, loader(), ckpt_path=path)
        return module

    fit(2, None)
    (file,) = (tmp_path / "ckpt").glob("*.ckpt")
    assert file.stat().st_size < 500, "only a name: the checkpoint is in the store"
    with CheckpointStore(tmp_path / "store") as store:
        assert [info.step for info in store.checkpoints()] == [6], "what Lightning removed is gone"
    assert fit(4, str(file)).seen == straight.seen[6:]


def test_stall_and_durable_step_reach_the_trainers_logger(tmp_path: Path) -> None:
    class Curves(pl.loggers.logger.DummyLogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.points: dict[str, dict[int, float]] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None, **_: Any) -> None:
            for name, value in metrics.items():
                self.points.setdefault(name, {})[step or 0] = value

    keeper = CkptstoreCallback(tmp_path / "store", config=CONFIG, save_every_steps=3, save_freq=0)
    options: dict[str, Any] = {"callbacks": [keeper], "enable_checkpointing": False}
    running = trainer(tmp_path, 2, **options)
    running.loggers = [curves := Curves()]
    running.fit(Module(), loader())
    assert curves.points["ckptstore/local_step"] == {3: 3.0, 6: 6.0}
    assert set(curves.points["ckptstore/save_stall_seconds"]) == {3, 6}


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 not ours")
    with pytest.raises(errors.ConfigError, match="not a checkpoint"):
        CkptstoreCheckpointIO(tmp_path / "store").load_checkpoint(tmp_path / "x.ckpt")
