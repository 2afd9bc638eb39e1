"""A small GPT over bytes, about 11 million parameters, with dropout that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  torch's own customary name
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; the default has 10.8 million parameters."""

    vocab: int = 256
    block: int = 96
    layers: int = 6
    heads: int = 6
    width: int = 384
    dropout: float = 0.1


class SampleDropout(nn.Module):
    """Dropout whose mask belongs to the sample, not to the rank that happens to compute it.

    ``generators`` holds one generator per row of the batch. A sample thus meets the same masks on 1, 2 or 3 ranks,
    which is what makes losses comparable after resharding.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: Sequence[torch.Generator] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability ``p`` and scale the rest; x is (batch, ...)."""
        if not self.training or self.p == 0:
            return x
        masks = [torch.rand(row.shape, generator=g) >= self.p for row, g in zip(x, self.generators, strict=True)]
        return x * torch.stack(masks) / (1 - self.p)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = SampleDropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same shape."""
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).reshape(batch, time, width)))
        result: Tensor = x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))
        return result


class GPT(nn.Module):
    """Bytes in, next-byte logits out; the output layer shares its weight with the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position = nn.Parameter(torch.zeros(config.block, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) int64 -> (batch, time, vocab)."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = F.linear(self.norm(x), self.embed.weight)
        return logits

    def use_generators(self, generators: Sequence[torch.Generator]) -> None:
        """Give every dropout the generators of the coming batch's rows."""
        for module in self.modules():
            if isinstance(module, SampleDropout):
                module.generators = generators
