"""What may still be taken, wherever the limit is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptstore.agent.memory import HEADROOM_BYTES, available_memory


def _system(root: Path, membership: str, files: dict[str, str]) -> Path:
    """What /proc and /sys say on a machine with 1 GiB to be had."""
    everything = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1048576 kB\n", "proc/self/cgroup": membership, **files}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _limited(
    directory: str, version: int, limit: str, used: int, reclaimable: int, high: str = "max"
) -> dict[str, str]:
    limit_file, used_file, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")
    }[version]  # fmt: skip
    texts = {limit_file: limit, used_file: str(used), "memory.stat": f"cache 5\n{prefix}inactive_file {reclaimable}"}
    if version == 2:
        texts["memory.high"] = high
    return {f"sys/fs/cgroup/{directory}/{name}": f"{text}\n" for name, text in texts.items()}


MIB = 1 << 20
NO_LIMIT = f"{(1 << 63) - 4096}"  # as the older kernels write it
HYBRID = "5:cpu,cpuacct:/\n4:memory:/a/b\n1:name=systemd:/a\n0::/a/b\n"


@pytest.mark.parametrize(
    ("membership", "files", "mib"),
    [
        ("", {}, 1024),
        ("0::/a/b\n", {}, 1024),
        ("0::/a/b\n", _limited("a/b", 2, "max", 900 * MIB, 0), 1024),
        ("0::/a/b\n", _limited("a/b", 2, f"{500 * MIB}", 300 * MIB, 100 * MIB), 300),
        ("0::/a/b\n", _limited("a/b", 2, "max", 9, 0) | _limited("a", 2, f"{400 * MIB}", 300 * MIB, 0), 100),
        ("0::/a/b\n", _limited("", 2, f"{700 * MIB}", 0, 0), 700),
        ("0::/a\n", _limited("a", 2, "max", 300 * MIB, 0, high=f"{500 * MIB}"), 200),
        ("0::/a\n", _limited("a", 2, f"{400 * MIB}", 300 * MIB, 0, high=f"{500 * MIB}"), 100),
        (HYBRID, _limited("memory/a/b", 1, f"{500 * MIB}", 300 * MIB, 100 * MIB), 300),
        (HYBRID, _limited("memory/a/b", 1, NO_LIMIT, 0, 0) | _limited("memory/a", 1, f"{9 * MIB}", 0, 0), 9),
        ("4:memory:/docker/x\n", _limited("memory", 1, f"{600 * MIB}", 0, 0), 600),
        (HYBRID, _limited("memory/a/b", 1, f"{9000 * MIB}", 0, 0), 1024),
    ],
    ids=[
        "none", "unreadable", "no limit", "v2", "above", "container", "high", "below high",
        "v1", "v1 above", "v1 container", "machine",
    ],
)  # fmt: skip
def test_the_tightest_cgroup_decides(membership: str, files: dict[str, str], mib: int, tmp_path: Path) -> None:
    assert available_memory(_system(tmp_path, membership, files)) == mib * MIB - HEADROOM_BYTES


def test_the_cgroup_of_whoever_is_to_have_it_counts(tmp_path: Path) -> None:
    system = _system(tmp_path, "0::/service\n", _limited("job", 2, f"{400 * MIB}", 300 * MIB, 0))
    (system / "proc/7").mkdir()
    (system / "proc/7/cgroup").write_text("0::/job\n")
    assert available_memory(system, pid=7) == 100 * MIB - HEADROOM_BYTES
    assert available_memory(system) == available_memory(system, pid=8) == 1024 * MIB - HEADROOM_BYTES
