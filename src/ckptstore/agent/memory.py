"""How much memory a process here has, and may still take: the machine's, and what its control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Left to everybody else.
HEADROOM_BYTES = 64 << 20

_Files = tuple[tuple[str, ...], str, str, str]

#: Files of a memory cgroup: limits, use, statistics, and what of these can be had back. Over v2's lower limit nobody is
#: killed, but held up until nothing goes on. Source: the kernel's admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst
_V2: _Files = (("memory.max", "memory.high"), "memory.current", "memory.stat", "inactive_file")
_V1: _Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def available_memory(system: Path = Path("/"), *, pid: int | None = None) -> int:
    """Bytes that can be had without pushing somebody out: the least of the system's and every cgroup's above us.

    Args:
        system: where /proc and /sys are.
        pid: whoever is to have them; None: we.
    """
    free = [_meminfo_available(system)]
    for directory, (limits, used, statistics, reclaimable) in _cgroups(system, "self" if pid is None else str(pid)):
        with suppress(OSError, ValueError):
            texts = [(directory / limit).read_text().strip() for limit in limits]
            if numbers := [int(text) for text in texts if text != "max"]:
                lines = dict(line.split() for line in (directory / statistics).read_text().splitlines())
                free.append(min(numbers) - int((directory / used).read_text()) + int(lines.get(reclaimable, 0)))
    return min(free) - HEADROOM_BYTES


def _meminfo_available(system: Path) -> int:
    for line in (system / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroups(system: Path, process: str) -> Iterator[tuple[Path, _Files]]:
    """A process' memory cgroups, innermost first, and their files' names. In a container what is above isn't there."""
    with suppress(OSError, ValueError):
        for line in (system / "proc" / process / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mount, files = system / "sys/fs/cgroup", _V2
            if "memory" in controllers.split(","):
                mount, files = mount / "memory", _V1
            elif controllers:
                continue
            within = mount / path.lstrip("/")
            for directory in (within, *within.parents):
                if not directory.is_relative_to(mount):
                    break
                yield directory, files


def own_memory() -> dict[str, int]:
    """What this process has in memory: of its own, of files, and of the arenas it has mapped."""
    fields = {"RssAnon": "own", "RssFile": "files", "RssShmem": "arenas"}
    result = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in fields:
                result[fields[name]] = int(rest.split()[0]) * 1024
    return result
