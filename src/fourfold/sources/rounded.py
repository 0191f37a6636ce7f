# SPDX-License-Identifier: Apache-2.0
"""A source whose FP32 tensors are presented in BF16, as a training run leaves them for serving.

Rounding is to nearest even. Four kinds of tensors keep FP32, because engines compute with them in
FP32 and published checkpoints hold them so: router biases, and the decays, skips and time steps of
linear attention and Mamba.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fourfold.errors import UsageError
from fourfold.sources.safetensors import lay_out
from fourfold.storage.safetensors_header import BITS, TensorInfo
from fourfold.storage.source import Bytes, Source, SourceView, read_rounded

KEPT = re.compile(r"(^|\.)(e_score_correction_bias|A_log|D|dt_bias)$")
"""Names of tensors that keep FP32."""

DTYPE = "bfloat16"


def check_dtype(dtype: str | None) -> None:
    """Raise `UsageError` for a dtype that FP32 tensors are not rounded to."""
    if dtype not in (None, DTYPE):
        raise UsageError(f"`dtype={dtype}`: give bfloat16, or leave it out.")


def is_rounded(info: TensorInfo) -> bool:
    """True for a tensor that is rounded."""
    return info.dtype == "F32" and KEPT.search(info.key) is None


class RoundedSource(SourceView):
    """Another source on disk, with its FP32 tensors in BF16."""

    def __init__(self, source: Source) -> None:
        """Present `source`."""
        super().__init__(source)
        self.config = _with_dtype(source.config)
        if any(map(is_rounded, source.tensors.values())):
            infos = source.tensors.values()
            named = [(x.key, "BF16" if is_rounded(x) else x.dtype, x.shape) for x in infos]
            # The order is that of a single safetensors file, as if BF16 had been saved.
            laid = lay_out(sorted(named, key=lambda x: (-BITS[x[1]], x[0])), self.folder)
            self.tensors = {
                key: replace(info, file=source.tensors[key].file) for key, info in laid.items()
            }

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        if not is_rounded(self.source.tensors[key]):
            return super().slab(key, start, stop, out)
        rounded = self.source.slab(key, start, stop).to(torch.bfloat16)
        if out is None:
            return rounded
        return torch.from_numpy(out).view(torch.bfloat16).view(rounded.shape).copy_(rounded)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if is_rounded(self.source.tensors[key]):
            read_rounded(partial(self.slab, key), self.tensors[key].row_bytes, start, out)
        else:
            super().read_bytes(key, start, out)

    @property
    def notes(self) -> tuple[str, ...]:
        count = sum(map(is_rounded, self.source.tensors.values()))
        note = f"{count:,} FP32 tensors are read as BF16, rounded to nearest even (`dtype`)"
        return (*self.source.notes, *((note,) if count else ()))


def _with_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, with the dtype that the weights now have."""
    changed = {
        name: _with_dtype(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
    }
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    return changed | {name: DTYPE for name in names if config[name] is not None}
