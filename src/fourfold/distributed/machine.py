"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil

from fourfold.distributed.launcher import launch
from fourfold.errors import UsageError


def threads_available() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_available() -> int:
    """Bytes of memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def resident() -> int:
    """This process's resident memory in bytes, now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident() -> int:
    """This process's peak resident memory in bytes.

    Linux's own high-water mark where there is one: `getrusage` counts the parent's memory at the
    time of the fork, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def choose_device(device: str) -> str:
    """A device of PyTorch's; `auto` is a CUDA device, or the CPU.

    Among several ranks of a machine, each has a CUDA device of its own, as far as there are any.

    Raises `UsageError` for a device that this machine lacks.
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
        raise UsageError(f"device {device!r}: this machine has {count} such. Give cpu or auto.")
    return device


def give_back_memory() -> None:
    """Return what was freed to the system. The C library keeps it otherwise, in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def cache_few_kernels() -> None:
    """Let oneDNN keep few compiled kernels, unless the user has said how many.

    It keeps 1024 by default, one for each count of tokens that an expert ever saw: half a GB, and
    the next count is another one. It reads this when it is first used.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
