"""What structure in the state saves on the wire, from ``store.save`` to the bucket and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptstore import CheckpointStore, StoreConfig
from ckptstore.blob import open_blob_store
from ckptstore.ops.listing import Details, show_checkpoint
from ckptstore.ops.open import RunTiers
from ckptstore.repo.remote import RemoteTier

CONFIG = StoreConfig(chunk_elements=4096)


class Bench:
    """A store with a bucket on disk, and what each save added to the bucket."""

    def __init__(self, path: Path) -> None:
        self.url = f"file://{path}/bucket"
        self.store = CheckpointStore(path / "store", remote=self.url, config=CONFIG)
        self.step = 0

    def save(self, state: dict[str, Any]) -> tuple[int, int]:
        """(tensor bytes, bytes this save added to the bucket); what comes back is compared bit for bit."""
        self.step += 1
        info = self.store.save(state, self.step).wait("remote", timeout_s=60)
        assert info.stored_bytes is not None
        with CheckpointStore(None, remote=self.url) as reader:
            _assert_same(reader.read(self.step), state)
        return info.size_bytes, info.stored_bytes

    def show(self) -> Details:
        blob = open_blob_store(self.url)
        try:
            return show_checkpoint(RunTiers("default", None, (RemoteTier(blob, "default", "file"),)), self.step)
        finally:
            blob.close()

    def how(self) -> dict[str, str | None]:
        return {row.name: row.stored for row in self.show().tensors}


def _assert_same(stored: Any, state: Any) -> None:
    for key, value in state.items():
        if isinstance(value, nn.Module):
            value = value.state_dict()
        elif isinstance(value, torch.optim.Optimizer):
            continue
        if isinstance(value, dict):
            _assert_same(stored[key], value)
        elif isinstance(value, torch.Tensor):
            assert stored[key].dtype == value.dtype
            assert torch.equal(stored[key].reshape(-1).view(torch.uint8), value.detach().reshape(-1).view(torch.uint8))


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


def mlp(layers: int = 6, width: int = 256, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(dtype)


def train(
    parameters: list[nn.Parameter] | list[torch.Tensor], optimizer: torch.optim.Optimizer, steps: int = 3
) -> None:
    """Steps on gradients of the scale of real ones."""
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizer.step()


class LoRA(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(4, inner.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(inner.out_features, 4))


def test_only_adapters_are_sent_when_training_lora(bench: Bench) -> None:
    model = nn.Sequential(*(LoRA(nn.Linear(1024, 1024, bias=False)) for _ in range(2)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    train(trained, optimizer)
    state = {"model": model, "optimizer": optimizer}
    _, full = bench.save(state)
    for _ in range(2):
        train(trained, optimizer)
        _, sent = bench.save(state)
        assert sent < full / 28
    kinds = bench.how()
    assert {kind for name, kind in kinds.items() if name.endswith("inner.weight")} == {"unchanged"}
    assert {kind for name, kind in kinds.items() if name.endswith(".a")} <= {"delta", "full"}


def test_only_the_head_is_sent_when_the_backbone_is_frozen(bench: Bench) -> None:
    model = nn.ModuleDict({"backbone": mlp().requires_grad_(False), "head": nn.Linear(256, 8)})
    head = list(model["head"].parameters())
    optimizer = torch.optim.AdamW(head, lr=1e-3)
    train(head, optimizer)
    state = {"model": model, "optimizer": optimizer}
    _, full = bench.save(state)
    train(head, optimizer)
    _, sent = bench.save(state)
    assert sent < full / 28


def test_an_average_is_sent_once_when_it_still_equals_the_model(bench: Bench) -> None:
    model, ema = mlp(), mlp()
    ema.load_state_dict(model.state_dict())
    size, full = bench.save({"model": model, "ema": ema})
    assert full < 0.5 * size
    with torch.no_grad():
        for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
            fast += torch.randn_like(fast) * 1e-3
            slow.lerp_(fast, 1e-4)
    bench.save({"model": model, "ema": ema})
    kinds = bench.how()
    assert {kind for name, kind in kinds.items() if name.startswith("ema.")} == {"delta"}


def test_only_touched_rows_are_sent_when_an_embedding_is_sparse(bench: Bench) -> None:
    table = nn.Embedding(40_000, 64, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        table(torch.randint(0, 400, (64,))).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    state = {"model": table, "optimizer": optimizer}
    _, full = bench.save(state)
    step()
    _, sent = bench.save(state)
    assert sent < full / 28


def test_tied_and_equal_tensors_are_sent_once(bench: Bench) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(1000, 256), "head": nn.Linear(256, 1000, bias=False)})
    model["head"].weight = model["embed"].weight
    copy = {"ref": model["embed"].weight.detach().clone()}
    size, full = bench.save({"model": model, "extra": copy})
    one = 1000 * 256 * 4
    assert size < 2.01 * one, "the tie is one tensor, the copy another"
    assert full < one


def test_bf16_weights_cost_nothing_when_their_masters_are_in_the_state(bench: Bench) -> None:
    """Mixed precision: masters are found wherever they are, through training and against deltas."""
    model = mlp(dtype=torch.bfloat16)
    masters = {name: p.detach().float() + torch.randn(p.shape) * 1e-5 for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(list(masters.values()), lr=1e-4)

    def step() -> dict[str, Any]:
        train(list(masters.values()), optimizer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        moments = {name: dict(optimizer.state[m]) for name, m in masters.items()}
        return {"model": model, "fp32": {n: m.detach() for n, m in masters.items()}, "moments": moments}

    size, full = bench.save(step())
    weights = {name for name in bench.how() if name.startswith("model.")}
    assert {bench.how()[name] for name in weights} == {"derived"}
    assert sum(row.stored_bytes or 0 for row in bench.show().tensors if row.name in weights) < 24 * 200
    assert full < 0.8 * size
    _, sent = bench.save(step())
    details = bench.show()
    kinds = {row.name: row.stored for row in details.tensors}
    assert {kinds[name] for name in weights} == {"derived"}
    assert {kind for name, kind in kinds.items() if name.startswith("fp32.")} == {"delta"}
    assert details.info.base_step == 1
    assert sent < 0.92 * full
