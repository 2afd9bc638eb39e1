"""Trainings by Lightning and transformers on several ranks; each returns the losses this rank has seen, by step."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training import CONFIG

from ckptstore.manager import ResumableLoader

LAST_STEP = 12


def as_under_torchrun(rank: int) -> None:
    """What a launcher tells libraries."""
    world_size = dist.get_world_size()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="none", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.update(CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
    warnings.simplefilter("ignore")


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(48, 8, generator=generator), torch.randn(48, 1, generator=generator))


def lightning(rank: int, folder: Path | None, strategy: str, die_at: int) -> dict[int, float]:
    """Three epochs of four steps; without a folder, Lightning alone. Dies after step ``die_at``, at once."""
    as_under_torchrun(rank)
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from ckptstore.integrations.lightning import CkptstoreCallback

    seen: dict[int, float] = {}

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
            torch.manual_seed(100 + rank)

        def configure_model(self) -> None:
            if strategy == "fsdp2":
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            seen[self.global_step + 1] = loss.item()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    callbacks: list[Any] = []
    if folder is not None:
        callbacks.append(keeper := CkptstoreCallback(folder, config=CONFIG, save_every_steps=3, save_freq=0))

        class Death(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == die_at:
                    keeper.manager.store.wait("local")
                    dist.barrier()
                    os._exit(1)

        callbacks.append(Death())
    if strategy == "fsdp1":  # Lightning lets it run on GPUs only, although it needs none
        _AcceleratorConnector._check_strategy_and_fallback = lambda self: None  # type: ignore[method-assign]
        whole = FullyShardedDataParallel.__init__

        def on_cpu(self: Any, *args: Any, **options: Any) -> None:
            whole(self, *args, **{**options, "device_id": torch.device("cpu")})

        FullyShardedDataParallel.__init__ = on_cpu  # type: ignore[method-assign]
    strategies = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp1": lambda: FSDPStrategy(process_group_backend="gloo", auto_wrap_policy={nn.Linear}),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    data = dataset()
    sampler: Any = DistributedSampler(data, dist.get_world_size(), rank, seed=3)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategies[strategy](),
        callbacks=callbacks,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), ResumableLoader(DataLoader(data, batch_size=6, sampler=sampler)))
    return seen


class Curves:
    """What is used of a TensorBoard writer."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int | None]] = {}

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        self.steps.setdefault(tag, []).append(global_step)


def transformers(rank: int, folder: Path, is_kept: bool, die_at: int) -> dict[int, float]:
    """Twelve steps of DDP; kept by the callback, or by the Trainer alone."""
    as_under_torchrun(rank)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ckptstore.integrations.alone import store_of_this_rank
    from ckptstore.integrations.transformers import CkptstoreCallback, resume_path

    seen: dict[int, float] = {}

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.net(inputs) - labels).square().mean()}

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                seen[state.global_step] = logs["loss"]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == die_at:
                if store is not None:
                    store.wait("local")
                dist.barrier()
                os._exit(1)

    curves = Curves()
    store = store_of_this_rank(folder / "store", None, None, CONFIG) if is_kept and rank == 0 else None
    scratch = folder / "scratch"
    trainer = Trainer(
        model=Regression(),
        args=TrainingArguments(
            output_dir=str(scratch),
            max_steps=LAST_STEP,
            per_device_train_batch_size=6,
            save_steps=3,
            save_total_limit=1,
            logging_steps=1,
            use_cpu=True,
            ddp_backend="gloo",
            report_to=[],
            disable_tqdm=True,
            learning_rate=0.05,
            save_strategy="steps" if is_kept else "no",
        ),
        train_dataset=[{"inputs": x, "labels": y} for x, y in dataset()],
        callbacks=[Watch()],
    )
    if store is not None:
        trainer.add_callback(CkptstoreCallback(store, summary_writer=curves))
    found = [resume_path(store, scratch) if store is not None else None]
    dist.broadcast_object_list(found)
    trainer.train(resume_from_checkpoint=found[0])
    if store is not None:
        store.close()
        assert curves.steps["ckptstore/local_step"][-1] == LAST_STEP
    return seen
