# SPDX-License-Identifier: Apache-2.0
"""Scale groups that a device quantizes whole, those of one shape side by side.

Algorithms that read second moments work through a weight column by column. Each of these steps is
small, so that a device would idle in between: groups of one shape, such as the experts of a layer,
take each step together. They form a **stack**.

    disk ─read─▶ memory ─copy─▶ device: moments, codes, scales ─copy─▶ memory ─write─▶ shard

**Bytes.** A product may be rounded otherwise if others are computed with it, so which groups form a
stack must not depend on chance: they follow each other in a shard (or in a stage, for layers that
are quantized sequentially) as far as `STACK_BYTES` of the device's memory reach. Only where there
is less memory are stacks smaller.

**Memory.** One stack is computed at a time, whatever the number of workers. If the device has no
room for it after all, it is done again in halves, and what does not fit alone is left to the CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from traceback import clear_frames

from fourfold.algorithms.base import StackableAlgorithm, algorithm_of
from fourfold.execution.context import ExecutionContext
from fourfold.execution.cpu import CPUBackend
from fourfold.execution.results import LinearResult
from fourfold.execution.streams import (
    BufferPool,
    can_stack,
    empty_caches,
    is_out_of_memory,
    stack_bytes,
)
from fourfold.formats.base import FORMATS
from fourfold.planning import Plan, ScaleGroup
from fourfold.storage.shard_file import ShardFile
from fourfold.storage.units import size


def stacks_of(groups: Sequence[ScaleGroup], room: int) -> Iterator[list[ScaleGroup]]:
    """Yield groups that are quantized side by side, in their order.

    Args:
        groups: Groups that can be stacked.
        room: Bytes of the device that a stack may take; a larger group is alone.
    """
    alike = defaultdict(list)
    for group in groups:
        alike[group.scheme, tuple(linear.shape for linear in group.linears)].append(group)
    for same in alike.values():
        count = max(1, room // stack_bytes(same[0]))
        for start in range(0, len(same), count):
            yield same[start : start + count]


class StackBackend:
    """Quantizes scale groups in stacks, and those that do not fit on the CPU."""

    def __init__(self, context: ExecutionContext, pool: BufferPool, cpu: CPUBackend) -> None:
        self.context, self.pool, self.cpu = context, pool, cpu

    def can_stack(self, group: ScaleGroup) -> bool:
        """True if a group can be part of a stack."""
        plan = self.context.plan
        return isinstance(plan, Plan) and can_stack(plan, group)

    def run(self, file: ShardFile, groups: Sequence[ScaleGroup]) -> list[LinearResult]:
        """Quantize some groups; those that cannot be stacked on the CPU."""
        results: list[LinearResult] = []
        on_cpu = [group for group in groups if not self.can_stack(group)]
        with self.pool.stacking:
            stackable = [group for group in groups if self.can_stack(group)]
            waiting = [*stacks_of(stackable, self.pool.stack_room)]
            while waiting:
                stack = waiting.pop(0)
                needed, most = stack_bytes(stack[0]), self.pool.most_for_group
                done = self._try(file, stack) if needed <= most else None
                if done is not None:
                    results += done
                elif len(stack) > 1 and needed <= most:
                    self.pool.halve_stacks(len(stack) * needed)
                    left = [group for of_stack in (stack, *waiting) for group in of_stack]
                    waiting = [*stacks_of(left, self.pool.stack_room)]
                else:
                    few = f"{size(most)} of its memory are too little, {size(needed)} are needed"
                    why = "out of memory" if needed <= most else few
                    self.pool.leave_to_cpu(stack[0].name, why, is_same=False)
                    on_cpu += stack
        return results + self.cpu.run(file, on_cpu)

    def _try(self, file: ShardFile, stack: Sequence[ScaleGroup]) -> list[LinearResult] | None:
        """Do a stack; None if memory ran out, and everything that it took was freed."""
        scheme, device = stack[0].scheme, self.pool.device
        algorithm = algorithm_of(scheme)
        assert isinstance(algorithm, StackableAlgorithm)
        try:
            return self.cpu.quantize_together(
                file,
                stack,
                lambda weights: algorithm.quantize_stack(weights, FORMATS[scheme.weights], device),
            )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            clear_frames(error.__traceback__)  # they hold the stack's tensors
        empty_caches(device)
        return None
