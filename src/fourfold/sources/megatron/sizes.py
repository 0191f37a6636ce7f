# SPDX-License-Identifier: Apache-2.0
"""The few numbers of a Hugging Face configuration that the rules need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.safetensors_header import shown

WRONG_CONFIG = "If that is another model's configuration, give this one's: `hf_config`."
"""The advice in messages about a configuration and a checkpoint that do not agree."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the text model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    """Routed experts of a layer; 0 if the configuration has none."""
    mtp_layers: int
    """Layers that predict further tokens; a checkpoint may lack them."""
    is_tied: bool
    """True if the head is the embedding."""

    @classmethod
    def of(cls, config: Mapping[str, Any], file: Path) -> Sizes:
        """Read the sizes from the content of a config.json.

        Raises:
            SourceError: A size is missing, or not a positive integer.
        """
        text = text_config(config)

        def size(*names: str, default: int | None = None) -> int:
            for name in names:
                value = text.get(name)
                if value is None:
                    continue
                if type(value) is not int or value < (0 if default == 0 else 1):
                    raise SourceError(
                        f"{file}: {name} is {shown(value)}, which is not a size. Download it again."
                    )
                return value
            if default is None:
                raise SourceError(
                    f"{file}: has no {names[0]}. Give the folder of the model's Hugging Face "
                    "configuration as `hf_config`."
                )
            return default

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            layers=size("num_hidden_layers", default=len(hybrid_layers(text)) or None),
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", default=heads),
            head_dim=size("head_dim", default=hidden // heads),
            vocab=size("vocab_size"),
            experts=size("num_experts", "n_routed_experts", "num_local_experts", default=0),
            mtp_layers=size("num_nextn_predict_layers", "mtp_num_hidden_layers", default=0),
            is_tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is True,
        )


HYBRID_KINDS: Mapping[str, str] = {
    "mamba": "M", "linear_attention": "M",
    "attention": "*", "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}  # fmt: skip
"""Kinds of layers in `layers_block_type`, by their older and newer names → Megatron's letters."""


def hybrid_layers(text: Mapping[str, Any]) -> str:
    """The layers of a Mamba hybrid, a letter each; empty if the configuration has no such list."""
    kinds = text.get("layers_block_type")
    if isinstance(kinds, list):
        return "".join(HYBRID_KINDS.get(str(kind), "?") for kind in kinds)
    pattern = text.get("hybrid_override_pattern")
    return pattern if isinstance(pattern, str) else ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the text model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
