"""Builds the C kernels into the wheel where there is a C compiler; without one the package is pure Python."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/ckptstore/native/kernels.c")
LIBRARY = SOURCE.with_suffix(".so")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra")
#: Compilers that can't make a function for several instruction sets get the plain ones.
VARIANTS: tuple[tuple[str, ...], ...] = ((), ("-DPLAIN",))


def compile_kernels(root: Path) -> str | None:
    """Compile ``kernels.c`` beside itself. Returns None, or why that failed."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler ({compiler[0]})"
    problem = ""
    built = (root / LIBRARY).with_suffix(".so.new")
    for variant in VARIANTS:
        command = [*compiler, *FLAGS, *variant, "-o", str(built), str(root / SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            built.replace(root / LIBRARY)  # a process that has the old one mapped keeps it
            return None
        problem = problem or result.stderr.strip()
    return problem


class KernelHook(BuildHookInterface):
    """Called by the build backend, for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and if that worked say what the wheel then runs on."""
        if self.target_name != "wheel":
            return
        if problem := compile_kernels(Path(self.root)):
            self.app.display_warning(f"ckptstore is built without its C kernels, which make it faster: {problem}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"  # plain C behind ctypes: any Python
        build_data["artifacts"].append(f"/{LIBRARY}")


if __name__ == "__main__":
    raise SystemExit(compile_kernels(Path(__file__).parent))
