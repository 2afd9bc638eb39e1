"""From what a person typed to the tiers of one run. What remotes need is imported where one is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptstore.errors import CheckpointNotFoundError, ConfigError, NoStoreError
from ckptstore.format.manifest import check_run_name
from ckptstore.repo.catalog import Catalog
from ckptstore.repo.local import LocalTier

if TYPE_CHECKING:
    from ckptstore.blob.base import BlobStore
    from ckptstore.repo.remote import RemoteTier


@dataclass(frozen=True)
class Place:
    """A local tier, buckets, or both, with their runs still to choose."""

    local: LocalTier | None
    blobs: Mapping[str, BlobStore]

    def runs(self) -> list[str]:
        """The runs any of them holds, sorted."""
        found: set[str] = set()
        if self.local is not None and self.local.exists():
            found.update(self.local.runs())
        for blob in self.blobs.values():
            from ckptstore.repo.remote import runs

            found.update(runs(blob))
        return sorted(found)

    def tiers(self, run: str) -> RunTiers:
        """The tiers of one run."""
        if not self.blobs:
            return RunTiers(run, self.local, ())
        from ckptstore.repo.remote import RemoteTier

        return RunTiers(run, self.local, tuple(RemoteTier(blob, run, name) for name, blob in self.blobs.items()))

    def choose_run(self, run: str | None) -> str:
        """The run asked for, or the only one there is.

        Raises:
            CheckpointNotFoundError: no run at all, or not this one.
            ConfigError: several, and none was named.
        """
        runs = self.runs()
        if run is not None:
            check_run_name(run)
            if run not in runs:
                raise CheckpointNotFoundError(f"no run {run!r} here; there are: {', '.join(runs) or 'none'}", run=run)
            return run
        if not runs:
            raise CheckpointNotFoundError("the store is empty", hint="nothing has been saved here yet")
        if len(runs) > 1:
            raise ConfigError(f"the store holds several runs: {', '.join(runs)}", hint="name one with --run")
        return runs[0]

    def close(self) -> None:
        """Release connections."""
        for blob in self.blobs.values():
            blob.close()


@dataclass(frozen=True)
class RunTiers:
    """One run's tiers."""

    run: str
    local: LocalTier | None
    remotes: tuple[RemoteTier, ...]

    def catalog(self, *, tolerate_unreachable: bool = False) -> Catalog:
        """The union of what the tiers hold."""
        return Catalog.read(self.local, self.remotes, self.run, tolerate_unreachable=tolerate_unreachable)


def is_url(text: str) -> bool:
    """Whether this names a remote rather than a folder."""
    return "://" in text


def open_place(store: str | None, remote: str | None = None, *, must_exist: bool = True) -> Place:
    """Open a local root or a URL, and a remote beside a local root.

    Raises:
        ConfigError: nothing named, or an unknown scheme.
        NoStoreError: there is no store.
    """
    if store is None and remote is None:
        raise ConfigError("no store named", hint="give STORE, CKPTSTORE_LOCAL or CKPTSTORE_REMOTE, or a ckptstore.toml")
    urls = [text for text in (store, remote) if text is not None and is_url(text)]
    local = LocalTier(Path(store).absolute()) if store is not None and not is_url(store) else None
    if remote is not None and not is_url(remote):
        raise ConfigError(f"--remote must be a URL, not {remote!r}", hint="s3://bucket/prefix")
    if must_exist and local is not None and not urls and not local.exists():
        raise NoStoreError(f"no store at {local.root}", hint="check the path; a store has a file ckptstore.json")
    if not urls:
        return Place(local, {})
    from ckptstore.blob import between_processes, open_blob_store
    from ckptstore.repo.remote import RemoteTier

    blobs: dict[str, BlobStore] = {}
    for url in dict.fromkeys(urls):
        scheme = url.partition("://")[0]
        blobs[scheme if scheme not in blobs else f"{scheme}-2"] = open_blob_store(between_processes(url))
    if must_exist and local is None:
        for name, blob in blobs.items():
            if not RemoteTier(blob, "default", name).exists():
                raise NoStoreError(f"no store at {blob.url}", hint="check bucket and prefix")
    return Place(local, blobs)
