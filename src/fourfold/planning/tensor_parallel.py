# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel sizes with which engines can load a quantized model, and why not others.

A rank holds 1/TP of each linear layer: of the rows of most, of the columns (inputs) of those
that close a block (`o_proj`, `down_proj`, …). Columns are cut between blocks of the format, and
the kernels for gated experts need multiples of 64. See docs/checkpoint-layout.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fourfold.formats.base import FORMATS
from fourfold.formats.scheme import Scheme
from fourfold.models.experts import Projection
from fourfold.models.inventory import LinearWeight

SIZES = (1, 2, 4, 8, 16, 32)
EXPERT_ALIGNMENT = 64
ROW_PARALLEL = frozenset({"o_proj", "down_proj", "out_proj", "w2", "wo", "wo_b", "o_b_proj", "fc2"})
"""Last names of layers whose inputs are cut among the ranks."""


def tensor_parallel(
    quantized: Sequence[LinearWeight], schemes: Mapping[str, Scheme], config: Mapping[str, Any]
) -> dict[int, str]:
    """Return why a checkpoint does not load, by tensor-parallel size; an empty string if it does.

    Args:
        quantized: The linear weights that are quantized.
        schemes: Their schemes, by name.
        config: The model's config.json.
    """
    experts_in = {x.shape[1] for x in quantized if x.projection is Projection.DOWN}
    inputs = {
        (x.name.rpartition(".")[2], x.shape[1], FORMATS[schemes[x.name].weights].block)
        for x in quantized
        if x.expert is None and x.name.rpartition(".")[2] in ROW_PARALLEL
    }
    heads = _heads(config)
    return {size: next(_obstacles(size, experts_in, inputs, heads), "") for size in SIZES}


def _heads(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    heads = (text if isinstance(text, Mapping) else config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _obstacles(
    size: int, experts_in: Iterable[int], inputs: Iterable[tuple[str, int, int]], heads: int | None
) -> Iterator[str]:
    if heads is not None and heads % size:
        yield f"{heads} attention heads are not divisible by {size}"
    for width in sorted(experts_in):
        if width % (size * EXPERT_ALIGNMENT):
            yield (
                f"experts' intermediate size {width} leaves a rank no multiple of "
                f"{EXPERT_ALIGNMENT}"
            )
    for name, width, block in sorted(inputs):
        if width % (size * block):
            yield f"{name}'s input {width} leaves a rank no multiple of {block}"


def marlin_notes(quantized: Sequence[LinearWeight]) -> Iterator[str]:
    """Yield a note on weights that vLLM and SGLang refuse on GPUs before Blackwell, if any."""
    uneven = [x for x in quantized if any(size % EXPERT_ALIGNMENT for size in x.shape)]
    if uneven:
        yield (
            f"{len(uneven)} weights have a dimension that {EXPERT_ALIGNMENT} does not divide, "
            "which the Marlin kernels (GPUs before Blackwell) refuse: "
            f"{uneven[0].name} {list(uneven[0].shape)}, …"
        )
