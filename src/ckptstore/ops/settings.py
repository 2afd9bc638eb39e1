"""Settings from files and the environment, for the edge: argument > environment > ``ckptstore.toml`` > default.

::

    CKPTSTORE_LOCAL, CKPTSTORE_REMOTE, CKPTSTORE_RUN       local, remote, run
    CKPTSTORE_CONFIG__PACK_BYTES=134217728                 [config] pack_bytes
    CKPTSTORE_PRICES__STORED_GIB_MONTH=0.023               [prices] stored_gib_month
    CKPTSTORE_FILE=/etc/ckptstore.toml                     instead of ./ckptstore.toml

A name nobody knows is an error, never passed over. Secrets have no place in any of them.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptstore.config import StoreConfig
from ckptstore.errors import ConfigError

FILE = "ckptstore.toml"
PLACES = ("local", "remote", "run")
TABLES = ("config", "prices")

#: US dollars. Source: list prices of S3 Standard, us-east-1; put your own in the ``[prices]`` table.
PRICES: Mapping[str, float] = {
    "stored_gib_month": 0.023,
    "put_thousand": 0.005,
    "get_thousand": 0.0004,
    "egress_gib": 0.09,
}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, its value, and where that came from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Settings:
    """What environment and file say; ``found`` has only what one of them sets."""

    found: Mapping[str, Setting] = field(default_factory=dict)

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ, folder: Path | None = None) -> Settings:
        """Read the file, then the environment over it.

        Args:
            environ: The environment.
            folder: Where ``ckptstore.toml`` may lie; None: the working directory.

        Raises:
            ConfigError: the file can't be read, or a name is unknown.
        """
        found: dict[str, Setting] = {}
        named = environ.get("CKPTSTORE_FILE")
        path = Path(named) if named else (folder or Path()) / FILE
        if named or path.exists():
            for name, value in _flat(_load(path), str(path)).items():
                found[name] = Setting(name, value, str(path))
        for variable, text in environ.items():
            known = _name_of(variable)
            if known is not None and text:
                found[known] = Setting(known, text if known in PLACES else _parsed(text), variable)
        for setting in found.values():
            _check(setting)
        return cls(found)

    def get(self, name: str) -> str | None:
        """``local``, ``remote`` or ``run``, where set."""
        setting = self.found.get(name)
        return None if setting is None else str(setting.value)

    def config(self, given: StoreConfig | None = None) -> StoreConfig:
        """The configuration with every default in place.

        Args:
            given: What the program says; the fields that it sets count before what was found.

        Raises:
            ConfigError: a value is of the wrong type, or values contradict each other.
        """
        said = {name: getattr(given, name) for name in given.model_fields_set} if given is not None else {}
        found = self._table("config")
        try:
            return StoreConfig(**{**{name: s.value for name, s in found.items()}, **said})
        except ConfigError as error:
            name = str(error.context.get("key"))
            if name not in found or name in said:
                raise
            raise ConfigError(f"{found[name].origin}: {error.message}", hint=error.hint, key=name) from None

    def prices(self) -> dict[str, float]:
        """US dollars by kind of use."""
        return {**PRICES, **{name: float(s.value) for name, s in self._table("prices").items()}}

    def everything(self, arguments: Mapping[str, Any] | None = None) -> list[Setting]:
        """Every setting there is, with its value in force and the origin of that.

        Args:
            arguments: What the command line said of ``local``, ``remote`` and ``run``.
        """
        given = {name: Setting(name, value, "argument") for name, value in (arguments or {}).items() if value}
        values = {f"config.{name}": value for name, value in self.config().model_dump().items()}
        values |= {f"prices.{name}": value for name, value in self.prices().items()}
        result = [given.get(name) or self.found.get(name) or Setting(name, None, "default") for name in PLACES]
        for name, value in values.items():
            origin = self.found[name].origin if name in self.found else "default"
            result.append(Setting(name, value, origin))
        return result

    def _table(self, table: str) -> dict[str, Setting]:
        prefix = f"{table}."
        return {name.removeprefix(prefix): s for name, s in self.found.items() if name.startswith(prefix)}


def _name_of(variable: str) -> str | None:
    """The setting this environment variable is about; None for any that is about something else."""
    if not variable.startswith("CKPTSTORE_"):
        return None
    name = variable.removeprefix("CKPTSTORE_").lower().replace("__", ".")
    return name if name in PLACES or (name.partition(".")[0] in TABLES and "." in name) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        read: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return read
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}", hint="check CKPTSTORE_FILE") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _flat(document: Mapping[str, Any], what: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if name in TABLES and isinstance(value, Mapping):
            flat.update({f"{name}.{key}": below for key, below in value.items()})
        elif name in PLACES and isinstance(value, str):
            flat[name] = value
        else:
            raise _unknown(what, name, name, (*PLACES, *TABLES))
    return flat


def _check(setting: Setting) -> None:
    table, _, name = setting.name.partition(".")
    known = {"config": StoreConfig.model_fields, "prices": PRICES}.get(table)
    if known is not None and name not in known:
        raise _unknown(setting.origin, setting.name, name, known)
    is_number = isinstance(setting.value, (int, float)) and not isinstance(setting.value, bool)
    if table == "prices" and not (is_number and setting.value >= 0):
        raise ConfigError(f"{setting.origin}: {setting.name} must be a number of dollars, not {setting.value!r}")


def _unknown(origin: str, name: str, word: str, known: Collection[str]) -> ConfigError:
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"{origin}: {name!r} is not a setting", hint=f"{hint}known: {', '.join(known)}")
