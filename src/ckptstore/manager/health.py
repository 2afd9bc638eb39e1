"""Whether a model's values are finite: a quick look at every save, a thorough one before an emergency save counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

#: Tensors up to this many elements are looked at every time.
SMALL = 1 << 16
#: Of the larger ones, one in this many each time.
TURNS = 8


def has_bad_values(modules: Iterable[nn.Module], *, turn: int, is_thorough: bool) -> bool:
    """Whether a parameter or buffer holds NaN or infinity on this rank.

    Costs one pass over what it looks at and one synchronisation: small tensors always, of the large ones every eighth
    in turn, all of them when thorough. Values that have gone bad are in every parameter one step later.
    """
    largest: dict[torch.device, list[torch.Tensor]] = {}
    count = 0
    with torch.no_grad():
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                if not (local.is_floating_point() or local.is_complex()) or local.numel() == 0 or local.is_meta:
                    continue
                if local.numel() > SMALL:
                    count += 1
                    if not is_thorough and count % TURNS != turn % TURNS:
                        continue
                largest.setdefault(local.device, []).append(_largest(local))
        return any(not bool(torch.isfinite(torch.stack(each)).all()) for each in largest.values())


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest magnitude: NaN or infinite exactly if some element is; a sum could overflow."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, ord=math.inf)
    return norm.to(torch.float32)


def has_bad_metrics(metrics: Mapping[str, float]) -> bool:
    """Whether some metric is not finite."""
    return any(not math.isfinite(value) for value in metrics.values())
