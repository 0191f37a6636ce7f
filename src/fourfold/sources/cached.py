# SPDX-License-Identifier: Apache-2.0
"""A source that keeps the tensors of the present layer in memory, so that they are read once.

Calibration runs a layer, and then the layer is quantized: both read the same raw tensors.
"""

from __future__ import annotations

import torch

from fourfold.storage.source import Bytes, Source, SourceView


class CachedTensors(SourceView):
    """Another source, with some of its tensors in memory. Safe for many threads."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._cache: dict[str, torch.Tensor] = {}

    def read(self, key: str) -> torch.Tensor:
        """Return the whole tensor, and keep it until `release`. It must not be changed."""
        if key not in self._cache:
            self._cache[key] = self.source.read(key)
            self.fetching.done_with(self.stored_keys([key]))
        return self._cache[key]

    def release(self) -> None:
        """Forget all tensors."""
        self._cache.clear()

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        tensor = self._cache.get(key)
        if tensor is None:
            return super().slab(key, start, stop, out)
        rows = tensor[start:stop] if tensor.ndim else tensor
        if out is None:
            return rows
        return torch.from_numpy(out).view(rows.dtype).view(rows.shape).copy_(rows)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        tensor = self._cache.get(key)
        if tensor is None:
            super().read_bytes(key, start, out)
        else:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            out[:] = data[start : start + len(out)]

    def will_need(self, key: str, start: int, stop: int) -> None:
        if key not in self._cache:
            super().will_need(key, start, stop)

    def close(self) -> None:
        self.release()
        super().close()
