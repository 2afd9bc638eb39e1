"""Puts the C kernels into the wheel where there is a C compiler; without one the package is pure Python."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/ckptstore/native")


class KernelHook(BuildHookInterface):
    """Called by the build backend, for wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and if that worked say what the wheel then runs on."""
        if self.target_name != "wheel":
            return
        build = runpy.run_path(str(Path(self.root) / NATIVE / "build.py"))
        if problem := build["compile_kernels"]():
            self.app.display_warning(f"ckptstore is built without its C kernels, which make it faster: {problem}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"  # plain C behind ctypes: any Python
        build_data["artifacts"].append(f"/{NATIVE / 'kernels.so'}")
