# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: a GPU or the CPU quantizes the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from fourfold.algorithms.base import RowwiseAlgorithm, algorithm_of
from fourfold.errors import UsageError
from fourfold.execution import streams
from fourfold.execution.streams import STACK_PART_OF_HOST, BufferPool, is_out_of_memory
from fourfold.formats import dispatch
from fourfold.formats.base import FORMATS, WeightFormat
from fourfold.formats.dispatch import Choice, Kernel
from fourfold.formats.scheme import Scheme
from fourfold.planning import CopyPlan, Plan
from fourfold.storage.units import size


@dataclass(frozen=True)
class Backend:
    """The backend that quantizes the weights: its device and kernels, and the reason."""

    choice: Choice
    threads: int
    pool: BufferPool | None = None
    """The buffers on the GPU that quantizes; None if the CPU does."""

    @classmethod
    def none(cls, threads: int) -> Backend:
        """Return the backend of a job that quantizes nothing."""
        return cls(Choice(Kernel.REFERENCE, "nothing is quantized"), threads)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the host's memory besides those that workers take on the CPU."""
        return 0 if self.pool is None else self.pool.pinned_bytes

    def memory(self, plan: CopyPlan) -> int:
        """Return an estimate of the host's memory that the job takes, in bytes."""
        if self.pool is None:
            return plan.memory(self.threads)
        of_stack = self.pool.stack_room // STACK_PART_OF_HOST
        return plan.memory(self.threads, self.pool.count) + self.pinned_bytes + of_stack

    def on_cpu(self, error: Exception) -> Backend:
        """Return the CPU as the backend, because the device's kernels failed at the trial."""
        assert self.pool is not None
        return _on_cpu(self.choice, self.pool.device, self.threads, error)

    @property
    def where(self) -> str:
        """The device, and how much it quantizes at a time."""
        if self.pool is None:
            return f"weights are quantized on the CPU, by {self.threads} threads"
        text = (
            f"weights are quantized on {self.pool.device}, {self.pool.count} batches at a time "
            f"of up to {size(self.pool.room)}: {size(self.pool.nbytes)} there, and "
            f"{size(self.pinned_bytes)} of pinned memory"
        )
        if self.pool.stack_room:
            stacks = f"in stacks of up to {size(self.pool.stack_room)}"
            text += f"; where second moments of the inputs decide, {stacks}"
        return text


def choose_backend(
    device: str,
    plan: Plan,
    threads: int,
    *,
    memory: int | None = None,
    ranks: int = 1,
    warn: Callable[[str], None] = lambda _: None,
) -> Backend:
    """Choose the backend for a plan's weights.

    Args:
        device: The device that was chosen for the job, with its number.
        plan: The plan.
        threads: The number of threads that compute on the CPU.
        memory: Bytes of the device that quantization may take; by default half of what is free,
            divided by `ranks`. The other half is left to the model's run, and to other processes.
        ranks: The number of processes that share this machine.
        warn: Called with each warning while the plan is executed, once.

    Raises:
        UsageError: `memory` was given, and nothing runs on a device.
    """
    target = torch.device(device)
    choice = dispatch.choice_for_weights(target)
    if uses_device(choice):
        try:
            free = streams.free_bytes(target)
        except RuntimeError as error:  # no room for a context, or another process's device
            return _on_cpu(choice, target, threads, error)
        memory = free // 2 // ranks if memory is None else memory
        pool = BufferPool(target, memory, threads + plan.limits.waiting, warn)
        pool.fit(plan)
        return Backend(choice, threads, pool)
    if memory is not None and not choice.is_fallback:
        raise UsageError(
            f"`device_memory` has no effect with {choice}: no memory of {target} is taken. "
            "Remove it, or give another `device`."
        )
    return Backend(choice, threads)


def _on_cpu(wanted: Choice, device: torch.device, threads: int, error: Exception) -> Backend:
    why = f"{wanted.kernel} kernels cannot run on {device}: {error}"
    return Backend(dispatch.fallback_to_cpu(" ".join(why.split())), threads)


def warm_up(schemes: Iterable[Scheme], dtypes: Iterable[torch.dtype]) -> None:
    """Compile what the CPU runs for weights of these schemes and dtypes."""
    for fmt, scale, dtype in _choices(schemes, dtypes):
        fmt.warm_up(dtype, scale)


def warm_up_device(device: str, schemes: Iterable[Scheme], dtypes: Iterable[torch.dtype]) -> None:
    """Compile and try what `device` runs for these schemes and dtypes, if it quantizes at all.

    Raises:
        Exception: Whatever shows that it cannot: no compiler for Triton, a driver too old.
    """
    target = torch.device(device)
    if not uses_device(dispatch.choice_for_weights(target)):
        return
    for fmt, scale, dtype in _choices(schemes, dtypes):
        try:
            if fmt.has_batches:
                fmt.warm_up(dtype, scale, target)
        except RuntimeError as error:
            if not is_out_of_memory(error):  # which smaller buffers may mend
                raise


def _choices(
    schemes: Iterable[Scheme], dtypes: Iterable[torch.dtype]
) -> Iterator[tuple[WeightFormat, str, torch.dtype]]:
    """The formats whose kernels will run, each with a way to choose scales and a dtype."""
    algorithms = dict.fromkeys((scheme.weights, algorithm_of(scheme)) for scheme in schemes)
    for (fmt, algorithm), dtype in product(algorithms, dtypes):
        if isinstance(algorithm, RowwiseAlgorithm):
            yield FORMATS[fmt], algorithm.scale, dtype


def uses_device(choice: Choice) -> bool:
    """True if these kernels are worth the copies to a device and back."""
    return choice.kernel is Kernel.TRITON
