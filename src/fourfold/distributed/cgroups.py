# SPDX-License-Identifier: Apache-2.0
"""Memory and CPU limits of the control groups (cgroups) that this process runs in.

A container, a Slurm job or a systemd unit is limited by cgroups: the kernel kills what exceeds the
memory limit, and throttles what exceeds the CPU quota, however much the machine has. A limit of a
group holds for all groups below it, so every group from the process's own up to the root counts.

    /proc/self/cgroup          v2: 0::/a/b                        v1: 4:memory:/a/b
    memory                     memory.max, memory.current         memory.limit_in_bytes, …
    CPU                        cpu.max ("200000 100000")          cpu.cfs_quota_us, …

Where a version 1 container sees only its own part of the tree, its path does not exist below the
mount; the mount's root is then its own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECLAIMABLE_V2 = ("active_file", "inactive_file", "slab_reclaimable")
RECLAIMABLE_V1 = ("total_active_file", "total_inactive_file")
MEMORY = (
    ("", "memory.max", "memory.current", RECLAIMABLE_V2),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", RECLAIMABLE_V1),
)
"""Controller, files of limit and usage, and the words of `memory.stat` that count as available."""


@dataclass(frozen=True)
class Cgroups:
    """The control groups of this process.

    Attributes:
        root: The folder in which cgroups are mounted.
        membership: The file that names the process's groups.
    """

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def memory_available(self) -> int | None:
        """Return the bytes that every group leaves to this process; None without a limit.

        Page cache counts as available: the kernel reclaims it before it kills a process.
        """
        rooms = []
        for controller, limit_file, usage_file, reclaimable in MEMORY:
            for folder in self._folders(controller):
                limit, usage = _numbers(folder / limit_file), _numbers(folder / usage_file)
                if limit and usage:
                    statistics = map(str.split, _text(folder / "memory.stat").splitlines())
                    cached = sum(int(count) for name, count in statistics if name in reclaimable)
                    rooms.append(limit[0] - max(0, usage[0] - cached))
        return max(0, min(rooms)) if rooms else None

    def cpus(self) -> float | None:
        """Return the smallest CPU quota, in cores; None without one."""
        quotas = [_numbers(folder / "cpu.max") for folder in self._folders("")]
        for folder in self._folders("cpu"):
            quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
            quotas.append([*_numbers(quota), *_numbers(period)])
        limits = [pair[0] / pair[1] for pair in quotas if len(pair) == 2 and min(pair) > 0]
        return min(limits, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Folders from the process's group up to the root; controller "" is version 2."""
        for line in _text(self.membership).splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                mount = self._mount(controllers)
                group = mount / path.strip("/")
                yield from (folder for folder in (group, *group.parents) if mount in folder.parents)
                yield mount

    def _mount(self, controllers: str) -> Path:
        """The folder in which a hierarchy is mounted."""
        if not controllers:
            unified = self.root / "unified"  # beside version 1
            return unified if unified.is_dir() else self.root
        names = [controllers, *controllers.split(",")]
        return next((self.root / name for name in names if (self.root / name).is_dir()), self.root)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # no such group, controller or system
        return ""


def _numbers(file: Path) -> list[int]:
    """The integers in a file; words such as "max" are left out."""
    return [int(word) for word in _text(file).split() if word.lstrip("-").isdecimal()]
