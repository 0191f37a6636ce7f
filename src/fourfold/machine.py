"""What this machine has, and what this process takes of it."""

from __future__ import annotations

import os
import resource
import sys

import psutil


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
    """This process's peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
