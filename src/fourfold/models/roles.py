# SPDX-License-Identifier: Apache-2.0
"""The roles of linear layers, read off their places in the module tree. All of it is data.

The first rule that matches decides a layer's role: rules on its path come first, then rules on the
classes of the modules around it, innermost first. A layer that no rule matches has the role
`other`; it is not quantized, and the plan shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from fourfold.models.names import SINGLE_EXPERT


class Role(StrEnum):
    """The purpose of a tensor; recipes select tensors by it."""

    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    MLP = "mlp"
    ATTENTION = "attention"
    LINEAR_ATTENTION = "linear_attention"
    ROUTER = "router"
    LM_HEAD = "lm_head"
    EMBEDDING = "embedding"
    VISION = "vision"
    MTP = "mtp"
    OTHER = "other"


PATH_RULES: Sequence[tuple[str | re.Pattern[str], Role]] = (
    (
        r"(^|\.)(vision|visual|audio|image|multi_modal|mm_|projector|perceiver?|talker|code2wav"
        r"|speech|sound|embed_vision|embed_audio|vit\b|sam_model|qformer|resampler)"
        r"|(^|\.)\w*(vision|audio)_?(tower|model|projection|proj|encoder|embed\w*)\b",
        Role.VISION,
    ),
    (r"\.shared_expert_gate$", Role.ROUTER),
    (SINGLE_EXPERT, Role.EXPERTS),
    (r"\.(shared_experts?|shared_mlp)(\.|$)", Role.SHARED_EXPERTS),
)
"""Module path → role. These are tried first, in this order."""

CLASS_RULES: Sequence[tuple[str, Role]] = (
    (r"Vision|Audio|MultiModal|PatchMerger|Projector|Resampler|Talker", Role.VISION),
    (r"Indexer|GateMLP|GatedResidual|PLELayer|HyperConnection|DynamicShort", Role.OTHER),
    (r"Router|(?<!Forget)(?<!Linear)Gate$|Gating$", Role.ROUTER),
    (r"^KimiLinearAttention$", Role.ATTENTION),  # MLA; the Linear is Kimi Linear's
    (
        r"Mamba|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|ShortConv|ForgetGate",
        Role.LINEAR_ATTENTION,
    ),
    (r"Attention|Attn|MLA$|Compressor|CCAProjection", Role.ATTENTION),
    (r"MLP|FeedForward|FFN", Role.MLP),
    (r"MoE$|Moe$|SparseMoe|MoeBlock|MoEBlock|DecoderLayer", Role.OTHER),
)
"""Class name of an enclosing module → role. The innermost class that matches decides."""

TOWER = re.compile(
    r"^(model\.)?(talker|code2wav|visual|(vision|audio)_(tower|model|encoder)|vision_embed\w*)\."
)
"""Module paths of whole towers beside the text model; their experts are not the model's."""

EXPERTS_CLASS = re.compile(r"Expert")
"""Classes whose own parameters are routed experts (unless they are routers or shared)."""


def role_of_linear(path: str, enclosing_classes: Sequence[str]) -> Role:
    """Return the role of the linear layer at `path` in the module tree.

    `enclosing_classes` are the names of its own class if that is a subclass of `nn.Linear`, then
    of the modules around it, innermost first.
    """
    for pattern, role in PATH_RULES:
        if re.search(pattern, path):
            return role
    for class_name in enclosing_classes:
        for pattern, role in CLASS_RULES:
            if re.search(pattern, class_name):
                return role
    return Role.OTHER


MAY_LACK = re.compile(
    r"(inv_freq|freqs_cis|position_ids|num_batches_tracked|masked_bias|rotary_emb\.\w+)$"
)
"""Persistent buffers that older checkpoints lack, because they follow from the config."""

EMBEDDING_NAME = re.compile(
    r"(^|\.)(wte|wpe|tok_embeddings|(\w+_)?embed(ding)?s?(_(tokens|in|positions|per_layer|table))*)"
    r"(\.\d+)?$"
)
"""Usual names of embeddings, which engines never build as linear layers."""

MTP_KEY = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*|eagle\w*)(\.|$)")
"""Names of multi-token-prediction layers. Layers past the last decoder layer are MTP, too."""
