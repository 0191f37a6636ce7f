"""What workers have of a device: a lane each, with buffers of a size that all lanes share.

    room      bytes of a lane's device buffer, and of its pinned buffer: a batch is what fits
    lanes     so many workers, and no more: reading, copies, kernels and writing overlap

**Sizes.** Copies over PCIe reach their full rate at some MB, and a batch costs two waits and a few
launches, about 0.1 ms, against 4 ms for 100 MB at 25 GB/s: a larger room gains nothing, a smaller
one loses little. 128 MiB hold the largest routed experts that are usual (gate, up and down of
DeepSeek V3: 113 MB with their codes). Eight lanes read and write from as many threads: more of
them would wait for Python's lock. That is 1 GiB on the device, and 1 GiB of pinned memory.

**Out of memory** (another process on the device, a limit of pinned memory): the room is halved for
everyone, down to a sixteenth, and the batch is done again, cut anew.

On a CPU all of it works as well, in ordinary memory and without streams: so tests run it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fourfold.execution.buffers import ALIGNMENT, Arena, on_host
from fourfold.execution.cpu import slab_bytes
from fourfold.formats.nvfp4.tensors import BLOCK_SIZE, workspace_bytes
from fourfold.models.regions import Region
from fourfold.planning import WAITING, Job, Plan, ScaleGroup
from fourfold.storage.safetensors_header import BITS, TensorInfo
from fourfold.storage.units import size

ROOM = 1 << 27
MOST_LANES, FEWEST_LANES = 8, 2
HALVINGS = 4
"""How often the room is halved before groups that do not fit are left to the CPU."""

BESIDE = 8 * ALIGNMENT
"""Bytes for each linear weight, at most: what aligning takes, its scale and its figures."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that some scale groups take of a lane's buffers."""

    host: int = 0
    device: int = 0
    scratch: int = 0
    """On the device: a slab whose weights do not lie in it as they are; one at a time."""

    def __add__(self, other: Need) -> Need:
        return Need(
            self.host + other.host,
            self.device + other.device,
            max(self.scratch, other.scratch),
        )

    @property
    def room(self) -> int:
        return max(self.host, self.device + self.scratch)


def need_of(group: ScaleGroup, tensors: Mapping[str, TensorInfo]) -> Need:
    """What a scale group takes, in whatever batch it is."""
    slabs: dict[tuple[str, int, int], int] = {}
    device = made = scratch = 0
    for linear in group.linears:
        region, info = linear.region, tensors[linear.region.key]
        nbytes = slab_bytes(info, *region.slab)
        slabs[region.key, *region.slab] = nbytes
        numel = math.prod(linear.shape)
        device += numel * BITS[info.dtype] // 8 + workspace_bytes(1, numel)
        made += _made_bytes(numel)
        if not _is_contiguous(region, info):
            scratch = max(scratch, nbytes)
    beside = BESIDE * len(group.linears)
    return Need(sum(slabs.values()) + made + beside, device + made + beside, scratch)


def rows_that_fit(room: int, width: int, itemsize: int) -> int:
    """How many rows of so many elements, of so many bytes each, go through a lane at a time."""
    sums = workspace_bytes(1, width)  # of one row; several have less each
    return max(0, room - BESIDE) // (width * itemsize + _made_bytes(width) + sums)


def _made_bytes(numel: int) -> int:
    """Bytes of the codes and block scales of so many weights."""
    return numel // 2 + numel // BLOCK_SIZE


def _is_contiguous(region: Region, info: TensorInfo) -> bool:
    """Whether a matrix is one run of its slab's bytes."""
    assert region.cols is not None
    is_strided = region.transposed or region.rows.step > 1 or region.cols.step > 1
    return not is_strided and len(region.cols) == info.shape[-1]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or pinned memory, had no room: CUDA and Triton have words for it alone."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def on_device(device: torch.device, nbytes: int) -> torch.Tensor:
    """`nbytes` of a device's memory."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def pinned(device: torch.device, nbytes: int) -> torch.Tensor:
    """`nbytes` of the host's memory that a device reads and writes by itself."""
    if device.type != "cuda":
        return on_host(nbytes)
    with torch.cuda.device(device):
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def empty_caches(device: torch.device) -> None:
    """Give back what PyTorch keeps of memory that is not in use. Pinned blocks it keeps by size: no
    smaller one is cut out of them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()


class Stream:
    """Work that a device does in order, beside that of other streams; on a CPU, at once."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self.device = device
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def current(self) -> AbstractContextManager[Any]:
        """Within, this thread's copies and kernels go to this stream."""
        return nullcontext() if self._stream is None else self._on_device()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Left alone, a stream's end would leave a context on whatever device was current."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        """Wait until everything is done, without keeping a core busy meanwhile."""
        if self._stream is not None:
            cuda: Any = torch.cuda
            event = cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()


class Lane:
    """A worker's stream and buffers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = Stream(device)
        self.host = Arena(partial(pinned, device))
        self.onboard = Arena(partial(on_device, device))

    def begin(self, room: int) -> None:
        """Forget what was taken; have buffers of this size."""
        if self.host.nbytes not in (0, room):  # others are no longer of use, and may be in the way
            self.free()
            empty_caches(self.device)
        self.host.resize(room)
        with self.stream.current():
            self.onboard.resize(room)

    def free(self) -> None:
        """Give the buffers back; PyTorch keeps their memory for the next ones."""
        with suppress(RuntimeError):  # of an error that ends the run
            self.stream.wait()  # nothing is copied into or out of what another lane may take
        self.host.free()
        self.onboard.free()


class Lanes:
    """How many lanes there are on a device, and how large they are now. Safe for many threads."""

    def __init__(
        self,
        device: torch.device,
        memory: int,
        workers: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """memory: bytes of the device, for all lanes. workers: lanes beyond that have no use.

        say: hears what should not go unnoticed, each once.
        """
        self.device = device
        wanted = max(FEWEST_LANES, min(MOST_LANES, memory // ROOM))
        self.count = min(wanted, workers)
        self.room = min(ROOM, memory // self.count)
        self._floor = self.room >> HALVINGS
        self._lock = threading.Lock()
        self._say, self._said = say, set[str]()

    @property
    def nbytes(self) -> int:
        """Bytes of the device that all lanes take together."""
        return self.count * self.room

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned memory that all lanes take together: PyTorch rounds to powers of two."""
        return self.count * (1 << max(0, self.room - 1).bit_length())

    def fit(self, plan: Plan) -> None:
        """Take no more room than the groups of a shard have a use for."""
        tensors = {key: raw.info for key, raw in plan.inventory.tensors.items()}
        most = 0
        for shard in plan.shards:
            groups = (job for job in shard.jobs if isinstance(job, ScaleGroup))
            most = max(most, sum((need_of(each, tensors) for each in groups), Need()).room)
        self.room = max(1, min(self.room, most))
        self._floor = self.room >> HALVINGS

    def lane(self) -> Lane:
        """A lane for one worker."""
        return Lane(self.device)

    def halve(self, room: int) -> bool:
        """Halve the room, which was found too large; whether that could be done.

        room: what it was then. Another lane may have halved it meanwhile, which is enough.
        """
        empty_caches(self.device)
        with self._lock:
            if self.room < room:
                return True
            if room // 2 < max(self._floor, 1):
                return False
            self.room = room // 2
        self.say(
            "halved",
            f"{self.device}: out of memory: weights go there in batches of {size(self.room)}, "
            "or less if need be. The output is the same.",
        )
        return True

    def leave_to_host(self, name: str, why: str) -> None:
        """Say that a scale group is quantized on the CPU."""
        text = f"{self.device}: {why}: {name}, and others that do not fit, are quantized on the CPU"
        self.say("host", f"{text}. The output is the same.")

    def say(self, what: str, text: str) -> None:
        """Say something, unless it was said."""
        with self._lock:
            is_new = what not in self._said
            self._said.add(what)
        if is_new:
            self._say(text)


class Filling:
    """A batch while it is filled."""

    def __init__(self, room: int, tensors: Mapping[str, TensorInfo]) -> None:
        self._room, self._tensors = room, tensors
        self._need = Need()

    def takes(self, job: Job) -> bool:
        """Whether this job goes into the batch, too; it counts, then."""
        if not isinstance(job, ScaleGroup):
            return False
        need = self._need + need_of(job, self._tensors)
        if need.room > self._room:
            return False
        self._need = need
        return True


def fill(
    groups: Sequence[ScaleGroup], room: int, tensors: Mapping[str, TensorInfo]
) -> Sequence[ScaleGroup]:
    """As many of the first groups as fit together; the first alone where it does not fit."""
    batch = Filling(room, tensors)
    count = next((n for n, group in enumerate(groups) if not batch.takes(group)), len(groups))
    return groups[: max(1, count)]


def lanes_of(
    device: torch.device, memory: int | None, threads: int, ranks: int, say: Callable[[str], None]
) -> Lanes:
    """Lanes on a device: in `memory` bytes, by default half of what is free, for each of `ranks`.

    The other half is for the model's run, and for others. Raises `RuntimeError`, in CUDA's words,
    where the device cannot be used at all.
    """
    free = free_bytes(device)  # uses it
    return Lanes(device, free // 2 // ranks if memory is None else memory, threads + WAITING, say)


def free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that can be taken, those among them that PyTorch keeps."""
    if device.type != "cuda":
        from fourfold.distributed.machine import memory_available

        return memory_available()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
