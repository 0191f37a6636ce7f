# SPDX-License-Identifier: Apache-2.0
"""The interface between `verify` and a layout."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fourfold.models.engines import Mismatch, Verdict, check
from fourfold.models.peculiarities import Peculiarities
from fourfold.verification.fp8 import ALGOS, LEAVES, Algo
from fourfold.verification.rules import Finding

if TYPE_CHECKING:
    from fourfold.verification.checkpoint import Checkpoint

WEIGHT, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE = PARTS = (
    "weight",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
)
"""The parts of a quantized linear. They are named as ModelOpt names its tensors."""

KV_SCALES = ("k_scale", "v_scale")

W4A4, W4A16, MIXED = "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"
"""The algorithms of a checkpoint or a linear, by ModelOpt's names."""


@dataclass(frozen=True)
class QuantConfig:
    """The quantization as a checkpoint's configuration states it."""

    algo: str | None
    """One of `W4A4`, `W4A16`, `MIXED`, or a name that this version does not know."""
    kv_cache: str | None
    """FP8, NVFP4, or None for a cache in the model's dtype."""
    ignore: tuple[str, ...]
    layers: Mapping[str, str]
    """Under `MIXED` only: module name → its algorithm."""

    def algo_of(self, linear: str) -> str | None:
        """Return the algorithm of one linear, or that of the module around it that is listed."""
        if self.algo != MIXED:
            return self.algo
        return next((self.layers[name] for name in prefixes(linear) if name in self.layers), None)


def prefixes(name: str) -> Iterator[str]:
    """Yield a module's name, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


class LayoutReader(ABC):
    """Reads one checkpoint in one layout."""

    leaves: ClassVar[Mapping[str, str]]
    """Part → the last part of its tensor's name, of a linear in NVFP4."""
    fp8: ClassVar[Mapping[str, Algo]] = ALGOS
    """The algorithms of linears in FP8, whose tensors are called alike in every layout."""
    leftover: ClassVar[re.Pattern[str]]
    """Tensors of quantizers and of other layouts, which no loader of this layout expects."""
    number: ClassVar[tuple[int, ...]] = ()
    """The shape of a scale that is a single number."""
    kv_dtypes: ClassVar[Collection[str]] = ("F32",)
    """Dtypes of the scales of keys and values."""
    quant: QuantConfig
    """The configuration that engines follow."""

    @classmethod
    @abstractmethod
    def recognizes(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Return True if the configuration is in this layout."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> LayoutReader:
        """Read the configuration of the checkpoint in `folder`, whose config.json is `config`.

        Raises:
            UnreadableError: It cannot be read, or states no NVFP4.
        """

    @abstractmethod
    def check(self, checkpoint: Checkpoint) -> Iterator[Finding]:
        """Yield the findings on the layout's own configuration files."""

    def mismatches(
        self,
        quantized: Collection[str],
        unquantized: Collection[str],
        peculiar: Peculiarities,
    ) -> list[Mismatch]:
        """Return the modules that an engine would not treat as the checkpoint needs.

        The arguments are those of `fourfold.models.engines.check`. Under `MIXED` engines quantize
        what the configuration lists, so that no other linear needs an entry in the ignore list.
        """
        mismatches = check(self.quant.ignore, quantized, unquantized, peculiar)
        if self.quant.algo != MIXED:
            return mismatches
        return [mismatch for mismatch in mismatches if mismatch.found is not Verdict.QUANTIZED]

    @property
    def scales(self) -> frozenset[str]:
        """The last names of the scales of quantized linears."""
        return frozenset({*self.leaves.values(), *LEAVES}) - {self.leaves[WEIGHT], WEIGHT}

    def scale(self, part: str, value: float) -> float:
        """Return the factor that a stored global or input scale stands for."""
        return value
