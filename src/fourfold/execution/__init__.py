"""Carry out a plan: read, quantize, write, on as many threads as there are cores.

folding    jobs are handed to workers, shards are opened, filled, synced and noted
host       what a worker does with a job on the CPU
device     the same for scale groups on a GPU, many of them in one go
lanes      what a worker has of a GPU: a stream, buffers; and what to do when memory runs out
choosing   which of both it is, and why
results    the figures of a linear weight, and the scalars that are written beside it
arena      memory that is used again
"""

from fourfold.execution.backend import Kernels, choose_kernels, warm_up_lanes
from fourfold.execution.buffers import Arena
from fourfold.execution.results import LinearResult
from fourfold.execution.scheduler import LOOKAHEAD, UNSYNCED, Folding, folding

__all__ = [
    "LOOKAHEAD",
    "UNSYNCED",
    "Arena",
    "Folding",
    "Kernels",
    "LinearResult",
    "choose_kernels",
    "folding",
    "warm_up_lanes",
]
