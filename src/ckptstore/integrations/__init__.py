"""The manager inside other people's training loops: Lightning, transformers, Accelerate.

Owns: translating a library's hooks into the manager's calls. Must not know: what the
manager does not offer its users.
"""
