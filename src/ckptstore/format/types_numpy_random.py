"""NumPy's random generators: each continues with the number it would have given next, and spawns the same children."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptstore.format.types_base import BY_TAG, BY_TYPE, Json, Path, add_codec, integer, malformed, refuse, text
from ckptstore.format.types_engine import Decoder, Encoder

_GENERATORS: dict[str, type[np.random.BitGenerator]] = {
    cls.__name__: cls
    for cls in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}
#: kind -> arrays of the state (dtype, length) and numbers (highest value); NumPy itself checks only part of this.
_U64 = (1 << 64) - 1
_STATE: dict[str, dict[str, Any]] = {
    "MT19937": {"state": {"key": ("uint32", 624), "pos": 624}},
    "PCG64": {"state": {"state": (1 << 128) - 1, "inc": (1 << 128) - 1}, "has_uint32": 1, "uinteger": (1 << 32) - 1},
    "PCG64DXSM": {
        "state": {"state": (1 << 128) - 1, "inc": (1 << 128) - 1},
        "has_uint32": 1,
        "uinteger": (1 << 32) - 1,
    },
    "Philox": {
        "state": {"counter": ("uint64", 4), "key": ("uint64", 2)},
        "buffer": ("uint64", 4),
        "buffer_pos": 4,
        "has_uint32": 1,
        "uinteger": (1 << 32) - 1,
    },
    "SFC64": {"state": {"state": ("uint64", 4)}, "has_uint32": 1, "uinteger": (1 << 32) - 1},
}


def _check_state(state: Any, spec: Any, path: Path) -> None:
    if isinstance(spec, dict):
        if type(state) is not dict or state.keys() - {"bit_generator"} != spec.keys():
            malformed(path, "damaged state of a random generator")
        for name, part in spec.items():
            _check_state(state[name], part, path)
    elif isinstance(spec, tuple):
        dtype, length = spec
        if not isinstance(state, np.ndarray) or state.dtype != np.dtype(dtype) or state.shape != (length,):
            malformed(path, "damaged state of a random generator")
    else:
        integer(state, path, low=0, high=spec)


def _encode_bits(enc: Encoder, value: np.random.BitGenerator, path: Path) -> Json:
    node: Json = {"kind": type(value).__name__, "state": enc.key(dict(value.state), path)}
    seed = value.seed_seq
    if type(seed) is np.random.SeedSequence:
        node["seed"] = enc.key(seed, path)
    return node


def _decode_bits(dec: Decoder, node: Json, path: Path) -> np.random.BitGenerator:
    kind = text(node.get("kind"), path)
    if kind not in _GENERATORS:
        malformed(path, f"unknown random generator {kind!r:.60}")
    state = dec.value(node.get("state"), path)
    _check_state(state, _STATE[kind], path)
    seed = dec.value(node["seed"], path) if "seed" in node else 0
    if seed != 0 and not isinstance(seed, np.random.SeedSequence):
        malformed(path, "damaged seed of a random generator")
    result = _GENERATORS[kind](seed)
    result.state = state
    return result


def _encode_seed(enc: Encoder, value: np.random.SeedSequence, path: Path) -> Json:
    return {"v": enc.key(dict(value.state), path)}


def _decode_seed(dec: Decoder, node: Json, path: Path) -> np.random.SeedSequence:
    state = dec.value(node.get("v"), path)
    integer(state["pool_size"], path, low=4, high=64)
    integer(state["n_children_spawned"], path, low=0, high=1 << 31)
    return np.random.SeedSequence(**state)


def _encode_random_state(enc: Encoder, value: np.random.RandomState, path: Path) -> Json:
    state: Any = value.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        refuse(path, f"a RandomState over {state['bit_generator']} has no stored form", "use numpy.random.Generator")
    return {"v": enc.key(dict(state), path)}


def _decode_random_state(dec: Decoder, node: Json, path: Path) -> np.random.RandomState:
    state = dec.value(node.get("v"), path)
    spec = _STATE["MT19937"] | {"has_gauss": 1}
    gauss = state.get("gauss")
    _check_state({k: v for k, v in state.items() if k != "gauss"}, spec, path)
    if type(gauss) is not float or state["bit_generator"] != "MT19937":
        malformed(path, "damaged state of a RandomState")
    result = np.random.RandomState(0)
    result.set_state(state)
    return result


def _decode_generator(dec: Decoder, node: Json, path: Path) -> np.random.Generator:
    bits = dec.value(node.get("v"), path)
    if not isinstance(bits, np.random.BitGenerator):
        malformed(path, "a Generator has a bit generator")
    return np.random.Generator(bits)


add_codec("np.bits", None, "kind state seed", _encode_bits, _decode_bits)
for _cls in _GENERATORS.values():
    BY_TYPE[_cls] = BY_TAG["np.bits"]
add_codec("np.SeedSequence", np.random.SeedSequence, "v", _encode_seed, _decode_seed)
add_codec("np.RandomState", np.random.RandomState, "v", _encode_random_state, _decode_random_state)
add_codec(
    "np.Generator",
    np.random.Generator,
    "v",
    lambda enc, value, path: {"v": enc.key(value.bit_generator, path)},
    _decode_generator,
)
