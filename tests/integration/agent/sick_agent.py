"""An agent in the foreground whose disk is slow or fails, or that finds no memory: one seam is replaced.

Usage: sick_agent.py slow SECONDS | fail ERRNO COUNT | hold FILE | poor ... then the agent's own arguments after ``--``.
With ``hold`` the disk hangs as long as the file is there.
"""

from __future__ import annotations

import os
import sys
import time

from ckptstore.agent import arena, disk
from ckptstore.agent.__main__ import main

genuine = disk.write_block


def install(kind: str, *values: str) -> None:
    if kind == "poor":
        arena._room = lambda _pid: 1000
        return
    left = [int(values[1]) if kind == "fail" else 0]

    def write_block(fd: int, block: memoryview, offset: int) -> int:
        if kind == "slow":
            time.sleep(float(values[0]))
        elif kind == "hold":
            while os.path.exists(values[0]):
                time.sleep(0.01)
        elif left[0] > 0:
            left[0] -= 1
            raise OSError(int(values[0]), os.strerror(int(values[0])))
        return genuine(fd, block, offset)

    disk.write_block = write_block


if __name__ == "__main__":
    split = sys.argv.index("--")
    install(*sys.argv[1:split])
    sys.exit(main(sys.argv[split + 1 :]))
