"""What `ckptctl` does, one verb a module, as plain functions over the tiers.

Owns: the verbs' work and their results as values.
Must not know: torch, terminals, text layout.
"""
