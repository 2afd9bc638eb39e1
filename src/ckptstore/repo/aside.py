"""Setting a damaged checkpoint aside: it counts no longer, and not a byte of it is lost.

In the local tier its directory gets a name outside the grammar of :mod:`ckptstore.repo.names`, so that nobody lists,
loads, counts or deletes it; renamed back it is what it was. In a remote, where nothing can be renamed, its manifest
is copied to ``aside/<save_id>.json`` before the commit goes; gc keeps whatever belongs to a save that lies there, until
that object is removed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ckptstore.clock import new_nonce
from ckptstore.errors import CheckpointNotFoundError, ConflictError, NoStoreError, NotFoundError
from ckptstore.format.manifest import MAX_MANIFEST_BYTES
from ckptstore.repo import durable, names
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.local import LocalTier
from ckptstore.repo.remote import RemoteSave, RemoteTier

FOLDER = "aside"


def aside_key(save_id: str) -> str:
    """Where the manifest of a save lies that was set aside: named so that whoever meets a pack of it can ask."""
    return f"{FOLDER}/{save_id}.json"


def set_aside(tier: LocalTier, run: str, save_id: str) -> Path:
    """Rename a checkpoint's directory to ``damaged-...``; where it is now. One atomic step, durable.

    Raises:
        CheckpointNotFoundError: this tier does not have it.
        StorageError: as the disk said; it is where it was.
    """
    save = tier.find(run, save_id)
    if save is None:
        raise CheckpointNotFoundError(f"run {run!r} has no save {save_id} in {tier.root}", run=run, save_id=save_id)
    target = save.path.with_name(f"damaged-{save.path.name}")
    try:
        if os.path.lexists(target):
            target = target.with_name(f"{target.name}-{new_nonce()}")
        os.rename(save.path, target)
        durable.fsync_parent(target)
    except OSError as error:
        raise_for_errno(error, f"can't set {save.path} aside", run=run, save_id=save_id)
    return target


def set_aside_remotely(remote: RemoteTier, save: RemoteSave) -> str:
    """Take a commit away and keep its manifest under ``aside/``; the key of that, below the run's prefix. Idempotent.

    Raises:
        CredentialsError: without the right to delete.
        StorageError: the store refused; the commit is there still, or only its copy under ``aside/`` is.
    """
    key = aside_key(save.save_id)
    try:
        manifest = remote.blob.get(f"runs/{remote.run}/{save.key}", max_bytes=MAX_MANIFEST_BYTES)
    except NoStoreError:
        raise
    except NotFoundError:
        manifest = b""  # the name alone keeps gc away from what is left
    with suppress(ConflictError):  # set aside before, committed again since: the first copy stays
        remote.create_document(key, manifest)
    remote.delete(save)
    return key


def saves_aside(remote: RemoteTier) -> frozenset[str]:
    """The save_ids that were set aside on this remote. One LIST."""
    found = (key.removeprefix(f"{FOLDER}/").removesuffix(".json") for key in remote.list_keys(FOLDER))
    return frozenset(save_id for save_id in found if names.is_save_id(save_id))
