"""Torch's small non-tensor types in the state tree: dtype, device, Size, layout, memory format, Generator.

Importing this module registers them; whoever encodes or decodes trees beside torch imports it. A process without torch
reads and restores such trees all the same, and sees these values as opaque.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ckptstore.errors import FormatError, StateError
from ckptstore.format.tree import register_type

_LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}
_MEMORY_FORMATS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format)}
_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def _named(kind: str, table: dict[str, Any], value: object) -> Any:
    """The entry of a closed table; names are looked up, never evaluated."""
    found = table.get(value) if isinstance(value, str) else None
    if found is None:
        raise FormatError(f"{value!r:.80} is not a {kind} of this torch", hint="upgrade torch")
    return found


def _size(value: object) -> torch.Size:
    if type(value) is not list or not all(type(n) is int and -(1 << 63) <= n < 1 << 63 for n in value):
        raise FormatError("a torch.Size is a list of 64-bit ints")
    return torch.Size(value)


def _device(value: object) -> torch.device:
    if not isinstance(value, str):
        raise FormatError("a torch.device is a name")
    return torch.device(value)


def _generator_state(value: torch.Generator) -> object:
    device, state = str(value.device), value.get_state()
    if state.device.type != "cpu":
        raise StateError(f"the state of a generator on {device} is not readable on the host")
    return {"device": device, "state": bytes(state.numpy())}


def _generator(value: object) -> torch.Generator:
    if type(value) is not dict or value.keys() != {"device", "state"} or type(value["state"]) is not bytes:
        raise FormatError("damaged state of a torch.Generator")
    generator = torch.Generator(_device(value["device"]))
    current = generator.get_state()
    if len(value["state"]) != current.numel():
        raise FormatError("the state of a torch.Generator has another size in this torch")
    # torch checks the contents: magic and index.
    generator.set_state(torch.frombuffer(bytearray(value["state"]), dtype=torch.uint8))
    return generator


register_type(torch.dtype, name="torch.dtype", encode=str, decode=partial(_named, "dtype", _DTYPES))
register_type(torch.device, name="torch.device", encode=str, decode=_device)
register_type(torch.Size, name="torch.Size", encode=lambda size: [int(n) for n in size], decode=_size)
register_type(torch.layout, name="torch.layout", encode=str, decode=partial(_named, "layout", _LAYOUTS))
register_type(
    torch.memory_format,
    name="torch.memory_format",
    encode=str,
    decode=partial(_named, "memory format", _MEMORY_FORMATS),
)
register_type(torch.Generator, name="torch.Generator", encode=_generator_state, decode=_generator)
