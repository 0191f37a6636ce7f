# SPDX-License-Identifier: Apache-2.0
"""Memory and CPU checks respect the limits of the container, not only those of the host."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fourfold.distributed.cgroups import Cgroups
from fourfold.distributed.machine import memory_available, threads_available

MB = 1 << 20


def cgroups(tmp_path: Path, membership: str, files: dict[str, object]) -> Cgroups:
    """Cgroups in a tree of files that a test makes up."""
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    (tmp_path / "membership").write_text(membership)
    return Cgroups(root, tmp_path / "membership")


def v1(folder: str, limit: int, usage: int, cached: int) -> dict[str, object]:
    statistics = f"inactive_file 7\ntotal_inactive_file {cached}\ntotal_active_file 0"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": statistics,
    }


CASES = {
    "v2, its own root": (
        "0::/\n",
        {
            "memory.max": 100 * MB,
            "memory.current": 60 * MB,
            "memory.stat": f"anon {30 * MB}\nactive_file {10 * MB}\ninactive_file {20 * MB}",
            "cpu.max": "150000 100000",
        },
        70 * MB,
        1.5,
    ),
    "v2, without limits": (
        "0::/a\n",
        {"a/memory.max": "max", "a/memory.current": 5 * MB, "a/cpu.max": "max 100000"},
        None,
        None,
    ),
    "v2, the limits of parents": (
        "0::/a/b/c\n",
        {
            "a/memory.max": 80 * MB,
            "a/memory.current": 50 * MB,
            "a/b/memory.max": 60 * MB,
            "a/b/memory.current": 10 * MB,
            "a/b/c/memory.max": "max",
            "a/b/c/memory.current": 10 * MB,
            "a/cpu.max": "100000 100000",
            "a/b/cpu.max": "400000 100000",
            "other/memory.max": MB,
            "other/memory.current": MB,
        },
        30 * MB,
        1.0,
    ),
    "v2, a group outside the namespace": (
        "0::/../../slice\n",
        {"memory.max": 40 * MB, "memory.current": 10 * MB},
        30 * MB,
        None,
    ),
    "v2, all in use": ("0::/\n", {"memory.max": MB, "memory.current": 2 * MB}, 0, None),
    "v1": (
        "5:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n",
        {
            **v1("memory/a/b", 100 * MB, 60 * MB, 20 * MB),
            **v1("memory/a", 50 * MB, 30 * MB, 0),
            **v1("memory", 1 << 63, 90 * MB, 0),
            "cpu,cpuacct/a/b/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/a/b/cpu.cfs_period_us": 100000,
            "cpu,cpuacct/a/cpu.cfs_quota_us": 300000,
            "cpu,cpuacct/a/cpu.cfs_period_us": 100000,
        },
        20 * MB,
        3.0,
    ),
    "v1, a container that sees only its own group": (
        "5:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n0::/docker/0123\n",
        {
            **v1("memory", 64 * MB, 16 * MB, 8 * MB),
            "cpu/cpu.cfs_quota_us": 50000,
            "cpu/cpu.cfs_period_us": 100000,
        },
        56 * MB,
        0.5,
    ),
    "no cgroups": ("", {}, None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_limits(case: str, tmp_path: Path) -> None:
    membership, files, memory, cpus = CASES[case]
    groups = cgroups(tmp_path, membership, files)
    assert groups.memory_available() == memory
    assert groups.cpus() == cpus
    assert threads_available(groups) >= 1
    if memory is not None:
        assert memory_available(groups) == min(memory, memory_available(groups))


def test_the_smaller_of_host_and_container_counts(tmp_path: Path) -> None:
    tight = cgroups(
        tmp_path, "0::/\n", {"memory.max": MB, "memory.current": 0, "cpu.max": "1 100000"}
    )
    assert memory_available(tight) == MB
    assert threads_available(tight) == 1
    (tight.root / "memory.max").write_text(str(1 << 62))
    (tight.root / "cpu.max").write_text("100000000 1000")
    assert MB < memory_available(tight) <= psutil.virtual_memory().total
    assert threads_available(tight) == threads_available(Cgroups(tmp_path, tmp_path / "none"))


def test_a_system_without_cgroups(tmp_path: Path) -> None:
    groups = Cgroups(tmp_path / "none", tmp_path / "none" / "membership")
    assert groups.memory_available() is None
    assert groups.cpus() is None
