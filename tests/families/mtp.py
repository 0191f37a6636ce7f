# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction tensors, which the module tree has no place for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .layouts import Tensors


def deepseek(known: Tensors, config: PreTrainedConfig, seed: int) -> Tensors:
    """One more decoder layer after the last one, and what ties it to the model.

    `model.layers.{L}.` with `eh_proj [H, 2H]`, `enorm`, `hnorm`, `embed_tokens` and `shared_head`
    beside a decoder layer's own weights, experts included.
    """
    noise = _Noise(seed)
    last, here = f"model.layers.{config.num_hidden_layers - 1}.", _mtp_layer(config)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    return {
        **{key.replace(last, here): noise.like(t) for key, t in known.items() if last in key},
        f"{here}embed_tokens.weight": noise(vocabulary, hidden),
        f"{here}enorm.weight": noise(hidden),
        f"{here}hnorm.weight": noise(hidden),
        f"{here}eh_proj.weight": noise(hidden, 2 * hidden),
        f"{here}shared_head.norm.weight": noise(hidden),
        f"{here}shared_head.head.weight": noise(vocabulary, hidden),
    }


def _mtp_layer(config: PreTrainedConfig) -> str:
    return f"model.layers.{config.num_hidden_layers}."


def qwen(known: Tensors, config: PreTrainedConfig, seed: int) -> Tensors:
    """Qwen3-Next and Qwen3.5: `mtp.`, one full-attention decoder layer with experts."""
    noise = _Noise(seed)
    text = config.get_text_config()
    hidden = text.hidden_size
    last = f".layers.{text.num_hidden_layers - 1}."
    layer = {
        key.split(last)[1]: t for key, t in known.items() if last in key and "visual" not in key
    }
    return {
        **{f"mtp.layers.0.{rest}": noise.like(t) for rest, t in layer.items()},
        "mtp.fc.weight": noise(hidden, 2 * hidden),
        "mtp.norm.weight": noise(hidden),
        "mtp.pre_fc_norm_embedding.weight": noise(hidden),
        "mtp.pre_fc_norm_hidden.weight": noise(hidden),
    }


class _Noise:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        noise = scale * torch.randn(shape, generator=self.generator)
        return noise.bfloat16().to(dtype)

    def like(self, tensor: Tensor) -> Tensor:
        return self(*tensor.shape, dtype=tensor.dtype)
