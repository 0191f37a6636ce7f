# SPDX-License-Identifier: Apache-2.0
"""Which kernels run for tensors on a device.

    reference   plain PyTorch, any device; the definition
    numba       compiled for this CPU at first use; the same bytes, some hundred times faster
    triton      compiled for a CUDA device at first use; the same bytes

By default (`auto`) the fast kernels of a tensor's device run, and the reference if they cannot. The
environment variable FOURFOLD_KERNELS overrides `auto`, but not an explicit choice. As a job has
tensors on several devices, the variable decides for each device as far as it applies there:

    FOURFOLD_KERNELS    tensors in CPU memory    tensors on a CUDA device
    reference           reference                reference
    numba               numba                    reference
    triton              numba                    triton

Numba and Triton are imported at first use: they cost a second that most commands need not pay.
Whether weights are moved to a device to be quantized is decided in `execution.backend`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import warnings
from dataclasses import dataclass
from enum import StrEnum

import torch

from fourfold.errors import UsageError

ENVIRONMENT_VARIABLE = "FOURFOLD_KERNELS"

TRITON_NEEDED = (3, 6)
"""The oldest Triton that compiles the kernels (tuples of tensors)."""

CAPABILITY_NEEDED = (7, 5)
"""The oldest NVIDIA GPU (compute capability) that the kernels are compiled for in tests."""


class Kernel(StrEnum):
    """An implementation of the numerics."""

    AUTO = "auto"
    REFERENCE = "reference"
    NUMBA = "numba"
    TRITON = "triton"


@dataclass(frozen=True)
class Choice:
    """The kernels that run, and the reason."""

    kernel: Kernel
    reason: str
    is_fallback: bool = False
    """True if faster kernels exist for the device but cannot run."""

    def __str__(self) -> str:
        return f"{self.kernel} kernels: {self.reason}"


def choose(kernel: Kernel | str, device: torch.device) -> Kernel:
    """Return the kernels for tensors on `device`: REFERENCE, NUMBA or TRITON; see `choice`.

    A warning says, once for each reason, that `auto` falls back on a CUDA device.
    """
    chosen = choice(kernel, device)
    if chosen.is_fallback and device.type == "cuda":
        _warn_once(str(chosen))
    return chosen.kernel


def choice(kernel: Kernel | str, device: torch.device) -> Choice:
    """Return the kernels for tensors on `device`, with the reason.

    Raises:
        UsageError: The name is unknown, or kernels were asked for that cannot run there.
    """
    wanted = _parse(kernel, "kernel")
    if wanted is not Kernel.AUTO:
        return _forced(wanted, device, f"kernel={str(wanted)!r}")
    wanted = _from_environment()
    # Triton's interpreter can run on the CPU, too.
    is_for_another = wanted is not _FAST.get(device.type) and _problem(wanted, device) is not None
    if wanted is Kernel.AUTO or (wanted is Kernel.TRITON and is_for_another):
        return _automatic(device)
    if is_for_another:
        reason = f"{ENVIRONMENT_VARIABLE}={wanted} does not apply to {device}"
        return Choice(Kernel.REFERENCE, reason)
    return _forced(wanted, device, ENVIRONMENT_VARIABLE)


def choice_for_weights(device: torch.device) -> Choice:
    """Return the kernels for weights that lie in CPU memory and may be moved to `device`.

    TRITON means that they should be moved. Otherwise they are quantized where they are: the CPU's
    fast kernels are faster than the reference on the device.
    """
    wanted = _from_environment()
    if wanted is Kernel.TRITON:
        return _forced(wanted, device, ENVIRONMENT_VARIABLE)
    if device.type != "cuda" or wanted is not Kernel.AUTO:
        return choice(Kernel.AUTO, torch.device("cpu"))
    on_device = choice(Kernel.AUTO, device)
    if on_device.kernel is Kernel.TRITON:
        return on_device
    return fallback_to_cpu(on_device.reason)


def fallback_to_cpu(reason: str) -> Choice:
    """Return the kernels for weights that should be moved to a device, but cannot."""
    kernel = choice(Kernel.AUTO, torch.device("cpu")).kernel
    return Choice(kernel, f"on the CPU, since {reason}", is_fallback=True)


@functools.cache
def has_numba() -> bool:
    """True if numba is installed (it is not imported to find out)."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def triton_version() -> str | None:
    """Return the version of Triton; None if it is not installed. It is not imported for this."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


_FAST = {"cpu": Kernel.NUMBA, "cuda": Kernel.TRITON}


def _forced(wanted: Kernel, device: torch.device, origin: str) -> Choice:
    problem = _problem(wanted, device)
    if problem:
        raise UsageError(
            f"{wanted} kernels were asked for by {origin}, but {problem}, or choose 'reference'"
        )
    return Choice(wanted, f"asked for by {origin}")


def _automatic(device: torch.device) -> Choice:
    fast = _FAST.get(device.type)
    if fast is None:
        return Choice(Kernel.REFERENCE, f"there are no others for {device.type} devices")
    problem = _problem(fast, device)
    if problem:
        return Choice(Kernel.REFERENCE, problem, is_fallback=True)
    if fast is Kernel.NUMBA:
        return Choice(fast, "tensors are in CPU memory")
    return Choice(fast, f"tensors are on {device}, {torch.cuda.get_device_name(device)}")


def _problem(kernel: Kernel, device: torch.device) -> str | None:
    """The reason why these kernels cannot run on a device, with a remedy; None if they can."""
    match kernel:
        case Kernel.NUMBA if not has_numba():
            return "numba is not installed: pip install numba"
        case Kernel.NUMBA if device.type != "cpu":
            return f"numba works on CPU tensors, and this one is on {device}: move it to the CPU"
        case Kernel.TRITON:
            return _problem_of_triton(device)
        case _:
            return None


def _problem_of_triton(device: torch.device) -> str | None:
    version = triton_version()
    if version is None:
        return "triton is not installed: pip install triton"
    if tuple(int(part) for part in version.split(".")[:2]) < TRITON_NEEDED:
        needed = ".".join(map(str, TRITON_NEEDED))
        return f"triton {version} is too old: pip install 'triton>={needed}'"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
            return None
        return "triton works on CUDA tensors, and this one is in CPU memory: move it to the GPU"
    if device.type != "cuda":
        return f"triton works on CUDA tensors, and this one is on {device}: move it to a GPU"
    if torch.version.hip is not None:
        return f"they were never run on AMD's GPUs ({torch.cuda.get_device_name(device)}): use CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY_NEEDED:
        has, needed = (".".join(map(str, pair)) for pair in (capability, CAPABILITY_NEEDED))
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {has}, and {needed} is needed: use another GPU"
    return None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"fourfold falls back to slow {text}.", RuntimeWarning, stacklevel=4)


def _from_environment() -> Kernel:
    return _parse(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def _parse(value: Kernel | str, origin: str) -> Kernel:
    try:
        return Kernel(value)
    except ValueError:
        names = " | ".join(Kernel)
        raise UsageError(f"{origin}: unknown kernels {value!r}; choose {names}") from None
