# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels on a thread while the plan is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch

from fourfold.errors import UsageError
from fourfold.execution import warm_up, warm_up_device
from fourfold.recipes import Recipe
from fourfold.storage.safetensors_header import COMPUTE_DTYPES, TORCH_DTYPES
from fourfold.storage.source import Source


@contextmanager
def warming_up(recipe: Recipe, source: Source, device: str) -> Iterator[Future[None]]:
    """Compile the kernels for the dtypes of `source` within this context.

    Yields what raises, after the context, the error of the device's kernels if they cannot run. The
    thread is joined even after an error, because an interpreter must not end while kernels are
    compiled.
    """
    with ThreadPoolExecutor(1, "warm-up") as thread:
        yield thread.submit(_compile, recipe, _dtypes_of(source), device)


def _dtypes_of(source: Source) -> list[torch.dtype]:
    """The dtypes of its matrices, the most frequent first."""
    nbytes: Counter[str] = Counter()
    for info in source.tensors.values():
        if len(info.shape) > 1 and info.dtype in COMPUTE_DTYPES:
            nbytes[info.dtype] += info.nbytes
    return [TORCH_DTYPES[dtype] for dtype, _ in nbytes.most_common()]


def _compile(recipe: Recipe, dtypes: list[torch.dtype], device: str) -> None:
    with suppress(UsageError):  # the choice of the backend reports kernels that cannot run
        warm_up(recipe.schemes, dtypes)
    warm_up_device(device, recipe.schemes, dtypes[:1])  # others at their first use
