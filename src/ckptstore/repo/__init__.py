"""Where saves live: the local tier, remote tiers, the order among saves, and the commit protocols.

Owns names on disk and in the bucket, what makes a save complete, and which save is newest. Knows nothing of torch,
of processes, or of how bytes were staged; it never deletes a name it did not write.
"""
