# SPDX-License-Identifier: Apache-2.0
"""The threads of PyTorch while groups are quantized side by side, one in each worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let PyTorch compute on the calling thread alone, in threads that are started inside.

    Otherwise each worker would have as many threads as there are workers; and sums do not depend on
    the number of threads this way.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
