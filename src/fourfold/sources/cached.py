# SPDX-License-Identifier: Apache-2.0
"""A source that keeps the tensors of the present layer in memory, so that they are read once.

Calibration runs a layer, and then the layer is quantized: both read the same raw tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fourfold.storage.fingerprints import FileStamp
from fourfold.storage.side_files import SideFiles
from fourfold.storage.source import Bytes, Source


class CachedTensors(Source):
    """Another source, with some of its tensors in memory. Safe for many threads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.folder, self.config, self.tensors = source.folder, source.config, source.tensors
        self.trust_remote_code = source.trust_remote_code
        self._cache: dict[str, torch.Tensor] = {}

    def read(self, key: str) -> torch.Tensor:
        """Return the whole tensor, and keep it until `release`. It must not be changed."""
        if key not in self._cache:
            self._cache[key] = self.source.read(key)
        return self._cache[key]

    def release(self) -> None:
        """Forget all tensors."""
        self._cache.clear()

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        tensor = self._cache.get(key)
        if tensor is None:
            return self.source.slab(key, start, stop, out)
        rows = tensor[start:stop] if tensor.ndim else tensor
        if out is None:
            return rows
        return torch.from_numpy(out).view(rows.dtype).view(rows.shape).copy_(rows)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        tensor = self._cache.get(key)
        if tensor is None:
            self.source.read_bytes(key, start, out)
        else:
            data = tensor.reshape(-1).view(torch.uint8).numpy()
            out[:] = data[start : start + len(out)]

    def will_need(self, key: str, start: int, stop: int) -> None:
        if key not in self._cache:
            self.source.will_need(key, start, stop)

    def side_files(self) -> SideFiles:
        return self.source.side_files()

    def stamps(self) -> Mapping[str, FileStamp] | None:
        return self.source.stamps()

    def check_unchanged(self) -> None:
        self.source.check_unchanged()

    def close(self) -> None:
        self.release()
        self.source.close()
