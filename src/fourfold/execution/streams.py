# SPDX-License-Identifier: Apache-2.0
"""The buffers that workers have on a GPU: one set each, all of the same size.

    room      bytes of a set's device buffer, and of its pinned buffer: a batch is what fits
    sets      one for each worker: reading, copies, kernels and writing overlap

**Sizes.** Copies over PCIe reach their full rate at some MB, and a batch costs two waits and a few
launches, about 0.1 ms, against 4 ms for 100 MB at 25 GB/s: a larger room gains nothing, a smaller
one loses little. 128 MiB hold the largest routed experts that are usual (gate, up and down of
DeepSeek V3: 113 MB with their codes). Eight workers read and write at a time: more of them would
wait for Python's lock. That is 1 GiB on the device, and 1 GiB of pinned memory.

**Out of memory** (another process on the device, a limit of pinned memory): the room is halved for
all workers, down to a sixteenth, and the batch is done again in smaller ones.

**Stacks** (`stacks`) are no part of these buffers: one is computed at a time, in memory that
PyTorch allocates.

On a CPU all of it works as well, in ordinary memory and without streams: so tests run it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fourfold.algorithms.base import RowwiseAlgorithm, StackableAlgorithm, algorithm_of
from fourfold.execution.buffers import ALIGNMENT, Arena, on_host
from fourfold.execution.cpu import slab_bytes
from fourfold.formats.base import FORMATS, WeightFormat
from fourfold.models.regions import Region
from fourfold.planning import Plan, ScaleGroup
from fourfold.storage.safetensors_header import BITS, TensorInfo, nbytes_of
from fourfold.storage.units import size

ROOM = 1 << 27
MOST_SETS, FEWEST_SETS = 8, 2
MAY_DIFFER = "Codes that rounding decides may differ from those of another run."
HALVINGS = 4
"""The room is halved this many times before groups that do not fit are left to the CPU."""

STACK_BYTES = 1 << 33
"""Bytes of a device that a stack of scale groups takes at most: dozens of experts, or a few of the
largest. Each step takes some 10 µs to launch, which a stack shares out."""

STACK_PART_OF_HOST = 8
"""The host takes at most this part of a stack: up to 4.6 bytes for each weight and its codes, where
the device takes 40 and more."""

OVERHEAD = 8 * ALIGNMENT
"""Bytes for each linear weight, at most, for alignment, its scale and its figures."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that some scale groups take of a set of buffers."""

    host: int = 0
    device: int = 0
    scratch: int = 0
    """On the device, for one slab at a time whose weights are not contiguous in it."""
    stack: int = 0
    """On the device, for groups that are quantized in stacks."""

    def __add__(self, other: Need) -> Need:
        return Need(
            self.host + other.host,
            self.device + other.device,
            max(self.scratch, other.scratch),
            self.stack + other.stack,
        )

    @property
    def room(self) -> int:
        return max(self.host, self.device + self.scratch)


def can_batch(group: ScaleGroup) -> bool:
    """True if a scale group can be quantized on a GPU, together with others."""
    is_rowwise = isinstance(algorithm_of(group.scheme), RowwiseAlgorithm)
    return is_rowwise and FORMATS[group.scheme.weights].has_batches


def can_stack(plan: Plan, group: ScaleGroup) -> bool:
    """True if a scale group can be quantized on a GPU whole, side by side with others of its shape.

    Its weights must read the same inputs, which those of all experts of a layer do not.
    """
    inputs = {
        (plan.site_of(linear, name), linear.expert)
        for linear in group.linears
        for name in plan.algorithm_needs(linear)
    }
    return isinstance(algorithm_of(group.scheme), StackableAlgorithm) and len(inputs) == 1


def stack_bytes(group: ScaleGroup) -> int:
    """Return the bytes of the device that a scale group takes in a stack."""
    algorithm = algorithm_of(group.scheme)
    assert isinstance(algorithm, StackableAlgorithm)
    rows = sum(linear.shape[0] for linear in group.linears)
    return algorithm.stack_bytes(rows, group.linears[0].shape[1])


def need_of(group: ScaleGroup, tensors: Mapping[str, TensorInfo]) -> Need:
    """Return what a scale group takes, in whatever batch it is."""
    fmt = FORMATS[group.scheme.weights]
    slabs: dict[tuple[str, int, int], int] = {}
    device = outputs = scratch = 0
    for linear in group.linears:
        region, info = linear.region, tensors[linear.region.key]
        nbytes = slab_bytes(info, *region.slab)
        slabs[region.key, *region.slab] = nbytes
        numel = math.prod(linear.shape)
        device += numel * BITS[info.dtype] // 8 + fmt.workspace_bytes(1, numel)
        outputs += sum(part_bytes(fmt, numel))
        if not _is_contiguous(region, info):
            scratch = max(scratch, nbytes)
    overhead = OVERHEAD * len(group.linears)
    return Need(sum(slabs.values()) + outputs + overhead, device + outputs + overhead, scratch)


def rows_that_fit(fmt: WeightFormat, room: int, width: int, itemsize: int) -> int:
    """Return how many rows of `width` elements of `itemsize` bytes fit into a set of buffers."""
    workspace = fmt.workspace_bytes(1, width)  # of one row; several need less each
    row = width * itemsize + sum(part_bytes(fmt, width)) + workspace
    return max(0, room - OVERHEAD) // row


def part_bytes(fmt: WeightFormat, numel: int) -> list[int]:
    """Return the bytes of each row part of a weight, passed to the GPU as one row of elements."""
    return [nbytes_of(*spec) for spec in fmt.row_parts((1, numel)).values()]


def _is_contiguous(region: Region, info: TensorInfo) -> bool:
    """True if a matrix is one run of its slab's bytes."""
    assert region.cols is not None
    is_strided = region.transposed or region.rows.step > 1 or region.cols.step > 1
    return not is_strided and len(region.cols) == info.shape[-1]


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a device or pinned memory had no room; CUDA and Triton only say so in words."""
    words = "out of memory", "alloc_failed"  # the latter is cuBLAS's and cuSOLVER's
    is_said = any(word in str(error).lower() for word in words)
    return isinstance(error, torch.OutOfMemoryError) or is_said


def on_device(device: torch.device, nbytes: int) -> torch.Tensor:
    """Allocate memory of a device."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def pinned(device: torch.device, nbytes: int) -> torch.Tensor:
    """Allocate memory of the host that a device reads and writes directly."""
    if device.type != "cuda":
        return on_host(nbytes)
    with torch.cuda.device(device):
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def empty_caches(device: torch.device) -> None:
    """Free the unused memory that PyTorch keeps.

    It keeps pinned blocks by size, and cuts no smaller block out of a larger one.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()


class BufferSet:
    """The buffers of one worker, and a stream: work that the device does in order, concurrently
    with other streams. On a CPU it is done immediately."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self.device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self.host = Arena(partial(pinned, device))
        self.onboard = Arena(partial(on_device, device))

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Within, this thread's copies and kernels go to the stream."""
        if self._stream is None:
            yield
            return
        # Without this device's context, the stream's exit would create one on another device.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        """Wait until everything in the stream is done, without a busy loop."""
        if self._stream is not None:
            cuda: Any = torch.cuda
            event = cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()

    def begin(self, room: int) -> None:
        """Take everything back, and have buffers of `room` bytes."""
        if self.host.nbytes not in (0, room):  # PyTorch would keep the old ones, which are useless
            self.free()
            empty_caches(self.device)
        self.host.resize(room)
        with self.streaming():
            self.onboard.resize(room)

    def free(self) -> None:
        """Give the buffers back; PyTorch keeps their memory for the next ones."""
        with suppress(RuntimeError):  # an error that ends the run is raised elsewhere
            self.wait()  # no copy may touch memory that another worker may take
        self.host.free()
        self.onboard.free()


class BufferPool:
    """The buffer sets of a device: their number, and their size at present. Thread-safe."""

    def __init__(
        self,
        device: torch.device,
        memory: int,
        workers: int,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Create a pool.

        Args:
            device: The device.
            memory: Bytes of the device, for all sets and a stack together.
            workers: More sets than this have no use.
            warn: Called with each warning, once.
        """
        self.device = device
        wanted = max(FEWEST_SETS, min(MOST_SETS, memory // ROOM))
        self.count = min(wanted, workers)
        self.room = min(ROOM, memory // self.count)
        self._memory = memory
        self.stack_room = min(STACK_BYTES, self.most_for_group)
        """Bytes that a stack of several groups may take."""
        self.stacking = threading.Lock()
        """Held while a stack is computed."""
        self._halvings = HALVINGS
        self._lock = threading.Lock()
        self._warn, self._warned = warn, set[str]()

    @property
    def nbytes(self) -> int:
        """Bytes of the device that all sets take together."""
        return self.count * self.room

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory that all sets take; PyTorch rounds each up to a power of two."""
        return self.count * (1 << max(0, self.room - 1).bit_length())

    def fit(self, plan: Plan) -> None:
        """Take no more room than the groups of a shard can use."""
        tensors = {key: raw.info for key, raw in plan.inventory.tensors.items()}
        most = most_in_stacks = 0
        for shard in plan.shards:
            groups = [job for job in shard.jobs if isinstance(job, ScaleGroup)]
            needs = (need_of(group, tensors) for group in groups if can_batch(group))
            most = max(most, sum(needs, Need()).room)
            stacks = sum(stack_bytes(group) for group in groups if can_stack(plan, group))
            most_in_stacks = max(most_in_stacks, stacks)
        self.room = max(1, min(self.room, most))
        self.stack_room = min(STACK_BYTES, most_in_stacks, self.most_for_group)

    @property
    def most_for_group(self) -> int:
        """Bytes of the device that a scale group may take that is quantized whole."""
        return max(0, self._memory - self.nbytes)

    def has_room(self, need: Need) -> bool:
        """True if a worker may take groups with this need at a time."""
        return need.room <= self.room and need.stack <= self.stack_room

    def halve(self, room: int) -> bool:
        """Halve the room, because `room` bytes could not be allocated.

        Returns:
            False if the room is too small to be halved. Nothing is done, and True is returned, if
            another worker has halved it meanwhile.
        """
        empty_caches(self.device)
        with self._lock:
            if self.room < room:
                return True
            if not self._halvings or room < 2:
                return False
            self.room, self._halvings = room // 2, self._halvings - 1
        self._warn_once(
            "halved",
            f"{self.device}: out of memory: weights go there in batches of {size(self.room)}, "
            "or less if need be. The output is the same.",
        )
        return True

    def halve_stacks(self, nbytes: int) -> None:
        """Allow stacks half of `nbytes` bytes, which could not be allocated."""
        self.stack_room = nbytes // 2
        self._warn_once(
            "stacks",
            f"{self.device}: out of memory: scale groups are quantized there in stacks of "
            f"{size(self.stack_room)}, or less if need be. {MAY_DIFFER}",
        )

    def leave_to_cpu(self, name: str, why: str, *, is_same: bool = True) -> None:
        """Warn that a scale group is quantized on the CPU; `is_same`: to the same bytes."""
        text = f"{self.device}: {why}: {name}, and others that do not fit, are quantized on the CPU"
        end = "The output is the same." if is_same else MAY_DIFFER
        self._warn_once(f"cpu {is_same}", f"{text}. {end}")

    def _warn_once(self, kind: str, text: str) -> None:
        with self._lock:
            is_new = kind not in self._warned
            self._warned.add(kind)
        if is_new:
            self._warn(text)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that can be taken, what PyTorch keeps included."""
    if device.type != "cuda":
        from fourfold.distributed.machine import memory_available

        return memory_available()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
