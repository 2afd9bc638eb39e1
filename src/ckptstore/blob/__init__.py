"""Object stores: one small interface, its implementations, and wrappers around them.

Owns: URL -> store, the contract every store keeps, retry and throttle as wrapping stores.
Must not know: checkpoints, manifests, codecs.
"""

from ckptstore.blob.base import BlobStore, Capabilities, ObjectInfo
from ckptstore.blob.url import between_processes, open_blob_store

__all__ = ["BlobStore", "Capabilities", "ObjectInfo", "between_processes", "open_blob_store"]
