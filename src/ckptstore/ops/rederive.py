"""Documents that follow from others, made anew where they are damaged: no other tier is needed for them.

``summary.json`` follows from the root manifest, ``.metadata`` from it and the shard manifests. The root manifest
itself follows from the shard manifests; it is made anew only where it is gone or no document at all, so that the fault
is known to lie in it, and where the summary bears witness to what comes out.
"""

from __future__ import annotations

from contextlib import suppress

from ckptstore.format import stock
from ckptstore.format.manifest import MAX_MANIFEST_BYTES, RootManifest, ref_of, root_of
from ckptstore.ops.findings import DAMAGE, bytes_of
from ckptstore.repo import durable, names
from ckptstore.repo.durable import raise_for_errno
from ckptstore.repo.local import LocalTier
from ckptstore.repo.local_save import LocalSave
from ckptstore.repo.remote import RemoteSave, RemoteTier
from ckptstore.repo.remote_names import parse_shard_key


def rederive(tier: LocalTier, run: str, save: LocalSave) -> None:
    """Put the derived documents of a local checkpoint right; leaves alone what can't be told for sure.

    Raises:
        StorageError: as the disk said; trying again is safe.
    """
    path = save.path
    try:
        shards = tier.shard_manifests_present(path)
    except DAMAGE:
        shards = []
    try:
        root = tier.root_manifest(run, save)
    except DAMAGE:
        try:
            root = root_of(shards)
        except DAMAGE:
            return
        if bytes_of(path / names.SUMMARY) != root.summary.encode():
            return
    wanted = {names.SUMMARY: root.summary.encode(), names.MANIFEST: root.encode()}
    if [ref_of(shard) for shard in shards] == list(root.shards):
        wanted = {names.STOCK_METADATA: stock.metadata(root, shards), **wanted}
    try:
        for name, data in wanted.items():  # the manifest comes last
            if bytes_of(path / name) != data:
                durable.write_replacing(path / name, data)
                durable.fsync_dir(path)
    except OSError as error:
        raise_for_errno(error, f"can't repair {path}", run=run, save_id=save.save_id)


def rederive_remotely(remote: RemoteTier, save: RemoteSave) -> None:
    """The same for the documents of a commit in a remote.

    Raises:
        CkptError: as the store said; trying again is safe.
    """
    try:
        root = remote.root_manifest(save)
    except DAMAGE:
        made = _root_from_shards(remote, save)
        if made is None:
            return
        root = made
    else:
        with suppress(*DAMAGE):
            if remote.summary(save) == root.summary and remote.has(save.summary_key):
                return
    remote.rewrite(save, root)


def _root_from_shards(remote: RemoteTier, save: RemoteSave) -> RootManifest | None:
    keys = [key for key in remote.list_keys("shards") if (parse_shard_key(key) or ("",))[0] == save.save_id]
    try:
        documents = [remote.shard_at(key) for key in sorted(keys)]
        root = root_of([document.shard for document in documents if document is not None])
        witness = remote.blob.get(f"runs/{remote.run}/{save.summary_key}", max_bytes=MAX_MANIFEST_BYTES)
    except DAMAGE:
        return None
    return root if witness == root.summary.encode() else None
