"""Genuine training states for benchmarks: a small GPT trained here, on the CPU, for a few minutes.

Compression figures on random tensors say nothing, so :func:`make_states` trains: bf16 + fp32 AdamW pre-training,
fp32 AdamW, low-rate fine-tuning, LoRA, a frozen backbone, and a sparse embedding. Text is the standard library's own
source, byte by byte, so that a run needs no download. The result is cached as ``.npz``; equal arguments on one
machine give the same states.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

#: name -> (dtype name, bytes of the tensor as uint8)
State = dict[str, tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Size:
    """Shape of the model and length of the run."""

    width: int = 1024
    layers: int = 2
    context: int = 128
    batch: int = 4
    steps: int = 120


class Block(nn.Module):
    """One pre-norm transformer block with separate q, k, v, so that LoRA can adapt q and v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(1, width // 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, time_, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(batch, time_, self.heads, width // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A byte-level GPT."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of rank 4."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(4, inner.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(inner.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (x @ self.a.T.to(x.dtype)) @ self.b.T.to(x.dtype)


def _text(seed: int, *, tests: bool) -> np.ndarray:
    """About 4 MB of Python source; ``tests`` picks the other half of the library, for fine-tuning."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.glob("*/*.py" if tests else "*.py"))
    rng = np.random.default_rng(seed)
    rng.shuffle(files)
    data = b"".join(p.read_bytes() for p in files[:400])[: 4 << 20]
    return np.frombuffer(data, np.uint8)


def _batches(size: Size, seed: int, *, tests: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    text, rng = _text(seed, tests=tests), np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - size.context - 1, size.batch)
        rows = torch.from_numpy(np.stack([text[s : s + size.context + 1] for s in starts]).astype(np.int64))
        yield rows[:, :-1], rows[:, 1:]


def _raw(tensor: Tensor) -> tuple[str, np.ndarray]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), flat.numpy().copy()


class Run:
    """A model in ``dtype`` with fp32 masters (the parameters themselves in fp32) under AdamW."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, lr: float) -> None:
        self.model = model.to(dtype)
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.mixed = dtype != torch.float32
        self.masters = [p.detach().float().requires_grad_() for p in self.params] if self.mixed else self.params
        self.optimizer = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def train(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: Callable[[int], float]) -> float:
        """``steps`` steps; returns the last loss."""
        loss = torch.zeros(())
        for step in range(steps):
            tokens, targets = next(batches)
            logits = self.model(tokens)
            loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))
            self.model.zero_grad()
            loss.backward()
            if self.mixed:
                for master, param in zip(self.masters, self.params, strict=True):
                    master.grad = None if param.grad is None else param.grad.float()
            torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
            self.optimizer.param_groups[0]["lr"] = lr(step)
            self.optimizer.step()
            if self.mixed:
                with torch.no_grad():
                    for master, param in zip(self.masters, self.params, strict=True):
                        param.copy_(master)
        return float(loss.detach())

    def state(self) -> State:
        """Every tensor a checkpoint of this run holds."""
        out: State = {f"model.{n}": _raw(p) for n, p in self.model.named_parameters()}
        for name, master in zip(self.names, self.masters, strict=True):
            if self.mixed:
                out[f"master.{name}"] = _raw(master)
            for key, value in self.optimizer.state[master].items():
                out[f"optim.{name}.{key}"] = _raw(value)
        return out


def make_states(size: Size, say: Callable[[str], None] = print) -> dict[str, State]:
    """Train everything; scenario -> state. A scenario ``x+10`` is ``x`` ten optimizer steps later."""
    torch.manual_seed(0)
    states: dict[str, State] = {}
    began = time.process_time()

    def keep(name: str, run: Run, loss: float) -> None:
        states[name] = run.state()
        say(f"{name}: loss {loss:.3f}, {time.process_time() - began:.0f} CPU s")

    peak, low = 6e-4, 6e-5
    warm = max(1, size.steps // 10)

    def schedule(step: int) -> float:
        if step < warm:
            return peak * (step + 1) / warm
        return max(low, peak * 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (size.steps - warm)))))

    pretrain = Run(GPT(size), dtype=torch.bfloat16, lr=low)
    batches = _batches(size, 0)
    keep("mixed", pretrain, pretrain.train(batches, size.steps, schedule))
    checkpoint = {n: m.detach().clone() for n, m in zip(pretrain.names, pretrain.masters, strict=True)}
    keep("mixed+10", pretrain, pretrain.train(batches, 10, lambda _: low))

    def fresh() -> GPT:
        model = GPT(size)
        model.load_state_dict(checkpoint)
        return model

    for name, lr in (("tune-1e-5", 1e-5), ("tune-1e-6", 1e-6)):
        tune, other = Run(fresh(), dtype=torch.bfloat16, lr=lr), _batches(size, 1, tests=True)
        keep(name, tune, tune.train(other, max(5, size.steps // 10), lambda _, lr=lr: lr))
        keep(f"{name}+10", tune, tune.train(other, 10, lambda _, lr=lr: lr))
        for scenario in (name, f"{name}+10"):  # only the weights are looked at
            states[scenario] = {n: v for n, v in states[scenario].items() if n.startswith("model.")}

    full = Run(GPT(size), dtype=torch.float32, lr=low)
    batches = _batches(size, 2)
    keep("fp32", full, full.train(batches, size.steps // 2, lambda s: schedule(2 * s)))
    keep("fp32+10", full, full.train(batches, 10, lambda _: low))

    model = fresh().requires_grad_(False)
    for block in model.blocks:
        block.q, block.v = LoRA(block.q), LoRA(block.v)
    lora, other = Run(model, dtype=torch.float32, lr=1e-4), _batches(size, 3, tests=True)
    keep("lora", lora, lora.train(other, 20, lambda _: 1e-4))
    keep("lora+10", lora, lora.train(other, 10, lambda _: 1e-4))

    model = fresh().requires_grad_(False)
    model.norm.requires_grad_(True)
    frozen, other = Run(model, dtype=torch.float32, lr=1e-4), _batches(size, 4, tests=True)
    keep("frozen", frozen, frozen.train(other, 10, lambda _: 1e-4))
    keep("frozen+10", frozen, frozen.train(other, 10, lambda _: 1e-4))

    table = nn.Embedding(40_000, 64, sparse=True)
    adam, rng = torch.optim.SparseAdam(table.parameters(), lr=1e-3), np.random.default_rng(5)
    target = torch.randn(64)
    for name, steps in (("sparse", 100), ("sparse+10", 10)):
        for _ in range(steps):
            rows = torch.from_numpy(rng.zipf(1.3, 256) % 40_000)
            adam.zero_grad()
            functional.mse_loss(table(rows), target.expand(256, 64)).backward()
            adam.step()
        states[name] = {"model.weight": _raw(table.weight)} | {
            f"optim.weight.{k}": _raw(v) for k, v in adam.state[table.weight].items() if isinstance(v, Tensor)
        }
    return states


def load_or_make(size: Size, cache: Path | None, say: Callable[[str], None] = print) -> dict[str, State]:
    """States from the cache file if it is there, else trained and kept there."""
    if cache is not None and cache.exists():
        with np.load(cache) as archive:
            states: dict[str, State] = {}
            for key in archive.files:
                scenario, name, dtype = key.split("|")
                states.setdefault(scenario, {})[name] = (dtype, archive[key])
            return states
    states = make_states(size, say)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **{f"{s}|{n}|{d}": a for s, state in states.items() for n, (d, a) in state.items()})
    return states
