# SPDX-License-Identifier: Apache-2.0
"""The scheme of one linear weight, as a recipe chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fourfold.formats.base import FORMATS

InputAmax = Literal["max", "constant", "histogram"]
"""Where the largest input that an input's scale holds comes from; see `Activations.amax`."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear weight is stored, who chooses its codes, and how its inputs are rounded."""

    weights: str
    """The format of the weight, a name in `FORMATS`."""
    algorithm: str
    """The algorithm that chooses scales and codes, a name in `ALGORITHMS`."""
    activations: str | None = None
    """The format that engines round the layer's inputs to; None if they keep 16 bits."""
    headroom: int = 0
    """The scale of the inputs leaves room for 2^headroom times the largest input observed."""
    amax: InputAmax = "max"
    """The origin of the scale of the inputs."""

    options: tuple[tuple[str, float], ...] = ()
    """Settings of the algorithm that are not its defaults, by name."""

    @property
    def has_input_scale(self) -> bool:
        """True if the checkpoint stores a scale for the inputs."""
        return self.activations is not None and bool(FORMATS[self.activations].input_parts())

    @property
    def observes_inputs(self) -> bool:
        """True if calibration measures the stored scale of the inputs."""
        return self.has_input_scale and self.amax != "constant"

    def __str__(self) -> str:
        inputs = f" with {self.activations} activations" if self.activations else ""
        return f"{self.weights}{inputs}"
