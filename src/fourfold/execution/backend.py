"""Where weights are quantized: in lanes of a device, or on the CPU; and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fourfold.errors import UsageError
from fourfold.execution.streams import Lanes, is_out_of_memory, lanes_of
from fourfold.formats import dispatch, nvfp4
from fourfold.formats.dispatch import Choice, Kernel
from fourfold.planning import Plan
from fourfold.storage.units import size


@dataclass(frozen=True)
class Kernels:
    """What quantizes weights, where, and why. Prints as the command prints it."""

    choice: Choice
    threads: int
    lanes: Lanes | None = None
    """None where the CPU quantizes."""

    @classmethod
    def none(cls, threads: int) -> Kernels:
        """For a job that quantizes nothing."""
        return cls(Choice(Kernel.REFERENCE, "nothing is quantized"), threads)

    @property
    def is_fallback(self) -> bool:
        """Whether there is a faster way on this device, which cannot be gone."""
        return self.choice.is_fallback

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the host's memory beside what workers take on the CPU."""
        return 0 if self.lanes is None else self.lanes.pinned_bytes

    def memory(self, plan: Plan) -> int:
        """An estimate in bytes of what the job takes of the host's memory, as `Plan.memory`."""
        workers = None if self.lanes is None else self.lanes.count
        return plan.memory(self.threads, workers) + self.pinned_bytes

    def without_lanes(self, error: Exception) -> Kernels:
        """The CPU's kernels, since those of the device failed when they were tried."""
        assert self.lanes is not None
        return _on_cpu(self.choice, self.lanes.device, self.threads, error)

    @property
    def where(self) -> str:
        """On what, and how much at a time."""
        if self.lanes is None:
            return f"weights are quantized on the CPU, by {self.threads} threads"
        return (
            f"weights are quantized on {self.lanes.device}, {self.lanes.count} batches at a time "
            f"of up to {size(self.lanes.room)}: {size(self.lanes.nbytes)} there, and "
            f"{size(self.pinned_bytes)} of pinned memory"
        )

    def __str__(self) -> str:
        return f"{self.choice}\n{self.where}"


def choose_kernels(
    device: str,
    plan: Plan,
    threads: int,
    *,
    memory: int | None = None,
    ranks: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Kernels:
    """The kernels for a plan's weights on `device`, which has been chosen.

    memory: bytes of the device that quantization may take; by default a share of what is free.
    ranks: how many processes share this machine. say: hears what should not go unnoticed later.

    Raises `UsageError` for `memory` where none of a device's is taken.
    """
    target = _numbered(device)
    choice = dispatch.choice_for_weights(target)
    if uses_lanes(choice):
        try:
            lanes = lanes_of(target, memory, threads, ranks, say)
        except RuntimeError as error:  # no room for as much as a context, or another's device
            return _on_cpu(choice, target, threads, error)
        lanes.fit(plan)
        return Kernels(choice, threads, lanes)
    if memory is not None and not choice.is_fallback:
        raise UsageError(
            f"--device-memory says nothing for {choice}: no memory of {target} is taken. "
            "Leave it out, or give another --device."
        )
    return Kernels(choice, threads)


def _on_cpu(wanted: Choice, device: torch.device, threads: int, error: Exception) -> Kernels:
    why = f"{wanted.kernel} kernels cannot run on {device}: {error}"
    kernel = dispatch.choice(Kernel.AUTO, torch.device("cpu")).kernel
    choice = Choice(kernel, f"on the CPU, since {' '.join(why.split())}", is_fallback=True)
    return Kernels(choice, threads)


def warm_up_lanes(device: str, dtypes: Iterable[torch.dtype], scale: str) -> None:
    """Compile and try what lanes of `device` will run, if there are to be any.

    Raises whatever shows that it cannot run: no compiler that Triton needs, a driver too old.
    """
    target = _numbered(device)
    if not uses_lanes(dispatch.choice_for_weights(target)):
        return
    for dtype in dtypes:
        try:
            nvfp4.warm_up(dtype, scale, device=target)
        except RuntimeError as error:
            if not is_out_of_memory(error):  # which lanes know how to deal with
                raise


def _numbered(device: str) -> torch.device:
    """A device of PyTorch's; of CUDA's, which one."""
    target = torch.device(device)
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def uses_lanes(choice: Choice) -> bool:
    """Whether these kernels are worth the way to a device."""
    return choice.kernel is Kernel.TRITON
