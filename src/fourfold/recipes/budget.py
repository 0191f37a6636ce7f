# SPDX-License-Identifier: Apache-2.0
"""The `budget` of a recipe: how much larger, or how good, a checkpoint of mixed precision may be.

    budget: {bits_per_weight: 4.8, candidates: [fp8, bf16]}

What the rules of the recipe quantize is measured component by component, and the components that
cost most are stored as one of the candidates (`run.budget`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

AS_RECIPE = "recipe"
"""As the rules of the recipe say."""
AS_SOURCE = "bf16"
"""As the source has it: not quantized."""
W4A16 = "w4a16"
"""NVFP4 weights as the rules say, and inputs in 16 bits."""

CANDIDATES = (W4A16, "fp8", "fp8_channel", "fp8_block", "mxfp8", AS_SOURCE)
"""Everything that a component may be stored as instead."""


def check_candidates(names: tuple[str, ...]) -> tuple[str, ...]:
    """Raise `ValueError` for an empty list, for a name that is unknown, and for one given twice."""
    for name in names:
        if name not in CANDIDATES:
            raise ValueError(f"{name!r} is no candidate; known: {', '.join(CANDIDATES)}")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is given twice; remove one of them")
    if not names:
        raise ValueError(f"give at least one of {', '.join(CANDIDATES)}")
    return names


class Budget(BaseModel):
    """A limit of bytes or of KL, and what may be chosen to keep it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits_per_weight: Annotated[float, Field(gt=4, le=16)] | None = None
    """The most bits of a checkpoint for each weight that the rules quantize, scales included."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """The KL divergence that is to be reached with as few bytes as possible, nats a token, on the
    text that the choice is made on."""
    candidates: Annotated[
        tuple[str, ...], Field(strict=False), AfterValidator(check_candidates)
    ] = ("fp8", AS_SOURCE)
    """What components may become. `w4a16` costs no bytes, and speed where W4A4 would be faster."""
    tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens of calibration text that each measurement reads; by default up to 8,192, and fewer
    where the model is large, but at least 1,024."""

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if (self.bits_per_weight is None) == (self.max_kl is None):
            raise ValueError("give bits_per_weight or max_kl, one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {key: value for key, value in data.items() if value is not None}
