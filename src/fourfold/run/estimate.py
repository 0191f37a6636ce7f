# SPDX-License-Identifier: Apache-2.0
"""How long a plan will take: its weights and bytes, at the speed of this machine now.

A fraction of a second is spent on a sample of the search and of the disk. Reading, searching and
writing overlap, so the slower of the two counts; the verification reads both sides again.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from fourfold.algorithms.base import Weight, algorithm_of
from fourfold.distributed.machine import choose_device, threads_available
from fourfold.execution.backend import uses_device
from fourfold.formats import dispatch
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.planning import Plan
from fourfold.storage.safetensors_header import TORCH_DTYPES, nbytes_of
from fourfold.storage.units import size

SAMPLE = (64, 4096)
"""The weight that is quantized again and again: small enough for the cache, as pieces are."""

SEARCH_SECONDS, DISK_SECONDS = 0.1, 0.25
PIECE = 1 << 22
LEAST_DISK_BYTES = 1 << 20
"""A sample of fewer bytes says nothing of a disk."""


@dataclass(frozen=True)
class Estimate:
    """The time that a plan takes. Prints as a line of the plan."""

    weights: int
    """Numbers to quantize."""
    nbytes: int
    """Bytes that are read and written."""
    threads: int
    weights_per_second: float | None
    """With all threads; None if not measured: a GPU quantizes, or an algorithm needs data."""
    bytes_per_second: float | None
    """None if it was not measured: the files are too small, or no files."""
    runs_model: bool = False
    """True if the model is run for calibration, which no estimate covers."""
    fetches: bool = False
    """True if shards have to be fetched, which no estimate covers either."""

    @property
    def seconds(self) -> float:
        """The whole time, the verification included."""
        searching = self.weights / self.weights_per_second if self.weights_per_second else 0.0
        copying = self.nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
        return max(searching, copying) + copying

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "seconds": round(self.seconds, 1),
            "threads": self.threads,
            "weights_per_second": self.weights_per_second and round(self.weights_per_second),
            "bytes_per_second": self.bytes_per_second and round(self.bytes_per_second),
            "without_calibration": self.runs_model,
            "without_fetching": self.fetches,
        }

    def __str__(self) -> str:
        speeds = []
        if self.weights_per_second:
            million = self.weights_per_second / 1e6
            plural = "" if self.threads == 1 else "s"
            speeds.append(
                f"{million:,.0f} million weights a second with {self.threads} thread{plural}"
            )
        if self.bytes_per_second:
            speeds.append(f"{size(int(self.bytes_per_second))} a second from the disk")
        if not speeds:
            return "time: not estimated; no speed could be measured"
        text = f"time {_duration(self.seconds)}, verified: measured now are {' and '.join(speeds)}"
        if self.runs_model:
            text += "; calibration, which runs the model, comes on top"
        return f"{text}; fetching the shards comes on top" if self.fetches else text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    return f"about {minutes} min" if minutes < 100 else f"about {seconds / 3600:.1f} hours"


def estimate(plan: Plan, threads: int | None = None) -> Estimate:
    """Measure this machine for a moment, and return how long `plan` takes on it."""
    threads = threads or threads_available()
    return Estimate(
        weights=sum(linear.shape[0] * linear.shape[1] for linear in plan.linears),
        nbytes=plan.nbytes + plan.nbytes_after,
        threads=threads,
        weights_per_second=_search_speed(plan, threads),
        bytes_per_second=_disk_speed(plan),
        runs_model=plan.needs_calibration,
        fetches=plan.fetches,
    )


def _search_speed(plan: Plan, threads: int) -> float | None:
    """Weights a second of the scheme that quantizes the most, on all threads at once."""
    numels = Counter[tuple[Scheme, str]]()
    for linear in plan.linears:
        numels[plan.scheme_of(linear), linear.dtype] += linear.shape[0] * linear.shape[1]
    (scheme, dtype), _ = numels.most_common(1)[0]
    algorithm, fmt = algorithm_of(scheme), FORMATS[scheme.weights]
    on_device = uses_device(dispatch.choice_for_weights(torch.device(choose_device("auto"))))
    if on_device or algorithm.needs:
        return None
    values = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)) / 50

    def quantize(seconds: float) -> int:
        """Quantize the sample until the time is over; returns how many times."""
        buffers = {
            part: torch.empty(nbytes_of(*spec), dtype=torch.uint8).view(spec[1][0], -1)
            for part, spec in fmt.row_parts(SAMPLE).items()
        }
        sample = [Weight("a sample", values.to(TORCH_DTYPES[dtype]), buffers)]
        count, end = 0, time.perf_counter() + seconds
        while not count or time.perf_counter() < end:
            algorithm.quantize(sample, fmt)
            count += 1
        return count

    quantize(0)  # compiles the kernels, or loads them
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        count = sum(pool.map(quantize, [SEARCH_SECONDS] * threads))
        return count * values.numel() / (time.perf_counter() - began)


def _disk_speed(plan: Plan) -> float | None:
    """Bytes a second of pieces from all over the source's shards."""
    files = sorted({raw.info.file for raw in plan.inventory.tensors.values()})
    files = [file for file in files[:: len(files) // 16 + 1] if file.is_file()]
    nbytes, began = 0, time.perf_counter()
    for round_number, file in zip(range(16), cycle(files), strict=False):
        with file.open("rb", buffering=0) as handle:
            handle.seek(file.stat().st_size * round_number // 16)
            nbytes += len(handle.read(PIECE))
        if time.perf_counter() - began > DISK_SECONDS:
            break
    return None if nbytes < LEAST_DISK_BYTES else nbytes / (time.perf_counter() - began)
