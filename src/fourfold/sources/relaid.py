# SPDX-License-Identifier: Apache-2.0
"""An NVFP4 checkpoint with its tensors named and encoded as another layout does.

Codes and the scales of blocks and channels are the same bytes in every layout, in a shape of its
own. The scales that are single numbers are encoded anew: for NVFP4, compressed-tensors stores
reciprocals.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fourfold.errors import SourceError
from fourfold.formats.scheme import Scheme
from fourfold.layouts.base import Layout, TensorSpec, layers_of_keys
from fourfold.sources.codecs.base import StoredParts
from fourfold.sources.codecs.nvfp4 import BLOCK_SCALE, check_block_scales
from fourfold.sources.decoded import DecodedSource
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.storage.source import Bytes, Source, SourceView


class RelaidSource(SourceView):
    """The tensors of an NVFP4 checkpoint as `layout` has them.

    Attributes:
        schemes: The scheme of every quantized linear weight, by name.
        group_scales: The global scales of those in NVFP4.
        stored: The checkpoint as it lies on disk.
        origins: The weight or other tensor of the decoded checkpoint that each tensor belongs to.
    """

    def __init__(
        self, decoded: DecodedSource, layout: Layout, attention: Collection[str] = ()
    ) -> None:
        """Present the checkpoint that `decoded` decodes.

        `attention` names the linear layers of the decoder's attention modules.

        Raises:
            SourceError: It holds weights that no format here has as they are stored.
        """
        super().__init__(decoded)
        self.stored = decoded.source
        self.schemes: dict[str, Scheme] = {}
        self.group_scales: dict[str, float] = {}
        self.origins: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._numbers: dict[str, Bytes] = {}
        self._block_scales: set[str] = set()
        self._attention = attention
        self.tensors = {info.key: info for info in self._lay_out(decoded, layout)}

    def slab(self, key: str, start: int, stop: int, out: Bytes | None = None) -> torch.Tensor:
        info = self.tensors[key]
        if key in self._names:
            rows = self.stored.slab(self._names[key], start, stop, out)
            self._check(key, rows)
            is_same = (rows.dtype, rows.shape[1:]) == (info.torch_dtype, info.shape[1:])
            return rows if is_same else rows.view(info.torch_dtype).view(-1, *info.shape[1:])
        number = self._numbers[key]
        if out is not None:
            out[:] = number
        return torch.from_numpy(number.copy()).view(info.torch_dtype).view(info.shape)

    def read_bytes(self, key: str, start: int, out: Bytes) -> None:
        if key in self._names:
            self.stored.read_bytes(self._names[key], start, out)
            self._check(key, torch.from_numpy(out))
        else:
            out[:] = self._numbers[key][start : start + len(out)]

    def _check(self, key: str, stored: torch.Tensor) -> None:
        """Raise `DamagedError` for block scales that cannot be."""
        if key in self._block_scales:
            check_block_scales(self._names[key], stored)
            if not stored.view(torch.uint8).any():
                self.source.read(self.origins[key])  # an error, unless the codes are 0, too

    def will_need(self, key: str, start: int, stop: int) -> None:
        if key in self._names:
            self.stored.will_need(self._names[key], start, stop)

    def stored_keys(self, keys: Iterable[str]) -> Iterable[str]:
        return self.stored.stored_keys(self._names[key] for key in keys if key in self._names)

    @property
    def decoded(self) -> Mapping[str, str]:
        return {}

    def _lay_out(self, decoded: DecodedSource, layout: Layout) -> Iterator[TensorInfo]:
        """Yield the tensors, in the order in which they lie in the checkpoint."""
        for key, info in decoded.tensors.items():
            codec = decoded.codec_of(key)
            if codec is None:
                self._names[key] = self.origins[key] = key
                yield info
                continue
            parts = codec.stored_parts(decoded.weights[key], self.stored.slab)
            if parts is None:
                raise SourceError(
                    f"{key} in {info.file.name}: {codec.title}, which is not carried over to "
                    "another layout. Use `fourfold quantize`."
                )
            yield from self._parts(key, parts, decoded, layout)
        yield from self._kv_scales(decoded, layout)

    def _parts(
        self, key: str, parts: StoredParts, decoded: DecodedSource, layout: Layout
    ) -> Iterator[TensorInfo]:
        info, linear = decoded.weights[key].info, key.removesuffix(".weight")
        self.schemes[linear] = scheme = parts.scheme
        if scheme.weights == "nvfp4":  # FP8 weights that are fused are rescaled
            self.group_scales[linear] = parts.numbers["global_scale"]
        rows, width = info.shape
        for part, spec in layout.tensors(linear, (rows, width), scheme).items():
            self.origins[spec.name] = key
            if part in parts.rows:
                self._names[spec.name] = parts.rows[part]
                if parts.rows[part] == decoded.weights[key].parts.get(BLOCK_SCALE):
                    self._block_scales.add(spec.name)
                stored = self.stored.tensors[parts.rows[part]]
                yield replace(stored, key=spec.name, dtype=spec.dtype, shape=spec.shape)
            else:
                yield self._number(spec, layout.encode(part, parts.numbers[part], scheme), info)

    def _kv_scales(self, decoded: DecodedSource, layout: Layout) -> Iterator[TensorInfo]:
        """The scales of calibrated FP8 KV caches, by the names of the layout."""
        linears = {key.removesuffix(".weight") for key in decoded.tensors}
        names = layout.kv_scale_names(linears)
        for key in decoded.hidden:
            leaf = key.rpartition(".")[2]
            if leaf not in ("k_scale", "v_scale"):
                continue
            module = key.rpartition(".")[0]
            if module.rpartition(".")[2] in ("k_proj", "v_proj", "qkv_proj"):
                module = module.rpartition(".")[0]
            info = self.stored.tensors[key]
            if module not in names or math.prod(info.shape) != 1:
                raise SourceError(
                    f"{key} in {info.file.name}: {list(info.shape)}, where {layout.name} has one "
                    "number for each attention module with a k_proj or qkv_proj. Use "
                    "`fourfold quantize`."
                )
            name = names[module][leaf == "v_scale"]
            linear = "k_proj" if f"{module}.k_proj" in linears else "qkv_proj"
            self.origins[name] = f"{module}.{linear}.weight"
            value = np.array([float(self.stored.slab(key, 0, 1))], dtype=np.float32)
            yield self._number(TensorSpec(name, *layout.kv_scale), value, info)
        if decoded.kv_cache is not None and layout.needs_kv_scales:
            yield from self._unit_kv_scales(decoded, layout)

    def _unit_kv_scales(self, decoded: DecodedSource, layout: Layout) -> Iterator[TensorInfo]:
        """The scales of 1 of attention modules without others."""
        keys = layers_of_keys(self._attention)
        for module, names in layout.kv_scale_names(self._attention).items():
            key = f"{keys[module]}.weight"
            for name in names:
                if name not in self.origins:
                    self.origins[name] = key
                    spec = TensorSpec(name, *layout.kv_scale)
                    yield self._number(spec, np.ones(1, dtype=np.float32), decoded.tensors[key])

    def _number(
        self, spec: TensorSpec, value: np.ndarray[Any, Any], beside: TensorInfo
    ) -> TensorInfo:
        data = value.view(np.uint8).reshape(-1)
        self._numbers[spec.name] = data
        return TensorInfo(
            spec.name, spec.dtype, spec.shape, beside.file, beside.start, beside.start + len(data)
        )


def relaid(source: Source, layout: Layout, attention: Collection[str] = ()) -> RelaidSource:
    """Present an open NVFP4 checkpoint in another layout.

    Raises:
        SourceError: It is not one, or a layout cannot have a quantized weight as it is stored.
    """
    if not isinstance(source, DecodedSource):
        raise SourceError(
            f"{source.place}: holds no NVFP4 weights that `layout` could carry over. Use "
            "`fourfold quantize`, or leave `layout` out."
        )
    return RelaidSource(source, layout, attention)
