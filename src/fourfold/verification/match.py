# SPDX-License-Identifier: Apache-2.0
"""Match the tensors of the checkpoint with those of the source.

Every linear weight of the source is packed (a `Pair`), or copied (a `Copy`): as a raw tensor, or as
one expert split out of a fused tensor. Tensors without a counterpart are lost, or extra.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fourfold.models.inventory import Inventory, LinearWeight
from fourfold.models.regions import Region, whole
from fourfold.storage.safetensors_header import TensorInfo
from fourfold.verification.checkpoint import Checkpoint, QuantizedLinear
from fourfold.verification.fp8 import FP8Linear
from fourfold.verification.readers.base import KV_SCALES, WEIGHT
from fourfold.verification.rules import Finding, finding

Linear = QuantizedLinear | FP8Linear


@dataclass(frozen=True, slots=True)
class Pair:
    """A packed weight, and its matrix [out, in] in the source."""

    linear: Linear
    region: Region
    role: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of the checkpoint, and its counterpart: a raw tensor, or a region of one."""

    name: str
    key: str
    region: Region | None = None


class Matching:
    """The tensors to compare, and the findings on tensors without a counterpart."""

    def __init__(
        self, checkpoint: Checkpoint, source: Mapping[str, TensorInfo], inventory: Inventory
    ) -> None:
        """Find the counterpart of every tensor of the checkpoint and of the source."""
        self.checkpoint, self.source, self.inventory = checkpoint, source, inventory
        self.pairs: list[Pair] = []
        self.copies: list[Copy] = []
        self.findings: list[Finding] = []
        self._packed = checkpoint.quantized
        self._linears: Mapping[str, Linear] = {**checkpoint.linears, **checkpoint.fp8}
        self._claimed: set[str] = set()
        for key in source:
            linears = inventory.linears_by_key.get(key, ())
            if linears:
                self._weights(key, linears)
            else:
                self._other(key)
        self.findings += self._extra()

    def _weights(self, key: str, linears: tuple[LinearWeight, ...]) -> None:
        """Match a raw tensor that holds linear weights: packed, split, or copied as it is."""
        if any(map(self._is_apart, linears)):
            for linear in linears:
                if self._is_apart(linear):
                    self._apart(linear)
                else:
                    self._lose(linear.name, f"part of {key}, whose other parts are there")
        elif key in self.checkpoint.tensors:
            self._copy(key, key)
        else:
            self._lose(key, f"{len(linears)} linear weights" if len(linears) > 1 else "a weight")

    def _is_apart(self, linear: LinearWeight) -> bool:
        """True if the checkpoint holds this weight packed, or split out of its raw tensor."""
        name = f"{linear.name}.weight"
        is_split = name != linear.region.key and name in self.checkpoint.tensors
        return linear.name in self._packed or is_split

    def _apart(self, linear: LinearWeight) -> None:
        if linear.name not in self._packed:
            self._copy(f"{linear.name}.weight", linear.region.key, linear.region)
            return
        self._claim(linear.name)
        self._pair(self._linears[linear.name], linear.region, linear.role)

    def _claim(self, packed: str) -> None:
        self._claimed.update(info.key for info in self._linears[packed].parts.values())

    def _pair(self, packed: Linear, region: Region, role: str) -> None:
        if not packed.is_sound:
            return  # the faults of its tensors have findings of their own
        if packed.shape == region.shape:
            self.pairs.append(Pair(packed, region, str(role)))
        else:
            text = f"[out, in] {list(packed.shape)}, the source has {list(region.shape)}"
            self.findings.append(finding("quantized-shape-differs", packed.name, text))

    def _other(self, key: str) -> None:
        """Match a raw tensor without linear weights: copied, or biases split by expert."""
        stem, _, leaf = key.rpartition(".")
        if leaf == "weight" and stem in self._packed:
            self._claim(stem)
            shape = self.source[key].shape
            if len(shape) == 2:
                role = str(self.inventory.tensors[key].role)
                self._pair(self._linears[stem], whole(key, shape), role)
            return
        if key in self.checkpoint.tensors:
            self._copy(key, key)
            return
        biases = [bias for bias in self.inventory.biases if bias.region.key == key]
        for bias in biases:
            names = [n for n in (bias.name, f"{bias.name}.bias") if n in self.checkpoint.tensors]
            if names:
                self._copy(names[0], key, bias.region)
            else:
                self._lose(bias.name, f"part of {key}")
        if not biases:
            info = self.source[key]
            self._lose(key, f"{info.dtype} {list(info.shape)} in {info.file.name}")

    def _copy(self, name: str, key: str, region: Region | None = None) -> None:
        self._claimed.add(name)
        ours, theirs = self.checkpoint.tensors[name], self.source[key]
        shape = theirs.shape if region is None else region.shape
        if ours.dtype != theirs.dtype:
            text = f"{ours.dtype}, the source has {theirs.dtype}"
            self.findings.append(finding("copied-dtype-differs", name, text))
        elif ours.shape != shape:
            text = f"{list(ours.shape)}, the source has {list(shape)}"
            self.findings.append(finding("copied-shape-differs", name, text))
        else:
            self.copies.append(Copy(name, key, region))

    def _lose(self, name: str, what: str) -> None:
        text = f"in the source ({what}), neither quantized nor copied"
        self.findings.append(finding("tensor-lost", name, text))

    def _extra(self) -> Iterator[Finding]:
        for name in sorted(self.checkpoint.tensors.keys() - self._claimed):
            stem, _, leaf = name.rpartition(".")
            if leaf in KV_SCALES:
                continue
            info = self.checkpoint.tensors[name]
            parts = self._linears[stem].parts if stem in self._linears else {}
            if info in parts.values():
                if info == parts.get(WEIGHT):
                    yield finding("tensor-extra", stem, "a quantized linear, not in the source")
                continue
            why = "its parts are there, too" if name in self.source else "not in the source"
            yield finding("tensor-extra", name, f"{info.dtype} {list(info.shape)}, {why}")
