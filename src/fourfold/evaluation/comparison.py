# SPDX-License-Identifier: Apache-2.0
"""Measure the effect of quantization on a model's predictions.

    KL    mean over positions of Σ_v P_ref(v) · ln(P_ref(v) / P_q(v)), in nats
    top-1 share of positions where both models rank the same token first
    bits  mean of −log₂ P(next token)

Shapes: T tokens, W window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fourfold.errors import UsageError


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside its reference, on the same text."""

    kl: float
    """Mean KL(P_ref ‖ P_q), nats per token."""
    top1_agreement: float
    """Share of positions, 0 to 1."""
    reference_bits: float
    """Bits per token of the reference."""
    quantized_bits: float
    """Bits per token of the quantized model."""
    positions: int
    """Number of positions that KL and agreement are means of."""


def compare(
    reference: PreTrainedModel, quantized: PreTrainedModel, token_ids: Tensor, window: int
) -> Comparison:
    """Measure two models on the same text.

    Args:
        reference: The model before quantization.
        quantized: The model after it.
        token_ids: The text, [T].
        window: Tokens that pass the models together. Windows do not overlap, and a remainder
            that fills no window is left out.

    Raises:
        UsageError: If the text fills no window.
    """
    count = len(token_ids) // window if window > 1 else 0
    if count == 0:
        raise UsageError(
            f"{len(token_ids)} tokens in windows of {window}: nothing to compare. "
            "Give a longer text, or a window of at least 2 tokens that fits into it."
        )
    kl = agreed = reference_nats = quantized_nats = 0.0
    for tokens_W in token_ids[: count * window].view(count, window):
        logp_WV, logq_WV = _log_probs(reference, tokens_W), _log_probs(quantized, tokens_W)
        kl += float((logp_WV.exp() * (logp_WV - logq_WV)).sum())
        agreed += int((logp_WV.argmax(-1) == logq_WV.argmax(-1)).sum())
        reference_nats += float(F.nll_loss(logp_WV[:-1], tokens_W[1:], reduction="sum"))
        quantized_nats += float(F.nll_loss(logq_WV[:-1], tokens_W[1:], reduction="sum"))
    positions = count * window
    predicted_bits = count * (window - 1) * math.log(2)
    return Comparison(
        kl=kl / positions,
        top1_agreement=agreed / positions,
        reference_bits=reference_nats / predicted_bits,
        quantized_bits=quantized_nats / predicted_bits,
        positions=positions,
    )


@torch.no_grad()
def _log_probs(model: PreTrainedModel, tokens_W: Tensor) -> Tensor:
    """ln P(next token) at each position: [W, V], fp32."""
    logits_WV = model(input_ids=tokens_W[None], use_cache=False).logits[0]
    return F.log_softmax(logits_WV.float(), dim=-1)
