# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face configuration made from a checkpoint's training arguments, if they suffice.

Arguments say how a model computes, not which family it is of. The configuration is that of a family
which computes the same: Qwen3 (queries and keys are normalized), Qwen3-MoE (they are, and there are
experts) or Mixtral (they are not, and there are experts). An argument that asks for anything else,
or that is missing, is named in an error. Tokenizer and special tokens are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import UsageError
from fourfold.sources.megatron.arguments import Arguments
from fourfold.storage.safetensors_header import shown

REMEDY = "Give the folder with the model's Hugging Face configuration and tokenizer: `hf_config`."

REQUIRED: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
"""Arguments that must be there, and their values for each of these families."""

SIZES: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of a configuration → arguments that are positive integers."""

NUMBERS: Mapping[str, str] = {"rms_norm_eps": "norm_epsilon", "rope_theta": "rotary_base"}
"""Fields of a configuration → arguments that are positive numbers."""

SAME: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_cache": True,
    "sliding_window": None,
    # Not in the arguments; without these fields, transformers' classes would take defaults.
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Fields that are the same for each of these families."""

DTYPES = {"F16": "float16", "F32": "float32"}


def configuration_of(arguments: Arguments, dtype: str) -> dict[str, Any]:
    """Make the configuration of a model with weights in `dtype`, as safetensors names it.

    Raises:
        UsageError: An argument is missing, or asks for what none of these families computes.
    """
    if arguments.values is None:
        raise UsageError(
            f"{arguments.file.parent}: a Megatron checkpoint without training arguments: nothing "
            f"says how its model computes. {REMEDY}"
        )
    reader = _Reader(arguments.file, arguments.values)
    for name, value in REQUIRED.items():
        if reader.present(name) != value:
            raise reader.refused(name)
    for name in arguments.not_plain():
        raise reader.refused(name)
    heads = "num_query_groups" if reader.flag("group_query_attention") else "num_attention_heads"
    common = {
        **{field: reader.size(name) for field, name in SIZES.items()},
        **{field: reader.number(name) for field, name in NUMBERS.items()},
        **SAME,
        "num_key_value_heads": reader.size(heads),
        # With the padding: the argument `vocab_size` leaves out some tokenizers' end-of-text token.
        "vocab_size": reader.size("padded_vocab_size"),
        "tie_word_embeddings": not reader.flag("untie_embeddings_and_output_weights"),
        "dtype": DTYPES.get(dtype, "bfloat16"),
    }
    if not reader.flag("qk_layernorm", default=False):
        return common | _mixtral(reader)
    return common | (_qwen3_moe(reader) if reader.get("num_experts") else _qwen3(reader))


def _qwen3(reader: _Reader) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": reader.size("ffn_hidden_size"),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3_moe(reader: _Reader) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": reader.size("ffn_hidden_size"),
        "moe_intermediate_size": reader.expert_size(),
        "num_experts": reader.size("num_experts"),
        "num_experts_per_tok": reader.size("moe_router_topk"),
        "norm_topk_prob": not reader.flag("moe_router_pre_softmax", default=False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": reader.dense_layers(),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _mixtral(reader: _Reader) -> dict[str, Any]:
    if not reader.get("num_experts"):
        raise reader.refused("qk_layernorm")
    if reader.flag("moe_router_pre_softmax", default=False):
        raise reader.refused("moe_router_pre_softmax")
    if reader.dense_layers():
        raise reader.refused("moe_layer_freq")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": reader.expert_size(),
        "num_local_experts": reader.size("num_experts"),
        "num_experts_per_tok": reader.size("moe_router_topk"),
    }


class _Reader:
    """Reads arguments, each of which must be there and make sense."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self._file, self.get = file, values.get

    def refused(self, name: str) -> UsageError:
        return UsageError(
            f"{self._file}: {name} is {shown(self.get(name))}, and no configuration can "
            f"be made of these arguments alone: it would be Qwen3's, Qwen3-MoE's or Mixtral's. "
            f"{REMEDY}"
        )

    def present(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise UsageError(f"{self._file}: its arguments do not say {name}. {REMEDY}")
        return value

    def number(self, name: str) -> int | float:
        value = self.present(name)
        if isinstance(value, int | float) and value is not True and value > 0:
            return value
        raise self.refused(name)

    def size(self, name: str) -> int:
        value = self.number(name)
        if not isinstance(value, int):
            raise self.refused(name)
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A boolean. default: its value if an older version of Megatron did not have it."""
        if default is not None and self.get(name) is None:
            return default
        if not isinstance(value := self.present(name), bool):
            raise self.refused(name)
        return value

    def expert_size(self) -> int:
        is_own = self.get("moe_ffn_hidden_size") is not None
        return self.size("moe_ffn_hidden_size" if is_own else "ffn_hidden_size")

    def dense_layers(self) -> list[int]:
        """The layers without experts: every N-th layer has experts, or a list says which do."""
        frequency = self.get("moe_layer_freq")
        if not isinstance(frequency, list):
            step = 1 if frequency is None else self.size("moe_layer_freq")
            frequency = [layer % step == 0 for layer in range(self.size("num_layers"))]
        return [layer for layer, has_experts in enumerate(frequency) if not has_experts]
