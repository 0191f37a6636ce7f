# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel sizes with which engines can load a quantized model, and why not others.

A rank holds 1/TP of each linear layer: of the rows of most, of the columns (inputs) of those
that close a block (`o_proj`, `down_proj`, …). Rows and columns are cut between blocks of the
format, and the kernels for gated experts need multiples of 64. See docs/checkpoint-layout.md.
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
REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj", "wq_a", "wkv"})
"""Last names of layers that every rank has whole: the ones before MLA's latent vectors."""


def tensor_parallel(
    quantized: Sequence[LinearWeight], schemes: Mapping[str, Scheme], config: Mapping[str, Any]
) -> dict[int, str]:
    """Return why a checkpoint does not load, by tensor-parallel size; an empty string if it does.

    Args:
        quantized: The linear weights that are quantized.
        schemes: Their schemes, by name.
        config: The model's config.json.
    """
    formats = {linear.name: FORMATS[schemes[linear.name].weights] for linear in quantized}
    experts_in = {
        (x.shape[1], max(EXPERT_ALIGNMENT, formats[x.name].block))
        for x in quantized
        if x.projection is Projection.DOWN
    }
    cuts: set[tuple[str, str, int, int]] = set()
    for linear in quantized:
        fmt, leaf = formats[linear.name], linear.name.rpartition(".")[2]
        if linear.expert is None and leaf in ROW_PARALLEL:
            cuts.add((leaf, "input", linear.shape[1], fmt.block))
        elif linear.expert is None and leaf not in REPLICATED and fmt.row_block > 1:
            cuts.add((leaf, "output", linear.shape[0], fmt.row_block))
    heads = _heads(config)
    return {size: next(_obstacles(size, experts_in, cuts, heads), "") for size in SIZES}


def _heads(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    heads = (text if isinstance(text, Mapping) else config).get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def _obstacles(
    size: int,
    experts_in: Iterable[tuple[int, int]],
    cuts: Iterable[tuple[str, str, int, int]],
    heads: int | None,
) -> Iterator[str]:
    if heads is not None and heads % size:
        yield f"{heads} attention heads are not divisible by {size}"
    for width, block in sorted(experts_in):
        if width % (size * block):
            yield f"experts' intermediate size {width} leaves a rank no multiple of {block}"
    for name, side, width, block in sorted(cuts):
        is_whole = side == "output" and size == 1  # the last block may be partial
        if width % (size * block) and not is_whole:
            yield f"{name}'s {side} {width} leaves a rank no multiple of {block}"


def marlin_notes(quantized: Sequence[LinearWeight]) -> Iterator[str]:
    """Yield a note on weights that vLLM and SGLang refuse on GPUs before Blackwell, if any."""
    uneven = [x for x in quantized if any(size % EXPERT_ALIGNMENT for size in x.shape)]
    if uneven:
        yield (
            f"{len(uneven)} weights have a dimension that {EXPERT_ALIGNMENT} does not divide, "
            "which the Marlin kernels (GPUs before Blackwell) refuse: "
            f"{uneven[0].name} {list(uneven[0].shape)}, …"
        )
