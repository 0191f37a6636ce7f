# SPDX-License-Identifier: Apache-2.0
"""The rules of each family: which Hugging Face tensors its Megatron parameters become.

All of it is data. Names follow published checkpoints, so a converted model lies on disk as the
published model does. docs/megatron.md says how each family was verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fourfold.errors import SourceError
from fourfold.sources.megatron.rules import Rule, RuleBook, Section, Transform

_W = r"\.weight"
_ANY = r"\.(?P<kind>weight|bias)"


def rename(pattern: str, target: str) -> Rule:
    """A whole parameter under another name."""
    return Rule(pattern, Transform.RENAME, (target,))


def part(pattern: str, target: str, number: int, parts: int) -> Rule:
    """One of `parts` that follow each other in `target`."""
    return Rule(pattern, Transform.PART, (target,), number, parts)


NORMS = (
    rename(r"(?:input_layernorm\.weight|self_attention\.linear_qkv\.layer_norm_weight)",
           "input_layernorm.weight"),
    rename(r"(?:pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight)",
           "post_attention_layernorm.weight"),
)  # fmt: skip

_QKV_TARGETS = tuple(f"self_attn.{x}_proj.{{kind}}" for x in "qkv")

ATTENTION = (
    Rule(rf"self_attention\.linear_qkv{_ANY}", Transform.QKV, _QKV_TARGETS),
    rename(rf"self_attention\.linear_proj{_ANY}", "self_attn.o_proj.{kind}"),
)
GATED_ATTENTION = (
    Rule(rf"self_attention\.linear_qkv{_ANY}", Transform.GATED_QKV, _QKV_TARGETS),
    *ATTENTION[1:],
)
QK_NORMS = (
    rename(rf"self_attention\.q_layernorm{_W}", "self_attn.q_norm.weight"),
    rename(rf"self_attention\.k_layernorm{_W}", "self_attn.k_norm.weight"),
)
LATENT_ATTENTION = (
    rename(rf"self_attention\.linear_q_proj{_W}", "self_attn.q_proj.weight"),
    rename(rf"self_attention\.linear_q_down_proj{_W}", "self_attn.q_a_proj.weight"),
    rename(rf"self_attention\.linear_q_up_proj{_W}", "self_attn.q_b_proj.weight"),
    rename(rf"self_attention\.linear_kv_down_proj{_W}", "self_attn.kv_a_proj_with_mqa.weight"),
    rename(rf"self_attention\.linear_kv_up_proj{_W}", "self_attn.kv_b_proj.weight"),
    rename(r"self_attention\.(?:q_layernorm\.weight|linear_q_up_proj\.layer_norm_weight)",
           "self_attn.q_a_layernorm.weight"),
    rename(r"self_attention\.(?:kv_layernorm\.weight|linear_kv_up_proj\.layer_norm_weight)",
           "self_attn.kv_a_layernorm.weight"),
    rename(rf"self_attention\.linear_proj{_W}", "self_attn.o_proj.weight"),
)  # fmt: skip

_DELTA = r"self_attention\."
DELTA_NET = (
    rename(rf"{_DELTA}in_proj\.layer_norm_weight", "input_layernorm.weight"),
    *(
        part(rf"{_DELTA}in_proj\.weight\.{name}", "linear_attn.in_proj_qkv.weight", number, 3)
        for number, name in enumerate(("query", "key", "value"))
    ),
    rename(rf"{_DELTA}in_proj\.weight\.z", "linear_attn.in_proj_z.weight"),
    rename(rf"{_DELTA}in_proj\.weight\.beta", "linear_attn.in_proj_b.weight"),
    rename(rf"{_DELTA}in_proj\.weight\.alpha", "linear_attn.in_proj_a.weight"),
    *(
        part(rf"{_DELTA}conv1d\.(?P<kind>weight|bias)\.{name}",
             "linear_attn.conv1d.{kind}", number, 3)
        for number, name in enumerate(("query", "key", "value"))
    ),
    rename(rf"{_DELTA}(?P<name>A_log|dt_bias)", "linear_attn.{name}"),
    Rule(rf"{_DELTA}out_norm{_W}", Transform.PLUS_ONE, ("linear_attn.norm.weight",)),
    rename(rf"{_DELTA}out_proj{_W}", "linear_attn.out_proj.weight"),
)  # fmt: skip


def gated_mlp(where: str, to: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """A gated MLP; `names` are the names of gate, up and down."""
    gate, up, down = (f"{to}.{name}.weight" for name in names)
    return (
        Rule(rf"{where}\.linear_fc1{_W}", Transform.GATE_UP, (gate, up)),
        rename(rf"{where}\.linear_fc1\.weight_w", gate),
        rename(rf"{where}\.linear_fc1\.weight_v", up),
        rename(rf"{where}\.linear_fc2{_W}", down),
    )


_LLAMA = ("gate_proj", "up_proj", "down_proj")
_E = r"mlp\.experts\.(?P<e>[0-9]+)"

DENSE = gated_mlp("mlp", "mlp", _LLAMA)
EXPERTS = gated_mlp(_E, "mlp.experts.{e}", _LLAMA)
EXPERTS_MIXTRAL = gated_mlp(_E, "block_sparse_moe.experts.{e}", ("w1", "w3", "w2"))


def stacked_experts(transform: Transform) -> tuple[Rule, ...]:
    """Experts that share a tensor."""
    fc1, fc2 = ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",)
    return (
        Rule(rf"{_E}\.linear_fc1{_W}", transform, fc1),
        Rule(rf"{_E}\.linear_fc1\.weight_w", transform, fc1, 0, 2),
        Rule(rf"{_E}\.linear_fc1\.weight_v", transform, fc1, 1, 2),
        Rule(rf"{_E}\.linear_fc2{_W}", transform, fc2),
    )


ROUTER = (rename(rf"mlp\.router{_W}", "mlp.gate.weight"),)
ROUTER_BIAS = (rename(r"mlp\.router\.expert_bias", "mlp.gate.e_score_correction_bias"),)
ROUTER_MIXTRAL = (rename(rf"mlp\.router{_W}", "block_sparse_moe.gate.weight"),)
SHARED_EXPERT = (
    *gated_mlp(r"mlp\.shared_experts", "mlp.shared_expert", _LLAMA),
    rename(r"mlp\.shared_experts\.gate_weight", "mlp.shared_expert_gate.weight"),
)
SHARED_EXPERTS = gated_mlp(r"mlp\.shared_experts", "mlp.shared_experts", _LLAMA)


# A layer of Nemotron-H has one mixer: Mamba, attention, an MLP or experts; none has a gate.

HYBRID_NORM = rename(
    r"(?:(?:norm|input_layernorm|pre_mlp_layernorm)\.weight"
    r"|(?:mixer\.in_proj|self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight)",
    "norm.weight",
)
MAMBA = (
    *(
        part(rf"mixer\.in_proj{_W}\.{name}", "mixer.in_proj.weight", number, 5)
        for number, name in enumerate(("z", "x", "B", "C", "dt"))
    ),
    *(
        part(rf"mixer\.conv1d{_ANY}\.{name}", "mixer.conv1d.{kind}", number, 3)
        for number, name in enumerate(("x", "B", "C"))
    ),
    rename(r"mixer\.(?P<name>A_log|D|dt_bias)", "mixer.{name}"),
    rename(r"mixer\.(?P<name>norm|out_proj)\.weight", "mixer.{name}.weight"),
)
HYBRID_ATTENTION = (
    Rule(rf"self_attention\.linear_qkv{_ANY}", Transform.QKV,
         tuple(f"mixer.{x}_proj.{{kind}}" for x in "qkv")),
    rename(rf"self_attention\.linear_proj{_ANY}", "mixer.o_proj.{kind}"),
)  # fmt: skip


def plain_mlp(where: str, to: str) -> tuple[Rule, ...]:
    """An MLP without a gate."""
    return (
        rename(rf"{where}\.linear_fc1{_ANY}", f"{to}.up_proj.{{kind}}"),
        rename(rf"{where}\.linear_fc2{_ANY}", f"{to}.down_proj.{{kind}}"),
    )


HYBRID_EXPERTS = (
    rename(rf"mlp\.router{_W}", "mixer.gate.weight"),
    rename(r"mlp\.router\.expert_bias", "mixer.gate.e_score_correction_bias"),
    rename(rf"mlp\.(?P<name>fc[12]_latent_proj){_ANY}", "mixer.{name}.{kind}"),
    *plain_mlp(_E, "mixer.experts.{e}"),
    *plain_mlp(r"mlp\.shared_experts", "mixer.shared_experts"),
)


def outside_layers(
    model: str,
    *,
    language: str = "",
    copies: str = "",
    embedding: str = "embed_tokens",
    norm: str = "norm",
) -> Section:
    """The tensors outside of the layers.

    Args:
        model: The prefix of their Hugging Face names.
        language: The prefix of Megatron's names.
        copies: The prefix of each MTP layer, if it has an embedding and a head of its own.
        embedding: The Hugging Face name of the embedding.
        norm: That of the last norm.
    """
    twice = (f"{copies}embed_tokens.weight", f"{copies}shared_head.head.weight") if copies else ()
    vocabulary = Transform.VOCABULARY
    return Section(language, "", (
        Rule(rf"embedding\.word_embeddings{_W}", vocabulary, (f"{model}{embedding}.weight",),
             copies=twice[:1]),
        Rule(rf"output_layer{_W}", vocabulary, ("lm_head.weight",), copies=twice[1:]),
        rename(rf"decoder\.final_(?:layer)?norm{_W}", f"{model}{norm}.weight"),
    ))  # fmt: skip


def layers(prefix: str, rules: Iterable[Rule], *, language: str = "") -> Section:
    """The decoder layers, under `prefix`."""
    pattern = rf"{language}decoder\.layers\.(?P<l>[0-9]+)\."
    return Section(pattern, f"{prefix}layers.{{l}}.", tuple(rules))


_MTP = r"mtp\.layers\.(?P<l>[0-9]+)\."
_MTP_BODY = _MTP + r"(?:transformer_layer|mtp_model_layer)\."

MTP_QWEN = (
    rename(rf"enorm{_W}", "mtp.pre_fc_norm_embedding.weight"),
    rename(rf"hnorm{_W}", "mtp.pre_fc_norm_hidden.weight"),
    rename(rf"eh_proj{_W}", "mtp.fc.weight"),
    rename(rf"final_layernorm{_W}", "mtp.norm.weight"),
)
MTP_DEEPSEEK = (
    *(rename(rf"{name}{_W}", f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj")),
    rename(rf"final_layernorm{_W}", "shared_head.norm.weight"),
)

_QWEN3 = (*NORMS, *ATTENTION, *QK_NORMS, *DENSE)
_QWEN3_MOE = (*_QWEN3, *ROUTER, *EXPERTS)
_QWEN3_5 = (
    *NORMS, *GATED_ATTENTION, *QK_NORMS, *DELTA_NET, *DENSE, *ROUTER,
    *stacked_experts(Transform.STACK), *SHARED_EXPERT,
)  # fmt: skip
_QWEN3_VL = (*_QWEN3, *ROUTER, *stacked_experts(Transform.TRANSPOSED))
_MIXTRAL = (*NORMS, *ATTENTION, *ROUTER_MIXTRAL, *EXPERTS_MIXTRAL)
_DEEPSEEK = (
    *NORMS, *LATENT_ATTENTION, *DENSE, *ROUTER, *ROUTER_BIAS, *EXPERTS, *SHARED_EXPERTS,
)  # fmt: skip
_NEMOTRON_H = (
    HYBRID_NORM, *MAMBA, *HYBRID_ATTENTION, *plain_mlp("mlp", "mixer"), *HYBRID_EXPERTS,
)  # fmt: skip


def _mtp_qwen(language: str = "") -> tuple[Section, ...]:
    return (
        Section(language + _MTP_BODY, "mtp.layers.{l}.", _QWEN3_5),
        Section(language + _MTP.replace("(?P<l>[0-9]+)", "0"), "", MTP_QWEN),
    )


_VL = r"(?:language_model\.)?"
_VISION = Section(r"(?:vision_model|visual)\.", "model.visual.", (rename(r"(?P<all>.+)", "{all}"),))

FAMILIES: Mapping[str, RuleBook] = {
    "qwen3": RuleBook((outside_layers("model."), layers("model.", _QWEN3))),
    "qwen3_moe": RuleBook((outside_layers("model."), layers("model.", _QWEN3_MOE))),
    "qwen3_5_moe_text": RuleBook(
        (outside_layers("model."), layers("model.", _QWEN3_5), *_mtp_qwen()),
        zero_centered_norms=True,
    ),
    "qwen3_5_moe": RuleBook(
        (
            outside_layers("model.language_model.", language=_VL),
            layers("model.language_model.", _QWEN3_5, language=_VL),
            *_mtp_qwen(_VL),
            _VISION,
        ),
        zero_centered_norms=True,
        vision="model.visual.",
    ),
    "qwen3_vl_moe": RuleBook(
        (
            outside_layers("model.language_model.", language=_VL),
            layers("model.language_model.", _QWEN3_VL, language=_VL),
            _VISION,
        ),
        vision="model.visual.",
    ),
    "mixtral": RuleBook((outside_layers("model."), layers("model.", _MIXTRAL))),
    "deepseek_v3": RuleBook(
        (
            outside_layers("model.", copies="model.layers.{mtp}."),
            layers("model.", _DEEPSEEK),
            Section(_MTP_BODY, "model.layers.{l}.", _DEEPSEEK, after_layers=True),
            Section(_MTP, "model.layers.{l}.", MTP_DEEPSEEK, after_layers=True),
        ),
    ),
    "nemotron_h": RuleBook(
        (
            outside_layers("backbone.", embedding="embeddings", norm="norm_f"),
            layers("backbone.", _NEMOTRON_H),
        ),
    ),
}
"""By the `model_type` of the Hugging Face configuration."""


def rules_for(model_type: object) -> RuleBook:
    """Return the rules of a family; raise `SourceError` if there are none."""
    book = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if book is None:
        raise SourceError(
            f"{model_type}: no rules for Megatron models of this family, only for "
            f"{', '.join(FAMILIES)}. Is `hf_config` the right one?"
        )
    return book
