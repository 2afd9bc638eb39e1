"""`ckptctl` as a script calls it: in this process where that makes no difference, in one of its own where it does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


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


def clean(**environ: str) -> dict[str, str]:
    """The environment without the settings of whoever runs the tests; as wide as a terminal is."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTSTORE_", "AWS_", "OSS_"))}
    return {**kept, "COLUMNS": "80", **environ}


def run_python(*args: object, cwd: Path | None = None, **environ: str) -> Result:
    """Python with these arguments, in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        env=clean(**environ), cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def ckptctl_process(*args: object, cwd: Path | None = None, **environ: str) -> Result:
    """The command line in a process of its own."""
    return run_python("-m", "ckptstore.cli", *args, cwd=cwd, **environ)


def ckptctl(*args: object, cwd: Path | None = None, **environ: str) -> Result:
    """The command line as a script sees it: nobody is at a terminal. Without a process, which would cost the most."""
    from ckptstore.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as around:
        around.enter_context(_at(cwd))
        around.enter_context(mock.patch.dict(os.environ, clean(**environ), clear=True))
        around.enter_context(mock.patch.object(sys, "stdin", io.StringIO()))
        around.enter_context(contextlib.redirect_stdout(out))
        around.enter_context(contextlib.redirect_stderr(err))
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _at(folder: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder or before)
    try:
        yield
    finally:
        os.chdir(before)


def command(*args: object) -> list[str]:
    """The command line's argv, for a process that a test looks after itself."""
    return [sys.executable, "-m", "ckptstore.cli", *map(str, args)]
