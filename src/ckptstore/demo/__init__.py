"""The story `make demo` tells: train, lose the machine, restore from S3, go on with the same losses.

Owns: a small real GPT, its training script, and the director that kills and restores it.
Must not know: anything a user's own training script could not do.
"""
