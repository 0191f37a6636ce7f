# SPDX-License-Identifier: Apache-2.0
"""Execute a plan: read, quantize, write, on as many threads as there are cores.

scheduler  hands jobs to workers, which copy tensors and hand scale groups to a backend; opens,
           syncs and records shards
cpu, gpu   the two backends that quantize scale groups
backend    which of the two it is, and why
streams    a worker's stream and buffers on a GPU, and what happens if memory runs out
stacks     scale groups that a GPU quantizes whole, side by side
buffers    memory that is used again for each job
results    figures of a linear weight, and the single numbers written beside its codes
context    what all workers share
"""

from fourfold.execution.backend import Backend, choose_backend, warm_up, warm_up_device
from fourfold.execution.buffers import Arena
from fourfold.execution.context import ExecutionContext
from fourfold.execution.results import LinearResult
from fourfold.execution.scheduler import Scheduler

__all__ = [
    "Arena",
    "Backend",
    "ExecutionContext",
    "LinearResult",
    "Scheduler",
    "choose_backend",
    "warm_up",
    "warm_up_device",
]
