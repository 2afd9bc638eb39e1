"""Several nodes, one local root: found out by looking, and refused.

Each agent writes, renames and sweeps in its root as if it were alone there. Two of them in one directory, as on NFS or
Lustre, would take each other's half-written saves for leftovers. So nobody assumes where a root lies: each node leaves
a mark in its own, and looks whether it sees another's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ckptstore.clock import new_nonce
from ckptstore.dcp.agreement import Agreement
from ckptstore.errors import CkptError, ConfigError


def refuse_shared_root(root: Path, node: int, *, is_leader: bool, agreement: Agreement) -> None:
    """Collective, between several nodes. Make sure that each has a root of its own.

    Args:
        root: This rank's local root; it exists.
        node: Number of this rank's node.
        is_leader: Whether this rank speaks for its node.
        agreement: All ranks.

    Raises:
        ConfigError: two nodes see the same directory; on all ranks.
    """
    mark = root / f".node-{node}-{new_nonce()}"
    is_marked = False
    if is_leader:
        with suppress(OSError):  # whoever can't write there is told so by the first save
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            is_marked = True
    try:
        marks = agreement.gather((node, mark.name) if is_marked else None, what="looking for shared local roots")
        error: CkptError | None = None
        if is_leader:
            seen = [other for other, name in filter(None, marks) if other != node and (root / name).exists()]
            if seen:
                error = ConfigError(
                    f"nodes {', '.join(map(str, sorted({node, *seen})))} share the local root {root}",
                    hint=f"give each node one of its own, on a local disk or as {root}/<node>; a remote joins them",
                )
        agreement.together(error, what="looking for shared local roots")
    finally:
        if is_marked:
            with suppress(OSError):
                mark.unlink()
