"""Roles: what a linear layer is for, read off its place in the module tree. All of it is data.

A layer's role is decided by the first rule that matches, walking from the layer outwards: the
names on its path first, then the classes of the modules around it. What no rule knows is
`other`: it is kept as it is, and the plan shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum


class Role(StrEnum):
    """What a tensor is for; a recipe chooses by it."""

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


PATH_RULES: Sequence[tuple[re.Pattern[str], Role]] = (
    (
        re.compile(
            r"(^|\.)(vision|visual|audio|image|multi_modal|mm_|projector|perceiver?|talker|code2wav"
            r"|speech|sound|embed_vision|embed_audio|vit\b|sam_model|qformer|resampler)"
            r"|(^|\.)\w*(vision|audio)_?(tower|model|projection|proj|encoder|embed\w*)\b"
        ),
        Role.VISION,
    ),
    (re.compile(r"\.shared_expert_gate$"), Role.ROUTER),
    (re.compile(r"\.experts\.(expert_)?\d+\."), Role.EXPERTS),
    (re.compile(r"\.(shared_experts?|shared_mlp)(\.|$)"), Role.SHARED_EXPERTS),
)
"""Module path → role. Tried first, in this order."""

CLASS_RULES: Sequence[tuple[re.Pattern[str], Role]] = (
    (re.compile(r"Vision|Audio|MultiModal|PatchMerger|Projector|Resampler|Talker"), Role.VISION),
    (
        re.compile(r"Indexer|GateMLP|GatedResidual|PLELayer|HyperConnection|DynamicShort"),
        Role.OTHER,
    ),
    (re.compile(r"Router|(?<!Forget)(?<!Linear)Gate$|Gating$"), Role.ROUTER),
    (re.compile(r"^KimiLinearAttention$"), Role.ATTENTION),  # MLA; the Linear is Kimi Linear's
    (
        re.compile(
            r"Mamba|DeltaNet|DeltaAttention|LinearAttention|LightningAttention|ShortConv|ForgetGate"
        ),
        Role.LINEAR_ATTENTION,
    ),
    (re.compile(r"Attention|Attn|MLA$|Compressor|CCAProjection"), Role.ATTENTION),
    (re.compile(r"MLP|FeedForward|FFN"), Role.MLP),
    (re.compile(r"MoE$|Moe$|SparseMoe|MoeBlock|MoEBlock|DecoderLayer"), Role.OTHER),
)
"""Class name of an enclosing module → role. The innermost class that matches decides."""

TOWER = re.compile(
    r"^(model\.)?(talker|code2wav|visual|(vision|audio)_(tower|model|encoder)|vision_embed\w*)\."
)
"""Module paths of whole towers beside the text model; their experts are not the model's."""

EXPERTS_CLASS = re.compile(r"Expert")
"""Classes whose own parameters are routed experts (unless they are routers or shared)."""


def role_of_linear(path: str, enclosing_classes: Sequence[str]) -> Role:
    """The role of the linear layer at `path`.

    `enclosing_classes`: its own class where that is more than `nn.Linear`, then those of the
    modules around it, from the inside out.
    """
    for pattern, role in PATH_RULES:
        if pattern.search(path):
            return role
    for class_name in enclosing_classes:
        for pattern, role in CLASS_RULES:
            if pattern.search(class_name):
                return role
    return Role.OTHER


MAY_LACK = re.compile(
    r"(inv_freq|freqs_cis|position_ids|num_batches_tracked|masked_bias|rotary_emb\.\w+)$"
)
"""Persistent buffers that older checkpoints do not hold; they follow from the config."""

EMBEDDING_NAME = re.compile(
    r"(^|\.)(wte|wpe|tok_embeddings|(\w+_)?embed(ding)?s?(_(tokens|in|positions|per_layer|table))*)"
    r"(\.\d+)?$"
)
"""Names by which anybody knows an embedding: an engine never builds it as a linear layer."""

MTP_KEY = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*|eagle\w*)(\.|$)")
"""Raw keys of multi-token-prediction layers, by name. Those past the last layer are too."""
