"""A store's URL, taken apart and checked; never with secrets in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ckptstore.blob.keys import is_key
from ckptstore.errors import ConfigError

_SECRETS = ("key", "secret", "token", "password", "signature", "credential")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Address:
    """``scheme://host/path?params``; ``path`` has no slash at either end (for ``file``: is as written)."""

    url: str
    scheme: str
    host: str
    path: str
    params: Mapping[str, str]

    def bucket_and_prefix(self, allowed: Collection[str]) -> tuple[str, str]:
        """Bucket and prefix ("" or ending in ``/``) of an object store's URL.

        Raises:
            ConfigError: no bucket, a prefix that isn't a key, or a parameter that is not in ``allowed``.
        """
        if not self.host:
            raise self.refuse("has no bucket", hint=f"write {self.scheme}://BUCKET/PREFIX")
        if self.path and not is_key(self.path):
            raise self.refuse(
                f"has the prefix {self.path!r}, which can't be used",
                hint="use segments of letters, digits, '.', '_' and '-', joined by '/'",
            )
        self.only(allowed)
        return self.host, f"{self.path}/" if self.path else ""

    def only(self, allowed: Collection[str]) -> None:
        """Raise ConfigError for a parameter that is not in ``allowed``."""
        for name in self.params:
            if name not in allowed:
                known = ", ".join(sorted(allowed)) or "none"
                raise self.refuse(f"has the unknown parameter {name!r}", hint=f"known: {known}")

    def choice(self, name: str, values: Collection[str], default: str) -> str:
        """The parameter's value, one of ``values``."""
        value = self.params.get(name, default)
        if value not in values:
            raise self.refuse(f"has {name}={value}", hint=f"use one of {', '.join(sorted(values))}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """The parameter as a truth value."""
        value = self.params.get(name)
        if value is None:
            return default
        if value.lower() in _TRUE:
            return True
        if value.lower() in _FALSE:
            return False
        raise self.refuse(f"has {name}={value}", hint="use true or false")

    def tags(self, name: str) -> dict[str, str]:
        """The parameter as tags, ``name:value`` each, with commas in between."""
        found = dict(part.partition(":")[::2] for part in self.params.get(name, "").split(",") if part)
        if not found or not all(found) or not all(found.values()):
            raise self.refuse(f"has {name}={self.params.get(name)}", hint=f"write {name}=team:nlp,project:x")
        return found

    def refuse(self, what: str, *, hint: str | None = None, **context: Any) -> ConfigError:
        """A ConfigError about this URL."""
        return ConfigError(f"the store URL {self.url} {what}", hint=hint, url=self.url, **context)


def parse_address(url: str) -> Address:
    """Take a URL apart.

    Raises:
        ConfigError: not a URL, credentials in it, or a parameter given twice. The message doesn't repeat a secret.
    """
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigError(
            "the store URL can't be parsed", hint="write scheme://bucket/prefix?name=value&name=value"
        ) from None
    scheme = parts.scheme.lower()
    if "://" not in url or not scheme:
        raise ConfigError(
            f"{url!r} is not a store URL", hint="write s3://bucket/prefix, oss://bucket/prefix or file:///path", url=url
        )
    if "@" in parts.netloc or any(_secretive(name) for name, _ in query):
        raise ConfigError(
            f"the {scheme} URL holds credentials",
            hint="take them out: URLs end up in logs and manifests. Use the environment, a profile or a role",
        )
    params = dict(query)
    if len(params) != len(query):
        raise ConfigError(f"the store URL {url} names a parameter twice", hint="name each once", url=url)
    if "@" in params.get("endpoint", ""):
        raise ConfigError(
            f"the endpoint in the {scheme} URL holds credentials",
            hint="take them out; use the environment, a profile or a role",
        )
    if parts.fragment:
        raise ConfigError(f"the store URL {url} has a '#'", hint="write it as %23", url=url)
    path = unquote(parts.path)
    return Address(url, scheme, parts.netloc, path if scheme == "file" else path.strip("/"), params)


def _secretive(name: str) -> bool:
    lowered = name.lower()
    return lowered != "kms_key" and any(word in lowered for word in _SECRETS)
