"""Compiling the kernels beside their source: when the package is built, or by ``python -m ckptstore.native.build``.

Imports nothing of the package: the build backend runs this file before the package is installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY = SOURCE.with_suffix(".so")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra")
#: A compiler that can't make a function for several instruction sets makes the plain one.
VARIANTS: tuple[tuple[str, ...], ...] = ((), ("-DPLAIN",))


def compile_kernels(library: Path = LIBRARY) -> str | None:
    """Compile with ``$CC``, or ``cc``. Returns None, or why that failed; then no older library is left either."""
    problem = _compile(library)
    if problem is not None:
        library.unlink(missing_ok=True)
    return problem


def _compile(library: Path) -> str | None:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler ({compiler[0]})"
    problem = ""
    built = library.with_name(f"{library.name}.{os.getpid()}")
    for variant in VARIANTS:
        command = [*compiler, *FLAGS, *variant, "-o", str(built), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            built.replace(library)  # a process that has the old one mapped keeps it
            return None
        problem = problem or result.stderr.strip()
    built.unlink(missing_ok=True)
    return problem or f"{compiler[0]} failed"


if __name__ == "__main__":
    raise SystemExit(compile_kernels())
