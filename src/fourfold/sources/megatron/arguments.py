"""What `common.pt` says of how the model was trained, where that decides what weights mean.

Shapes do not tell whether gate and up are interleaved, or whether norms keep w − 1. The arguments
do, where the checkpoint has them; they are also held against the Hugging Face configuration.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.sources.megatron.chunks import read_archive
from fourfold.sources.megatron.pickles import Stored, read_lenient_pickle
from fourfold.sources.megatron.rules import RuleBook
from fourfold.sources.megatron.sizes import OWN, Sizes
from fourfold.storage.fingerprints import Stamps, opened, read_error
from fourfold.storage.safetensors_header import shown

COMMON = "common.pt"

REFUSED: Mapping[str, str] = {
    "moe_mlp_glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "moe_shared_expert_glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "glu_interleave_size": "gate and up are interleaved, which no rule undoes",
    "moe_single_grouped_weight": "all experts are packed in one weight, which no rule takes apart",
    "rotary_interleaved": "rotary embeddings pair neighbours, which no rule undoes",
    "glu_linear_offset": "up is offset before it is multiplied, which these families do not do",
    "activation_func_clamp_value": "activations are clamped, which these families do not do",
    "moe_apply_probs_on_input": "experts' inputs are weighted, which these families do not do",
    "moe_latent_size": "experts work in a smaller latent space, which these families do not have",
    "apply_residual_connection_post_layernorm": "its residuals are not those of these families",
    "enable_mhc_connections": "its residuals are not those of these families",
    "use_mup": "its outputs are scaled by width, which these families do not do",
    "heterogeneous_layers_config_path": "its layers differ from each other in size",
}
"""Arguments that change what weights mean, where they are set: why they are not handled."""

UNLESS_SAID: Mapping[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (1,),
    "rope_type": ("rope",),
    "softmax_type": ("vanilla",),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
}
"""What plain families have where it is said at all: an older Megatron had nothing else."""

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
"""What plain families do not do: to be absent, None, False or 0."""

PLAIN = ("qwen3", "qwen3_moe", "mixtral")
"""Families that compute nothing beyond that."""

CONFIGURED = ("spec", "use_rope_scaling", "window_size")
"""What a configuration that is given may say in its own way."""

SUMS_TO_ONE = ("mixtral", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families whose routers always make the weights of a token's experts sum to one."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of the training run; `values` is None where the checkpoint keeps none."""

    file: Path
    values: Mapping[str, Any] | None

    @property
    def note(self) -> str | None:
        """What a user should know where there are none."""
        if self.values is not None:
            return None
        return (
            f"{self.file.parent}: keeps no training arguments, so that interleaved gates and norms "
            "kept as w − 1 would not be seen; they are taken to be as --hf-config's family has them"
        )

    def check(self, book: RuleBook, sizes: Sizes, config: Mapping[str, Any], file: Path) -> None:
        """Raise `SourceError` for a layout that is not handled, or for another model's `config`.

        file: that `config` was read from.
        """
        if self.values is None:
            return
        for name, why in REFUSED.items():
            value = self.values.get(name)
            if value is not None and value is not False and value != 0:
                raise SourceError(
                    f"{self.file}: {name} is {shown(value)}: {why}. "
                    "Only models without it can be read."
                )
        centered = self.values.get(
            "apply_layernorm_1p", self.values.get("layernorm_zero_centered_gamma")
        )
        if isinstance(centered, bool) and centered is not book.zero_centered_norms:
            kept = "w − 1" if centered else "w"
            raise SourceError(
                f"{self.file}: norms are kept as {kept} (apply_layernorm_1p is {centered}), and "
                "the family of --hf-config keeps them otherwise. Is it the right one?"
            )
        for name, ours, theirs in self._differences(sizes, config):
            raise SourceError(f"{self.file}: {name} is {shown(ours)}, {file} says {theirs}. {OWN}")
        self._check_plain(config, file)
        self._check_router(config, file)

    def _check_plain(self, config: Mapping[str, Any], file: Path) -> None:
        """What a family does not compute, its model did not either."""
        assert self.values is not None
        if self.values.get("moe_router_load_balancing_type") == "sinkhorn":
            raise SourceError(
                f"{self.file}: moe_router_load_balancing_type is 'sinkhorn': its router is not "
                "that of these families. Only models without it can be read."
            )
        kind = config.get("model_type")
        if kind not in PLAIN:
            return
        for name in (*OFF, *UNLESS_SAID):
            value = self.values.get(name)
            is_off = not value or value in UNLESS_SAID.get(name, ())
            if not is_off and name not in CONFIGURED:
                raise SourceError(
                    f"{self.file}: {name} is {shown(value)}, which {kind} models of {file} do not "
                    f"do. {OWN}"
                )

    def _check_router(self, config: Mapping[str, Any], file: Path) -> None:
        """A softmax over all experts leaves the weights of a token's own with a sum below 1, one
        over those alone does not: the configuration must say which it was."""
        assert self.values is not None
        before = self.values.get("moe_router_pre_softmax")
        sums_to_one = config.get("norm_topk_prob")
        if config.get("model_type") in SUMS_TO_ONE:
            sums_to_one = True
        is_softmax = self.values.get("moe_router_score_function", "softmax") == "softmax"
        if not (is_softmax and isinstance(before, bool) and isinstance(sums_to_one, bool)):
            return
        if before is sums_to_one and self.values.get("num_experts", 1) is not None:
            raise SourceError(
                f"{self.file}: moe_router_pre_softmax is {before}, {file} says norm_topk_prob "
                f"{sums_to_one}, or its family does: another router. {OWN}"
            )

    def _differences(
        self, sizes: Sizes, config: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any, float]]:
        """Arguments that say otherwise than the configuration: of sizes, and how layers compute."""
        assert self.values is not None
        text = config.get("text_config")
        text = text if isinstance(text, Mapping) else config
        rope = text.get("rope_parameters")
        rope = rope if isinstance(rope, Mapping) else text
        wanted = {
            "norm_epsilon": text.get("rms_norm_eps"),
            "rotary_base": rope.get("rope_theta"),
            "moe_router_topk": text.get("num_experts_per_tok"),
            "num_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "num_attention_heads": sizes.heads,
            "num_experts": sizes.experts or None,
            "num_moe_experts": sizes.experts or None,
        }
        if self.values.get("group_query_attention"):
            wanted["num_query_groups"] = sizes.kv_heads
        if not self.values.get("multi_latent_attention"):
            wanted["kv_channels"] = sizes.head_dim
        for name, theirs in wanted.items():
            ours = self.values.get(name)
            if isinstance(ours, int | float) and isinstance(theirs, int | float) and ours != theirs:
                yield name, ours, theirs


def read_arguments(folder: Path, stamps: Stamps) -> Arguments:
    """The arguments that `common.pt` keeps. Nothing that it names is imported or run."""
    file = folder / COMMON
    try:
        with opened(file) as (handle, status):
            descriptor = handle.fileno()
            archive = read_archive(
                lambda count, at: os.pread(descriptor, count, at), file, 0, status.st_size, COMMON
            )
    except FileNotFoundError:
        return Arguments(file, None)
    except OSError as error:
        raise read_error(file, error) from error
    stamps.add(file, status, archive.pickle)
    common = read_lenient_pickle(archive.pickle, file)
    found = common.get("args") if isinstance(common, dict) else None
    if isinstance(found, Stored):
        return Arguments(file, found.fields)
    return Arguments(file, found if isinstance(found, dict) else None)
