"""Which kernels do the work: the one place that decides.

    reference   plain PyTorch, any device; the definition
    numba       compiled for this CPU at first use; the same bytes, some hundred times faster

`auto` takes numba for tensors in CPU memory where the package is installed, else the reference.
The environment variable FOURFOLD_KERNELS (reference | numba) overrides `auto`, not an explicit
choice. Numba is imported at first use: it costs a second that most commands need not pay.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from enum import StrEnum

import torch

from fourfold.errors import UsageError

ENVIRONMENT_VARIABLE = "FOURFOLD_KERNELS"


class Kernel(StrEnum):
    """An implementation of the numerics."""

    AUTO = "auto"
    REFERENCE = "reference"
    NUMBA = "numba"


def choose(kernel: Kernel | str, device: torch.device) -> Kernel:
    """REFERENCE or NUMBA for tensors on `device`.

    Raises UsageError for an unknown name, and for numba where it cannot run.
    """
    wanted = _parse(kernel, "kernel")
    if wanted is Kernel.AUTO:
        wanted = _parse(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
    if wanted is Kernel.AUTO:
        fits = device.type == "cpu" and has_numba()
        return Kernel.NUMBA if fits else Kernel.REFERENCE
    if wanted is Kernel.NUMBA and not has_numba():
        raise UsageError(
            "numba kernels were asked for, but numba is not installed: "
            "pip install numba, or choose 'reference'"
        )
    if wanted is Kernel.NUMBA and device.type != "cpu":
        raise UsageError(
            f"numba kernels work on CPU tensors, and this one is on {device}: "
            "move it to the CPU, or choose 'reference'"
        )
    return wanted


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed (it is not imported to find out)."""
    return importlib.util.find_spec("numba") is not None


def _parse(value: Kernel | str, origin: str) -> Kernel:
    try:
        return Kernel(value)
    except ValueError:
        names = " | ".join(Kernel)
        raise UsageError(f"{origin}: unknown kernels {value!r}; choose {names}") from None
