"""Writes pickles, opcode by opcode, and never reads one.

Stock PyTorch reads pickles, so what it shall open must be one. The pickles written here are made without importing the
classes they name (no torch in the agent) and are a pure function of the *values*: the library pickler's memo depends on
which objects happen to be identical, this one's only on which are equal, so a value that went through JSON gives the
same bytes as the value itself.

Protocol 2, as ``torch.save`` uses: readable by every Python 3 and by ``torch.load(weights_only=True)``.

Source: the opcode table in CPython's ``Lib/pickletools.py``.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    import numpy as np

_SHORT_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
#: NumPy's stable pickle functions; 2.x keeps the old module's names for exactly this.
_MULTIARRAY = "numpy.core.multiarray"
_NUMPY_KINDS = frozenset("biufc")


class NoPickleFormError(TypeError):
    """The value is of a type this writer doesn't know; what was written so far is void."""


@dataclass(frozen=True)
class Global:
    """An importable object, by name; written as a reference."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of calling a global at load time; written as the call."""

    function: Global
    args: tuple[Any, ...]


class PickleWriter:
    """One pickle, under construction. Push values in order, then :meth:`finish`.

    Not safe for threads; used once.
    """

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[str | Global, bytes] = {}

    def op(self, opcodes: bytes) -> None:
        """Append raw opcodes."""
        self._out += opcodes

    def finish(self) -> bytes:
        """The whole pickle; the stack must hold exactly the one value."""
        return bytes(self._out) + b"."

    def _remember(self, key: str | Global) -> None:
        index = len(self._memo)
        wide = index > 255
        number = struct.pack("<I", index) if wide else bytes((index,))
        self._out += (b"r" if wide else b"q") + number
        self._memo[key] = (b"j" if wide else b"h") + number

    def text(self, value: str) -> None:
        """Push a str."""
        known = self._memo.get(value)
        if known is not None:
            self._out += known
            return
        data = value.encode("utf-8", "surrogatepass")
        self._out += b"X" + struct.pack("<I", len(data)) + data
        self._remember(value)

    def reference(self, value: Global) -> None:
        """Push an importable object."""
        known = self._memo.get(value)
        if known is not None:
            self._out += known
            return
        self._out += f"c{value.module}\n{value.name}\n".encode()
        self._remember(value)

    def fetch(self, value: str | Global) -> bytes:
        """The opcodes that push a str or importable object, for use from here on.

        What is repeated a million times is joined from these faster than pushed piece by piece.
        """
        if value not in self._memo:
            self.value(value)
            self._out += b"0"
        return self._memo[value]

    def integer(self, value: int) -> None:
        """Push an int of any size."""
        self._out += integer(value)

    def tuple_of(self, values: Sequence[Any]) -> None:
        """Push a tuple of values."""
        if not values:
            self._out += b")"
            return
        short = _SHORT_TUPLES.get(len(values))
        if short is None:
            self._out += b"("
        for value in values:
            self.value(value)
        self._out += short or b"t"

    def call(self, function: Global, *args: Any) -> None:
        """Push the result of calling ``function`` at load time."""
        self.reference(function)
        self.tuple_of(args)
        self._out += b"R"

    def items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Set key-value pairs on the mapping on top of the stack."""
        self._out += b"("
        for key, value in pairs:
            self.value(key)
            self.value(value)
        self._out += b"u"

    def instance(self, cls: Global) -> None:
        """Push a new instance of ``cls``, not initialised; ``op(b"b")`` after a state builds it."""
        self.reference(cls)
        self._out += b")\x81"

    def value(self, value: Any) -> None:
        """Push any value of the types below.

        Raises:
            NoPickleFormError: of another type; subclasses are other types.
        """
        push = _PUSH.get(type(value))
        if push is not None:
            push(self, value)
            return
        numpy = sys.modules.get("numpy")  # costs 0.1 s to import, and whoever has a value of its types has it
        # Another thread may be importing it right now; then no value can be of it yet.
        if numpy is None or not hasattr(numpy, "generic") or not isinstance(value, (numpy.generic, numpy.ndarray)):
            raise NoPickleFormError(f"{type(value).__name__} has no stock form")
        _push_numpy(self, value)


def integer(value: int) -> bytes:
    """The opcodes that push an int."""
    if 0 <= value < 0x100:
        return b"K" + bytes((value,))
    if 0 <= value < 0x10000:
        return b"M" + struct.pack("<H", value)
    if -0x80000000 <= value < 0x80000000:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(data) < 256:
        return b"\x8a" + bytes((len(data),)) + data
    return b"\x8b" + struct.pack("<I", len(data)) + data


def integers(values: Sequence[int]) -> bytes:
    """The opcodes that push a tuple of ints."""
    if not values:
        return b")"
    body = b"".join(map(integer, values))
    short = _SHORT_TUPLES.get(len(values))
    return body + short if short else b"(" + body + b"t"


def dumps(value: Any) -> bytes:
    """The pickle of one value.

    Raises:
        NoPickleFormError: as :meth:`PickleWriter.value`.
    """
    writer = PickleWriter()
    writer.value(value)
    return writer.finish()


def _push_list(writer: PickleWriter, value: Iterable[Any]) -> None:
    writer.op(b"](")
    for item in value:
        writer.value(item)
    writer.op(b"e")


def _push_dict(writer: PickleWriter, value: Mapping[Any, Any]) -> None:
    writer.op(b"}")
    writer.items(value.items())


def _push_defaultdict(writer: PickleWriter, value: defaultdict[Any, Any]) -> None:
    factory: Any = value.default_factory
    writer.call(Global("collections", "defaultdict"), factory and Global(factory.__module__, factory.__qualname__))
    writer.items(value.items())


def _push_ordered(writer: PickleWriter, value: Mapping[Any, Any]) -> None:
    writer.call(Global("collections", "OrderedDict"))
    writer.items(value.items())


def _push_numpy(writer: PickleWriter, value: np.generic | np.ndarray[Any, Any]) -> None:
    dtype = value.dtype
    is_array = type(value).__name__ == "ndarray"
    if dtype.kind not in _NUMPY_KINDS or not (is_array or type(value) is dtype.type):
        raise NoPickleFormError(f"NumPy {type(value).__name__} of dtype {dtype} has no stock form")
    if is_array:
        writer.call(Global(_MULTIARRAY, "_reconstruct"), Global("numpy", "ndarray"), (0,), b"b")
        writer.op(b"(")
        writer.integer(1)
        writer.tuple_of(value.shape)
        _push_numpy_dtype(writer, dtype)
        writer.value(False)
        writer.value(value.tobytes())
        writer.op(b"tb")
    else:
        writer.reference(Global(_MULTIARRAY, "scalar"))
        _push_numpy_dtype(writer, dtype)
        writer.value(value.tobytes())
        writer.op(b"\x86R")


def _push_numpy_dtype(writer: PickleWriter, dtype: np.dtype[Any]) -> None:
    writer.call(Global("numpy", "dtype"), f"{dtype.kind}{dtype.itemsize}", False, True)
    order = "<" if dtype.byteorder == "=" else dtype.byteorder
    writer.tuple_of((3, order, None, None, None, -1, -1, 0))
    writer.op(b"b")


def _push_datetime(writer: PickleWriter, value: datetime) -> None:
    # A zone by name is looked up on the machine that reads, and fold has no place in a call without keywords.
    if value.fold or type(value.tzinfo) not in (type(None), timezone):
        raise NoPickleFormError("a datetime in a named zone has no stock form")
    when = (value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)
    writer.call(Global("datetime", "datetime"), *when, value.tzinfo)


def _push_timezone(writer: PickleWriter, value: timezone) -> None:
    offset, name = value.utcoffset(None), value.tzname(None)
    unnamed = name == timezone(offset).tzname(None)
    writer.call(Global("datetime", "timezone"), *((offset,) if unnamed else (offset, name)))


def _calls(module: str, name: str, args: Callable[[Any], tuple[Any, ...]]) -> Callable[[PickleWriter, Any], None]:
    """Push a value as the call that makes it."""
    function = Global(module, name)
    return lambda writer, value: writer.call(function, *args(value))


_PUSH: dict[type, Callable[[PickleWriter, Any], None]] = {
    type(None): lambda writer, _: writer.op(b"N"),
    bool: lambda writer, value: writer.op(b"\x88" if value else b"\x89"),
    int: PickleWriter.integer,
    float: lambda writer, value: writer.op(b"G" + struct.pack(">d", value)),
    complex: _calls("builtins", "complex", lambda v: (v.real, v.imag)),
    str: PickleWriter.text,
    bytes: _calls("_codecs", "encode", lambda v: (v.decode("latin1"), "latin1")),
    bytearray: _calls("builtins", "bytearray", lambda v: (bytes(v),)),
    list: _push_list,
    tuple: PickleWriter.tuple_of,
    dict: _push_dict,
    OrderedDict: _push_ordered,
    Counter: _calls("collections", "Counter", lambda v: (dict(v),)),
    defaultdict: _push_defaultdict,
    deque: _calls("collections", "deque", lambda v: (list(v), v.maxlen)),
    # A set's own order depends on the process's hash seed.
    set: _calls("builtins", "set", lambda v: (sorted(v, key=dumps),)),
    frozenset: _calls("builtins", "frozenset", lambda v: (sorted(v, key=dumps),)),
    range: _calls("builtins", "range", lambda v: (v.start, v.stop, v.step)),
    slice: _calls("builtins", "slice", lambda v: (v.start, v.stop, v.step)),
    Decimal: _calls("decimal", "Decimal", lambda v: (str(v),)),
    Fraction: _calls("fractions", "Fraction", lambda v: (v.numerator, v.denominator)),
    UUID: _calls("uuid", "UUID", lambda v: (str(v),)),
    date: _calls("datetime", "date", lambda v: (v.year, v.month, v.day)),
    timedelta: _calls("datetime", "timedelta", lambda v: (v.days, v.seconds, v.microseconds)),
    timezone: _push_timezone,
    datetime: _push_datetime,
    Global: PickleWriter.reference,
    Call: lambda writer, value: writer.call(value.function, *value.args),
}
