"""What is on disk: manifests, the typed state tree, names, the envelopes stock PyTorch reads. Pure.

Owns: every document's shape, its version, and the refusal of what doesn't fit it.
Must not know: files, object stores, torch, or how bytes are compressed.
"""
