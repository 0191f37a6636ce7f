"""A source that holds what was read of the present unit, so that the disk is read once.

Calibration runs a layer, then the fold quantizes it: both take the same raw tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourfold.storage.fingerprints import FileStamp
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.source import Source


class HeldTensors:
    """Another source, with some of its tensors in memory. Safe for many threads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._held: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def whole(self, key: str) -> torch.Tensor:
        """All of a tensor; held until `release`. It must not be changed."""
        if key not in self._held:
            shape = self.tensors[key].shape
            tensor = self.source.slab(key, 0, shape[0] if shape else 1)
            with self._lock:
                self._held[key] = tensor
        return self._held[key]

    def release(self) -> None:
        """Hold nothing any more."""
        with self._lock:
            self._held.clear()

    def slab(
        self, key: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> torch.Tensor:
        held = self._held.get(key)
        if held is None:
            return self.source.slab(key, start, stop, out)
        return held[start:stop] if held.ndim else held

    def read_bytes(self, key: str, start: int, out: np.ndarray[Any, Any]) -> None:
        held = self._held.get(key)
        if held is None:
            self.source.read_bytes(key, start, out)
            return
        data = held.reshape(-1).view(torch.uint8).numpy()
        out[:] = data[start : start + len(out)]

    def will_need(self, key: str, start: int, stop: int) -> None:
        if key not in self._held:
            self.source.will_need(key, start, stop)

    def side_files(self) -> tuple[list[Path], list[Path]]:
        return self.source.side_files()

    def stamps(self) -> Mapping[str, FileStamp] | None:
        return self.source.stamps()

    def check_unchanged(self) -> None:
        self.source.check_unchanged()

    def close(self) -> None:
        self.release()
        self.source.close()
