# SPDX-License-Identifier: Apache-2.0
"""How long a plan will take: its weights and bytes, at the speed of this machine now.

A second at most is spent on samples of the search, of a matrix product and of the disk. Reading,
searching and writing overlap, so the slower of the two counts; the verification reads both sides
again. Calibration comes on top: it is counted in operations of matrix products (`planning.work`),
for as many tokens as it reads by default. So does the measuring of what a budget is spent on.

An algorithm that reads second moments multiplies each weight by a matrix as wide as its inputs. So
its time for a weight grows with the width, and is measured for two.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from fourfold.algorithms.base import Algorithm, Weight, algorithm_of
from fourfold.calibration.data import DEFAULT_SEQ, DEFAULT_SIZE
from fourfold.distributed.machine import choose_device, threads_available
from fourfold.execution.backend import uses_device
from fourfold.execution.threads import one_thread_each
from fourfold.formats import dispatch
from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.planning import Plan
from fourfold.planning.work import calibration_operations
from fourfold.run.budget import budget_operations
from fourfold.statistics import Site, statistics_of_rows
from fourfold.storage.safetensors_header import TORCH_DTYPES, nbytes_of
from fourfold.storage.units import size

SAMPLE = (64, 4096)
"""The weight that is quantized again and again: small enough for the cache, as pieces are."""
SAMPLES_WITH_DATA = ((256, 512), (256, 1024))
"""The same for an algorithm that reads statistics of the inputs, in two widths."""
PRODUCT = (1024, 2048, 1024)
"""Rows, columns and outputs of a matrix product like those of calibration."""

TOKENS = DEFAULT_SIZE * DEFAULT_SEQ
"""Tokens that calibration reads, if the data has as many."""

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
    """With all threads, over weights of all widths; None if not measured: a GPU quantizes."""
    bytes_per_second: float | None
    """None if it was not measured: the files are too small, or no files."""
    operations: float = 0.0
    """Operations of matrix products in calibration; 0 if the model is not run."""
    operations_per_second: float | None = None
    """With all threads; None if not measured."""
    budget_operations: float = 0.0
    """Operations of measuring what a budget is spent on; 0 without one."""
    fetches: bool = False
    """True if shards have to be fetched, which no estimate covers."""

    @property
    def seconds(self) -> float:
        """The whole time, the verification included."""
        searching = self.weights / self.weights_per_second if self.weights_per_second else 0.0
        copying = self.nbytes / self.bytes_per_second if self.bytes_per_second else 0.0
        calibrating = self.calibration_seconds or 0.0
        choosing = self.budget_seconds or 0.0
        return choosing + max(searching + calibrating, copying) + copying

    @property
    def calibration_seconds(self) -> float | None:
        """The time in which the model runs and its moments are summed; None if not measured."""
        speed = self.operations_per_second
        return self.operations / speed if self.operations and speed else None

    @property
    def budget_seconds(self) -> float | None:
        """The time in which components are measured for a budget; None if not measured."""
        speed = self.operations_per_second
        return self.budget_operations / speed if self.budget_operations and speed else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "seconds": round(self.seconds, 1),
            "threads": self.threads,
            "weights_per_second": self.weights_per_second and round(self.weights_per_second),
            "bytes_per_second": self.bytes_per_second and round(self.bytes_per_second),
            "calibration_seconds": self.calibration_seconds and round(self.calibration_seconds, 1),
            "budget_seconds": self.budget_seconds and round(self.budget_seconds, 1),
            "without_calibration": self._leaves_out_calibration,
            "without_fetching": self.fetches,
        }

    def __str__(self) -> str:
        speeds = []
        if self.weights_per_second:
            million = self.weights_per_second / 1e6
            digits = 0 if million >= 10 else 1
            plural = "" if self.threads == 1 else "s"
            speeds.append(
                f"{million:,.{digits}f} million weights a second with {self.threads} thread{plural}"
            )
        if self.bytes_per_second:
            speeds.append(f"{size(int(self.bytes_per_second))} a second from the disk")
        if not speeds:
            return "time: not estimated; no speed could be measured"
        text = f"time {_duration(self.seconds)}, verified: measured now are {' and '.join(speeds)}"
        if self._leaves_out_calibration:
            text += "; calibration, which runs the model, comes on top"
        elif self.calibration_seconds is not None:
            speed = (self.operations_per_second or 0.0) / 1e9
            text += (
                f"; calibration on {TOKENS:,} tokens is {_duration(self.calibration_seconds)} of "
                f"it, with {speed:,.0f} GFLOP/s"
            )
        if self.budget_seconds is not None:
            text += f"; to choose what the budget buys takes {_duration(self.budget_seconds)} of it"
        return f"{text}; fetching the shards comes on top" if self.fetches else text

    @property
    def _leaves_out_calibration(self) -> bool:
        runs_model = self.operations or self.budget_operations
        return bool(runs_model) and self.operations_per_second is None


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
        operations=calibration_operations(plan, TOKENS),
        operations_per_second=_product_speed(plan, threads),
        budget_operations=budget_operations(plan),
        fetches=plan.fetches,
    )


def _search_speed(plan: Plan, threads: int) -> float | None:
    """Weights a second of the scheme that quantizes the most, on all threads at once."""
    numels = Counter[tuple[Scheme, str]]()
    for linear in plan.linears:
        numels[plan.scheme_of(linear), linear.dtype] += linear.shape[0] * linear.shape[1]
    (scheme, dtype), _ = numels.most_common(1)[0]
    if uses_device(dispatch.choice_for_weights(torch.device(choose_device("auto")))):
        return None
    if not algorithm_of(scheme).needs:
        return 1 / _seconds_of_weight(scheme, dtype, SAMPLE, threads)
    narrow, wide = (_seconds_of_weight(scheme, dtype, x, threads) for x in SAMPLES_WITH_DATA)
    shapes = [linear.shape for linear in plan.linears]
    return sum(map(math.prod, shapes)) / seconds_by_width(shapes, narrow, wide)


def seconds_by_width(shapes: Sequence[tuple[int, int]], narrow: float, wide: float) -> float:
    """Return the time for weights of several shapes, given that for one number of each of
    `SAMPLES_WITH_DATA`: it grows with the width as between these."""
    (_, least_width), (_, width) = SAMPLES_WITH_DATA
    slope = max(0.0, wide - narrow) / (width - least_width)
    return math.fsum(
        outputs * inputs * max(narrow / 2, wide + slope * (inputs - width))
        for outputs, inputs in shapes
    )


def _seconds_of_weight(scheme: Scheme, dtype: str, shape: tuple[int, int], threads: int) -> float:
    """The time for one number of a weight of a shape, all threads quantizing such weights."""
    algorithm, fmt = algorithm_of(scheme), FORMATS[scheme.weights]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 50
    statistics = _sample_statistics(algorithm, shape[1])

    def quantize(seconds: float) -> int:
        """Quantize the sample until the time is over; returns how many times."""
        buffers = {
            part: torch.empty(nbytes_of(*spec), dtype=torch.uint8).view(spec[1][0], -1)
            for part, spec in fmt.row_parts(shape).items()
        }
        sample = [Weight("a sample", values.to(TORCH_DTYPES[dtype]), buffers, statistics)]
        count, end = 0, time.perf_counter() + seconds
        while not count or time.perf_counter() < end:
            algorithm.quantize(sample, fmt)
            count += 1
        return count

    quantize(0)  # compiles the kernels, or loads them
    with one_thread_each(), ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        count = sum(pool.map(quantize, [SEARCH_SECONDS] * threads))
        return (time.perf_counter() - began) / (count * values.numel())


def _sample_statistics(algorithm: Algorithm, width: int) -> dict[str, torch.Tensor]:
    """The statistics of random inputs that an algorithm reads. Experts share a moment, so that the
    time for its factor, which is counted by itself, is spent once."""
    site = Site("a sample.gate_up", width, experts=1 << 20)
    rows_RI = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(1))
    return statistics_of_rows(algorithm.needs_at(site), rows_RI)


def _product_speed(plan: Plan, threads: int) -> float | None:
    """Operations a second of a matrix product in float32; None where the model is not run."""
    runs_model = plan.needs_calibration or plan.recipe.budget is not None
    if not runs_model or choose_device("auto") != "cpu":
        return None
    rows, columns, outputs = PRODUCT
    x, w = torch.randn(rows, columns), torch.randn(columns, outputs)
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() < began + SEARCH_SECONDS:
        x @ w
        count += 1
    return 2 * count * rows * columns * outputs / (time.perf_counter() - began)


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
