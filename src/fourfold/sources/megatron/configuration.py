"""A Hugging Face configuration made of the arguments that a checkpoint keeps, where they suffice.

Arguments say how a model computes, not whose it is. So it becomes one of a family that computes
just that: Qwen3 (queries and keys are normalized), Qwen3-MoE (so they are, and there are experts),
Mixtral (they are not, and there are experts). What these do not do, and what is not said, is an
error that names the argument. Tokenizer and special tokens are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.errors import UsageError
from fourfold.sources.megatron.arguments import OFF, UNLESS_SAID, Arguments
from fourfold.storage.safetensors_header import shown

GIVE = "Give the folder with the model's Hugging Face configuration and tokenizer: --hf-config DIR."

SAID: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
"""How all of these families compute, which arguments must say."""

SIZES: Mapping[str, str] = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of a configuration → the arguments that say them: whole numbers."""

NUMBERS: Mapping[str, str] = {"rms_norm_eps": "norm_epsilon", "rope_theta": "rotary_base"}
"""The like, of any number."""

SAME: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_cache": True,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Fields that are the same for all of them. The tokens' numbers are nowhere said, and classes of
transformers have some of their own where a configuration has none."""

LIMIT, MOST_LAYERS = 1 << 40, 10**6
"""No number of these is as large."""

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def configuration_of(arguments: Arguments, dtype: str) -> dict[str, Any]:
    """The configuration of a model whose weights are of a dtype, as safetensors names it.

    Raises `UsageError` where the arguments do not say enough, or something that none of these
    families does.
    """
    said = _Said(arguments)
    said.check()
    experts = said.size("num_experts") if said.get("num_experts") else 0
    normalized = said.switch("qk_layernorm")
    if not (experts or normalized):
        raise said.refused("qk_layernorm", said.get("qk_layernorm"))
    common = {
        **{field: said.size(name) for field, name in SIZES.items()},
        **{field: said.number(name) for field, name in NUMBERS.items()},
        **SAME,
        "num_key_value_heads": said.key_heads(),
        "vocab_size": said.vocabulary(),
        "tie_word_embeddings": not said.flag("untie_embeddings_and_output_weights"),
        "dtype": DTYPES.get(dtype, "bfloat16"),
    }
    if not experts:
        return common | _qwen3(said)
    return common | (_qwen3_moe(said, experts) if normalized else _mixtral(said, experts))


def _qwen3(said: _Said) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": said.size("ffn_hidden_size"),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3_moe(said: _Said, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": said.size("ffn_hidden_size"),
        "moe_intermediate_size": said.expert_size(),
        "num_experts": experts,
        "num_experts_per_tok": said.experts_of_token(experts),
        "norm_topk_prob": not said.switch("moe_router_pre_softmax"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": said.dense_layers(),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _mixtral(said: _Said, experts: int) -> dict[str, Any]:
    if said.switch("moe_router_pre_softmax"):
        raise said.refused("moe_router_pre_softmax", True)
    if said.dense_layers():
        raise said.refused("moe_layer_freq", said.get("moe_layer_freq"))
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": said.expert_size(),
        "num_local_experts": experts,
        "num_experts_per_tok": said.experts_of_token(experts),
    }


class _Said:
    """What arguments say, each looked at before it is believed."""

    def __init__(self, arguments: Arguments) -> None:
        if arguments.values is None:
            raise UsageError(
                f"{arguments.file.parent}: a Megatron checkpoint that keeps no training arguments, "
                f"so that nothing says how its model computes. {GIVE}"
            )
        self.file, self._values = arguments.file, arguments.values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def check(self) -> None:
        """Raise `UsageError` for a model that computes otherwise than these families."""
        for name, wanted in SAID.items():
            if self.get(name) is None:
                raise self.missing(name)
            if self.get(name) != wanted:
                raise self.refused(name, self.get(name))
        for name, allowed in UNLESS_SAID.items():
            if self.get(name) is not None and self.get(name) not in allowed:
                raise self.refused(name, self.get(name))
        for name in OFF:
            if self.get(name):
                raise self.refused(name, self.get(name))

    def missing(self, name: str) -> UsageError:
        return UsageError(f"{self.file}: its arguments do not say {name}. {GIVE}")

    def refused(self, name: str, value: Any) -> UsageError:
        return UsageError(
            f"{self.file}: {name} is {shown(value)}, and no configuration can be made of these "
            f"arguments alone: it would be Qwen3's, Qwen3-MoE's or Mixtral's. {GIVE}"
        )

    def number(self, name: str) -> int | float:
        """A number above zero."""
        value = self.get(name)
        if value is None:
            raise self.missing(name)
        if isinstance(value, int | float) and value is not True and 0 < value < LIMIT:
            return value
        raise self.refused(name, value)

    def size(self, name: str) -> int:
        """A whole number above zero."""
        value = self.number(name)
        if not isinstance(value, int):
            raise self.refused(name, value)
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.missing(name)
        return value

    def switch(self, name: str) -> bool:
        """Whether something is on; off where an older Megatron did not have it."""
        value = self.get(name)
        if not isinstance(value, bool | None):
            raise self.refused(name, value)
        return value is True

    def experts_of_token(self, experts: int) -> int:
        if self.size("moe_router_topk") > experts:
            raise self.refused("moe_router_topk", self.get("moe_router_topk"))
        return self.size("moe_router_topk")

    def key_heads(self) -> int:
        grouped = self.flag("group_query_attention")
        return self.size("num_query_groups" if grouped else "num_attention_heads")

    def vocabulary(self) -> int:
        """With the padding: which of its rows are tokens is not certain from `vocab_size`, which
        leaves out the end of a text for some tokenizers."""
        return self.size("padded_vocab_size")

    def expert_size(self) -> int:
        own = self.get("moe_ffn_hidden_size")
        return self.size("ffn_hidden_size" if own is None else "moe_ffn_hidden_size")

    def dense_layers(self) -> list[int]:
        """The layers without experts: every N-th has some, or a list says which."""
        if self.size("num_layers") >= MOST_LAYERS:
            raise self.refused("num_layers", self.get("num_layers"))
        layers = range(self.size("num_layers"))
        every = self.get("moe_layer_freq")
        if isinstance(every, list):
            if len(every) != len(layers) or not all(has in (0, 1) for has in every):
                raise self.refused("moe_layer_freq", every)
            return [layer for layer in layers if not every[layer]]
        step = 1 if every is None else self.size("moe_layer_freq")
        return [layer for layer in layers if layer % step]
