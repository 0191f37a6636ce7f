# SPDX-License-Identifier: Apache-2.0
"""Families whose published checkpoints differ from what transformers would save.

For a model in memory without its checkpoint, transformers reverses its own conversion to find names
and shapes on disk. That is right for all families except those in this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Upstream:
    """The differences between a family's published checkpoints and saved ones."""

    fused: bool = False
    """Experts are fused on disk; transformers would save one tensor for each."""
    transposed: str | None = None
    """Regex of raw keys that are `[E, in, out]` on disk; transformers would save `[E, out, in]`."""
    renames: tuple[tuple[str, str], ...] = ()
    """(regex, replacement) pairs to apply, in order, to the names that transformers would save."""


_QWEN3_5 = Upstream(fused=True)
_QWEN3_VL = Upstream(transposed=r"\.experts\.(gate_up|down)_proj$")

UPSTREAM: Mapping[str, Upstream] = {
    "deepseek_v4": Upstream(
        renames=(
            (r"^model\.", ""),
            (r"^embed_tokens\.", "embed."),
            (r"^hc_head\.hc_", "hc_head_"),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        )
    ),
    "ernie4_5_vl_moe": Upstream(renames=((r"^model\.vision_model\.", "vision_model."),)),
    "hy_v4": Upstream(
        renames=(
            (r"\.hc_pre\.hc_head\.", ".hc_head."),
            (r"\.hc_pre\.(hc_(?:attn|mlp)_layer)\.", r".\1.hc_pre."),
            (r"\.mlp\.(shared_experts\.)?linear_gate\.", r".mlp.\1gate_proj."),
        )
    ),
    "kimi_linear": Upstream(
        renames=((r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.", r".mlp.\1."),)
    ),
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_vl_moe": _QWEN3_VL,
    "qwen3_vl_moe_text": _QWEN3_VL,
}
"""By `model_type`, of the text model and of its wrapper."""


def upstream_of(*model_types: str) -> Upstream:
    """Return the entry of the first of `model_types` in the table, or one without differences."""
    return next((UPSTREAM[name] for name in model_types if name in UPSTREAM), Upstream())
