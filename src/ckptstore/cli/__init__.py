"""`ckptctl`: one verb a file in `verbs/`, each thin over `ops`.

Owns: options, text and JSON output, exit codes.
Must not know: torch, SDKs, how anything is stored.
"""

from ckptstore.cli.app import main

__all__ = ["main"]
