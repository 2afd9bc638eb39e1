"""`ckptctl` in a process of its own, as a script calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass
class Result:
    """How it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        document = json.loads(self.out)
        assert document["schema_version"] == 1
        return document

    @property
    def error(self) -> Any:
        return json.loads(self.err.splitlines()[-1])


def run_python(*args: object, **environ: str) -> Result:
    """Python with these arguments, without the settings of whoever runs the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTSTORE_", "AWS_"))}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, env={**clean, **environ}, capture_output=True, text=True, timeout=120, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def ckptctl(*args: object, **environ: str) -> Result:
    """The command line with these arguments."""
    return run_python("-m", "ckptstore.cli", *args, **environ)
