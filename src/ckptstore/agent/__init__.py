"""The node agent: a torch-free process per node and local root that outlives the trainers.

Owns the shared-memory arenas, the local commit, the uploads, and the words spoken over its socket. Trainers use
:class:`~ckptstore.agent.client.AgentClient`; ``python -m ckptstore.agent`` is the process. Must not know: torch, or how
a state became pieces.
"""
