# SPDX-License-Identifier: Apache-2.0
"""The training arguments in `common.pt`, which say how weights must be read.

Shapes do not tell whether gate and up are interleaved, or whether norms keep w − 1. The arguments
do, in checkpoints that have them. They are also compared with the Hugging Face configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.megatron.computation import HYBRID, differences
from fourfold.sources.megatron.rules import RuleBook
from fourfold.sources.megatron.safe_pickle import Stored, read_pickle
from fourfold.sources.megatron.sizes import WRONG_CONFIG, Sizes, text_config
from fourfold.sources.megatron.torch_archive import read_archive
from fourfold.storage.fingerprints import Stamps, opened, read_error
from fourfold.storage.safetensors_header import shown

COMMON = "common.pt"
NUMBER = (int, float)
ROUTING = "moe_router_load_balancing_type"
LATENT_SIZE = "moe_latent_size"

REFUSED: Mapping[str, str] = {
    "moe_mlp_glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "moe_shared_expert_glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "moe_single_grouped_weight": "all experts are packed in one weight, which no rule takes apart",
    "rotary_interleaved": "rotary embeddings pair neighbours, which no rule undoes",
    "glu_linear_offset": "up is offset before it is multiplied, which these families do not do",
    "activation_func_clamp_value": "activations are clamped, which these families do not do",
    "moe_apply_probs_on_input": "experts' inputs are weighted, which these families do not do",
    LATENT_SIZE: "experts work in a smaller latent space, which these families do not have",
    "apply_residual_connection_post_layernorm": "its residuals are not those of these families",
    "enable_mhc_connections": "its residuals are not those of these families",
    "use_mup": "its outputs are scaled by width, which these families do not do",
    "heterogeneous_layers_config_path": "its layers differ from each other in size",
    ROUTING: "its router is not that of these families",
}
"""Arguments that change the meaning of weights if they are set (`ROUTING`: to "sinkhorn") → why
they are not supported."""

DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (1,),
    "rope_type": ("rope",),
    "softmax_type": ("vanilla",),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
}
"""The values that these arguments have for plain families. An argument may be missing: older
versions of Megatron had no other way."""

OFF = (
    "add_qkv_bias", "apply_layernorm_1p", "attention_output_gate", "enable_hyper_connections",
    "enable_mhc_connections", "experimental_attention_variant", "hybrid_layer_pattern",
    "hybrid_override_pattern", "is_hybrid_model", "linear_attention_freq",
    "moe_n_hash_layers", "moe_router_enable_expert_bias", "moe_router_force_biased",
    "moe_router_force_load_balancing", "moe_router_group_topk", "moe_router_num_groups",
    "moe_router_topk_limited_devices", "moe_shared_expert_intermediate_size", "mrope_section",
    "mtp_num_layers", "multi_latent_attention", "no_rope_freq", "openai_gelu", "qk_l2_norm",
    "quick_geglu", "rotary_base_per_layer", "softmax_scale", "spec", "squared_relu", "use_mup",
    "use_rope_scaling", "window_size",
)  # fmt: skip
"""Arguments that are absent, None, False or 0 for models of plain families."""

PLAIN = ("qwen3", "qwen3_moe", "mixtral")
"""Families that compute nothing beyond `DEFAULTS`."""

CONFIGURED = ("spec", "use_rope_scaling", "window_size")
"""Arguments that a Hugging Face configuration may express in its own way."""

SUMS_TO_ONE = ("mixtral", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe")
"""Families whose routers always make the weights of a token's experts sum to one."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of the training run; `values` is None if the checkpoint has none."""

    file: Path
    values: Mapping[str, Any] | None

    @property
    def note(self) -> str | None:
        """A note for a checkpoint without arguments."""
        if self.values is not None:
            return None
        return (
            f"{self.file.parent}: has no training arguments, which would tell interleaved gates and"
            " norms kept as w − 1 from others; they are assumed to be as the family of `hf_config` "
            "has them"
        )

    def check(self, book: RuleBook, sizes: Sizes, config: Mapping[str, Any], file: Path) -> None:
        """Compare the arguments with the Hugging Face configuration, read from `file`.

        Raises:
            SourceError: The weights have a layout that is not supported, or `config` is another
                model's.
        """
        values = self.values
        if values is None:
            return
        for name, reason in REFUSED.items():
            value = values.get(name)
            if name == LATENT_SIZE and config.get("model_type") in HYBRID:
                continue  # compared with the configuration
            if value == "sinkhorn" or (name != ROUTING and value not in (None, False, 0)):
                raise SourceError(
                    f"{self.file}: {name} is {shown(value)}: {reason}. "
                    "Only models without it can be read."
                )
        centered = values.get("apply_layernorm_1p", values.get("layernorm_zero_centered_gamma"))
        if isinstance(centered, bool) and centered is not book.zero_centered_norms:
            raise SourceError(
                f"{self.file}: norms are kept as {'w − 1' if centered else 'w'} "
                f"(apply_layernorm_1p is {centered}), other than in the family of `hf_config`. "
                "Is it the right one?"
            )
        for name, expected in _expected(values, sizes, config):
            value = values.get(name)
            if isinstance(value, NUMBER) and isinstance(expected, NUMBER) and value != expected:
                raise SourceError(
                    f"{self.file}: {name} is {shown(value)}, {file} says {expected}. {WRONG_CONFIG}"
                )
        if config.get("model_type") in PLAIN:
            for name in self.not_plain():
                if name not in CONFIGURED:
                    raise SourceError(
                        f"{self.file}: {name} is {shown(values[name])}, which "
                        f"{config['model_type']} models of {file} do not do. {WRONG_CONFIG}"
                    )
        for name, value, other in differences(values, config):
            raise SourceError(
                f"{self.file}: {name} is {shown(value)}, {file} says {other}. {WRONG_CONFIG}"
            )
        self._check_router(values, config, file)

    def not_plain(self) -> Iterator[str]:
        """Yield the arguments that ask for what models of plain families do not compute."""
        for name in (*OFF, *DEFAULTS):
            value = (self.values or {}).get(name)
            if value and value not in DEFAULTS.get(name, ()):
                yield name

    def _check_router(
        self, values: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """The configuration must know whether the weights of a token's experts sum to one.

        A softmax over all experts gives them a sum below 1; one over the token's own does not.
        """
        before_topk = values.get("moe_router_pre_softmax")
        sums_to_one = config.get("norm_topk_prob")
        if config.get("model_type") in SUMS_TO_ONE:
            sums_to_one = True
        is_softmax = values.get("moe_router_score_function", "softmax") == "softmax"
        if not (is_softmax and isinstance(before_topk, bool) and isinstance(sums_to_one, bool)):
            return
        if before_topk is sums_to_one and values.get("num_experts", 1) is not None:
            raise SourceError(
                f"{self.file}: moe_router_pre_softmax is {before_topk}, but by {file} or its "
                f"family norm_topk_prob is {sums_to_one}: another router. {WRONG_CONFIG}"
            )


def _expected(
    values: Mapping[str, Any], sizes: Sizes, config: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Arguments, and their values by the configuration; not numbers if it does not say."""
    text = text_config(config)
    rope = text.get("rope_parameters")
    yield "norm_epsilon", text.get("rms_norm_eps", text.get("layer_norm_epsilon"))
    if config.get("model_type") not in HYBRID:
        yield "rotary_base", (rope if isinstance(rope, Mapping) else text).get("rope_theta")
    yield "moe_router_topk", text.get("num_experts_per_tok")
    yield "num_layers", sizes.layers
    yield "hidden_size", sizes.hidden
    yield "num_attention_heads", sizes.heads
    yield "num_experts", sizes.experts or None
    yield "num_moe_experts", sizes.experts or None
    if values.get("group_query_attention"):
        yield "num_query_groups", sizes.kv_heads
    if not values.get("multi_latent_attention"):
        yield "kv_channels", sizes.head_dim


def read_arguments(folder: Path, stamps: Stamps) -> Arguments:
    """Read the arguments in `common.pt`. Nothing that it names is imported or run.

    Raises:
        SourceError: The file is damaged or cannot be read.
    """
    file = folder / COMMON
    try:
        with opened(file) as (handle, status):
            archive = read_archive(handle.fileno(), file, 0, status.st_size, "its archive")
    except FileNotFoundError:
        return Arguments(file, None)
    except OSError as error:
        raise read_error(file, error) from error
    stamps.add(file, status, archive.pickle)
    common = read_pickle(archive.pickle, file, lenient=True)
    args = common.get("args") if isinstance(common, dict) else None
    values = args.fields if isinstance(args, Stored) else args
    return Arguments(file, values if isinstance(values, dict) else None)
