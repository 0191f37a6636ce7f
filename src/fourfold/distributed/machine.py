# SPDX-License-Identifier: Apache-2.0
"""The memory, cores and devices that this process may use, and the memory that it uses."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from pathlib import Path

import psutil

from fourfold.distributed.cgroups import Cgroups
from fourfold.distributed.launcher import launch
from fourfold.errors import UsageError


def threads_available(cgroups: Cgroups | None = None) -> int:
    """Return the number of cores that this process may use.

    Args:
        cgroups: Where CPU quotas are looked up; the system's by default. A quota of 1.5 cores
            counts as 2.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = (cgroups or Cgroups()).cpus()
    return cores if quota is None else min(cores, math.ceil(quota))


def memory_available(cgroups: Cgroups | None = None) -> int:
    """Return the bytes of memory that this process can take without swapping or being killed.

    Args:
        cgroups: Where memory limits are looked up; the system's by default.
    """
    available = int(psutil.virtual_memory().available)
    limit = (cgroups or Cgroups()).memory_available()
    return available if limit is None else min(available, limit)


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """Return this process's peak resident memory in bytes.

    On Linux this is the kernel's own high-water mark: `getrusage` also counts the parent's memory
    at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def choose_device(device: str) -> str:
    """Return the name of a PyTorch device, with its number.

    Each rank of a machine gets a CUDA device of its own, as far as there are enough.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, or `auto`: a CUDA device if there is one, else the CPU.

    Raises:
        UsageError: This machine has no such device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    launched = launch()
    if device == "cuda" and launched.size > 1 and torch.cuda.device_count():
        device = f"cuda:{launched.local_rank % torch.cuda.device_count()}"
    if device == "cuda" and torch.cuda.device_count():
        device = f"cuda:{torch.cuda.current_device()}"  # other threads may have another one
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(f"device {device!r}: give cpu, cuda, cuda:N or auto.")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(number or 0) >= count:
        raise UsageError(
            f"device {device!r}: this machine has {count} of that kind. Give cpu or auto."
        )
    return device


def give_back_memory() -> None:
    """Return freed memory to the system; otherwise the C library keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def cache_few_kernels() -> None:
    """Limit the kernels that oneDNN keeps compiled, unless the user has set a limit.

    Its default is 1024, one for each number of tokens that an expert has seen: half a GB that is
    rarely reused. oneDNN reads the variable when it is first used.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
