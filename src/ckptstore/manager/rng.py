"""Random state of this process: Python, NumPy, torch on the CPU and on every device."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """The state of every global generator, as it is now; nothing is drawn."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64, device="cpu"), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        }
        if numpy_state["bit_generator"] == "MT19937"
        else None,
        "torch": torch.get_rng_state(),
    }
    for kind, module in _devices():
        states = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]
        state[kind] = dict(enumerate(states))
    return state


def restore(state: Mapping[str, Any]) -> list[str]:
    """Put the generators where they were; sentences about those that could not be."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if (numpy_state := state.get("numpy")) is not None:
        key = numpy_state["key"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["gauss"]))
    torch.set_rng_state(state["torch"])
    problems: list[str] = []
    here = dict(_devices())
    for kind in state.keys() - {"python", "numpy", "torch"}:
        if kind not in here:
            problems.append(f"the checkpoint has random state of {kind}, which this process does not use")
            continue
        for index, stored in state[kind].items():
            try:
                here[kind].set_rng_state(*([stored] if kind == "mps" else [stored, int(index)]))
            except (RuntimeError, AssertionError, IndexError, TypeError) as error:
                problems.append(f"random state of {kind}:{index} was not restored: {error}")
    return problems


def _devices() -> list[tuple[str, Any]]:
    """The accelerator this process has begun to use, if any; asking must not initialise one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator.type)
    is_initialized = getattr(module, "is_initialized", None)
    if is_initialized is not None and not is_initialized():
        return []
    return [(accelerator.type, module)]
