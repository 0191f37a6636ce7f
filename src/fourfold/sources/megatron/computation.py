# SPDX-License-Identifier: Apache-2.0
"""How a model computes, by its training arguments and by its Hugging Face configuration.

Weights do not show which activation function, window, scaling of rotary embeddings or routing a
model was trained with. Where both sides say it, they must say the same. Each check yields the
name of an argument, its value, and the value of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.sources.megatron.sizes import hybrid_layers, text_config

Difference = tuple[str, Any, Any]
"""An argument, its value, and what the configuration says in its place."""

_GELU = frozenset({"gelu", "gelu_python"})
_GELU_TANH = frozenset({"gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
_SILU = frozenset({"silu", "swish"})
_ACTIVATIONS: Mapping[str, frozenset[str]] = {
    "squared_relu": frozenset({"relu2"}),
    "quick_geglu": frozenset({"quick_gelu"}),
    "openai_gelu": _GELU_TANH,
    "swiglu": _SILU,
}
"""Flags that choose an activation function, the first that is set → its Hugging Face names."""

_FUNCTIONS: Mapping[str, frozenset[str]] = {
    "silu": _SILU,
    "gelu": _GELU | _GELU_TANH,
    "squared_relu": frozenset({"relu2"}),
    "quick_gelu": frozenset({"quick_gelu"}),
}
"""The same for `activation_func` of a model in memory."""

_YARN: Mapping[str, tuple[str, float | None]] = {
    "rotary_scaling_factor": ("factor", None),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
    "mscale": ("mscale", None),
    "mscale_all_dim": ("mscale_all_dim", None),
    "original_max_position_embeddings": ("original_max_position_embeddings", None),
}
"""Arguments of scaled rotary embeddings (with `yarn_` before them outside of latent attention) →
fields of `rope_parameters`, and what they are if the configuration does not say."""

SIGMOID = ("deepseek_v3", "nemotron_h")
"""Families whose routers score experts by a sigmoid, in groups, and scale the weights."""

HYBRID = ("nemotron_h",)
"""Families whose layers are each Mamba, attention, an MLP or experts, without rotary embeddings."""

_MAMBA: Mapping[str, str] = {
    "mamba_state_dim": "ssm_state_size",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_num_heads": "mamba_num_heads",
    "moe_latent_size": "moe_latent_size",
}
"""Arguments of Mamba hybrids → fields of a configuration."""


def differences(values: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what the arguments `values` and a configuration say otherwise than each other."""
    text = text_config(config)
    yield from _activation(values, text)
    yield from _window(values, text)
    yield from _rotary(values, text)
    family = text.get("model_type", config.get("model_type"))
    if family in HYBRID:
        yield from _hybrid(values, text)
    if family in SIGMOID and (family not in HYBRID or "E" in hybrid_layers(text)):
        yield from _router(values, text)


def _activation(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Difference]:
    names = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    field = next((name for name in names if name in text), names[0])
    wanted = text.get(field)
    if not isinstance(wanted, str):
        return
    function = getattr(values.get("activation_func"), "__name__", "")
    if function in _FUNCTIONS and wanted not in _FUNCTIONS[function]:
        yield "activation_func", function, f"{field} {wanted}"
    chosen = next((name for name in _ACTIVATIONS if values.get(name) is True), None)
    if chosen is not None and wanted not in _ACTIVATIONS[chosen]:
        yield chosen, True, f"{field} {wanted}"
    if chosen is None and values.get("swiglu") is False and wanted not in _GELU:
        yield "swiglu", False, f"{field} {wanted}"


def _window(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Difference]:
    """A window counts the tokens before a token in Megatron, and often the token itself, too."""
    if "window_size" not in values:
        return
    window, size = values["window_size"], _window_of(text)
    if not window:
        positions = text.get("max_position_embeddings")
        if size is not None and not (isinstance(positions, int) and size >= positions):
            yield "window_size", window, f"sliding_window {size}"
        return
    before = window[0] if isinstance(window, list | tuple) else window
    if type(before) is int and before >= 0 and size not in (before, before + 1):
        yield "window_size", window, f"sliding_window {size}"


def _window_of(text: Mapping[str, Any]) -> int | None:
    """The window that some layers have by a configuration."""
    size, kinds = text.get("sliding_window"), text.get("layer_types")
    if isinstance(kinds, list):
        has_window = "sliding_attention" in kinds
    else:
        has_window = text.get("use_sliding_window") is not False
    return size if has_window and type(size) is int else None


def _rotary(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Difference]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or any(isinstance(x, Mapping) for x in rope.values()):
        return
    kind = rope.get("rope_type", rope.get("type")) or "default"
    is_latent = bool(values.get("multi_latent_attention"))
    prefix = "" if is_latent else "yarn_"
    by = "rope_type" if is_latent else "position_embedding_type"
    factor = values.get(f"{prefix}rotary_scaling_factor")
    if by not in values:
        return
    is_yarn = values[by] == "yarn" and factor not in (None, 1)
    if is_yarn is not (kind == "yarn"):
        name = f"{prefix}rotary_scaling_factor" if is_yarn else by
        yield name, values[name], f"rope_type {kind}"
        return
    if is_yarn:
        for name, (field, default) in _YARN.items():
            ours, theirs = values.get(prefix + name), rope.get(field, default)
            if _differ(ours, theirs):
                yield prefix + name, ours, f"{field} {theirs}"
    scaled, by_factor = values.get("use_rope_scaling"), values.get("rope_scaling_factor")
    if isinstance(scaled, bool) and scaled is not (kind == "llama3"):
        yield "use_rope_scaling", scaled, f"rope_type {kind}"
    elif scaled and _differ(by_factor, rope.get("factor")):
        yield "rope_scaling_factor", by_factor, f"factor {rope['factor']}"
    stretched = values.get("rotary_seq_len_interpolation_factor")
    if _differ(stretched, rope.get("factor") if kind == "linear" else 1):
        yield "rotary_seq_len_interpolation_factor", stretched, f"rope_type {kind}"


def _hybrid(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Difference]:
    layers = hybrid_layers(text)
    for name in ("hybrid_override_pattern", "hybrid_layer_pattern"):
        pattern = values.get(name)
        # Newer patterns mark stages by `|`; MTP layers follow after `/`.
        own = pattern.partition("/")[0].replace("|", "") if isinstance(pattern, str) else layers
        if own != layers:
            yield name, pattern, f"{layers} (layers_block_type)"
    embeddings = values.get("position_embedding_type", "none")
    if embeddings != "none":
        yield "position_embedding_type", embeddings, "a family without them"
    for name, field in _MAMBA.items():
        ours, theirs = values.get(name), text.get(field)
        if name == "moe_latent_size" and name in values:
            ours, theirs = ours or 0, theirs or 0
        if _differ(ours, theirs):
            yield name, ours, f"{field} {theirs}"


def _router(values: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Difference]:
    score = values.get("moe_router_score_function")
    if isinstance(score, str) and score != "sigmoid":
        yield "moe_router_score_function", score, "sigmoid"
    elif score is not None and text.get("norm_topk_prob") is False:
        yield "moe_router_score_function", score, "norm_topk_prob False"
    groups = text.get("n_group")
    for name, field in (
        ("moe_router_num_groups", "n_group"),
        ("moe_router_group_topk", "topk_group"),
        ("moe_router_topk_scaling_factor", "routed_scaling_factor"),
    ):
        if field == "topk_group" and groups in (None, 1):
            continue  # the only group is chosen always
        ours, theirs = values.get(name), text.get(field)
        if name in values and _differ(1 if ours is None else ours, theirs):
            yield name, ours, f"{field} {theirs}"


def _differ(ours: object, theirs: object) -> bool:
    """True for two numbers that are not the same."""
    are_numbers = all(isinstance(x, int | float) and x is not True for x in (ours, theirs))
    return are_numbers and ours != theirs
