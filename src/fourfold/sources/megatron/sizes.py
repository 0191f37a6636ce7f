"""The few numbers of a Hugging Face configuration that transforms need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import SourceError
from fourfold.storage.safetensors_header import shown

OWN = "If that is another model's configuration, give this one's: --hf-config DIR."
"""What to do where a configuration and a checkpoint do not agree."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the text model is cut: layers, heads, vocabulary."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    """Routed experts of a layer; 0 where the configuration speaks of none."""
    mtp_layers: int
    """Layers that predict further tokens; a checkpoint may lack them."""
    is_tied: bool
    """Whether the head is the embedding."""

    @classmethod
    def of(cls, config: Mapping[str, Any], file: Path) -> Sizes:
        """Those of a config.json; `SourceError` where it lacks one."""
        text = config.get("text_config")
        reader = _Reader(text if isinstance(text, Mapping) else config, file)
        hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
        tied = config.get("tie_word_embeddings", reader.config.get("tie_word_embeddings"))
        return cls(
            layers=reader.number("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=reader.number("num_key_value_heads", default=heads),
            head_dim=reader.number("head_dim", default=hidden // heads),
            vocab=reader.number("vocab_size"),
            experts=reader.number(
                "num_experts", "n_routed_experts", "num_local_experts", default=0
            ),
            mtp_layers=reader.number(
                "num_nextn_predict_layers", "mtp_num_hidden_layers", default=0
            ),
            is_tied=tied is True,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    config: Mapping[str, Any]
    file: Path

    def number(self, *names: str, default: int | None = None) -> int:
        """The first field of these that is there."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if type(value) is not int or value < (0 if default == 0 else 1):
                raise SourceError(
                    f"{self.file}: {name} is {shown(value)}, not a size. Download it again."
                )
            return value
        if default is None:
            raise SourceError(
                f"{self.file}: has no {names[0]}. Give the folder of the model's Hugging Face "
                "configuration as --hf-config."
            )
        return default
