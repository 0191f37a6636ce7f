# SPDX-License-Identifier: Apache-2.0
"""What engines do with the linear layers of one family, and of no other.

This is all data, by `model_type`, read from vLLM 0.33.0 and SGLang 0.5.23. The rules for all
families are in `fusion` and `engines`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fourfold.models.families import Engine, family_type
from fourfold.models.fusion import FusedModule

Substitutions = tuple[tuple[str, str], ...]
"""Regexes and their replacements, applied in this order."""


def substitute(substitutions: Substitutions, name: str) -> str:
    """Return `name` after all `substitutions`."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Peculiarities:
    """What engines do with the linear layers of one family alone."""

    fused: tuple[FusedModule, ...] = ()
    """Looked for before those of all families."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Regex over the raw module name → why these layers stay unquantized unless a recipe names
    them: an engine cannot load them quantized, though another may."""
    renamed: Mapping[Engine, tuple[Substitutions, ...]] = field(default_factory=dict)
    """Each from a layer's name in the checkpoint to one by which the engine looks it up."""
    rewritten: Mapping[Engine, Substitutions] = field(default_factory=dict)
    """What the engine turns the entries of an ignore list into, where that goes wrong."""
    listed: Substitutions = ()
    """From a layer's name to one more entry, which survives what is `rewritten`."""

    def kept_because(self, name: str) -> str | None:
        """Return why the linear layer `name` is kept unless a recipe names it, or None."""
        return next((why for regex, why in self.kept.items() if re.search(regex, name)), None)

    def renamings(self, engine: Engine) -> tuple[Substitutions, ...]:
        """Return the substitutions that lead to the names in `engine`; the first does nothing."""
        return ((), *self.renamed.get(engine, ()))

    def names_in(self, engine: Engine, name: str) -> tuple[str, ...]:
        """Return the names of a layer in `engine`: that in the checkpoint, and its own."""
        names = (substitute(renaming, name) for renaming in self.renamings(engine))
        return tuple(dict.fromkeys(names))

    def entry_in(self, engine: Engine, entry: str) -> str:
        """Return what `engine` makes of an entry of an ignore list."""
        return substitute(self.rewritten.get(engine, ()), entry)

    def more_entries(self, name: str) -> tuple[str, ...]:
        """Return the further entry for a layer's name in the checkpoint, if it needs one."""
        entry = substitute(self.listed, name)
        return () if entry == name else (entry,)


NONE = Peculiarities()

_QKV = ("q_proj", "k_proj", "v_proj")
_MLA_GATED = ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")
"""MLA's first projections and its output gate."""

# The own names stand for all layouts of an engine: which it builds depends on more than the list.
_KIMI = Peculiarities(
    fused=(
        FusedModule((*_QKV, "b_proj", "f_a_proj", "g_proj"), ("in_proj_qkvgfab",)),
        FusedModule(
            _MLA_GATED,
            ("fused_qkv_a_g_proj",),
            elsewhere={
                Engine.SGLANG: ("fused_qkv_a_proj_with_mqa", "g_proj"),
                Engine.TRTLLM: ("kv_a_proj_with_mqa", "g_proj"),
            },
        ),
    )
)
_BAILING = Peculiarities(
    fused=(
        FusedModule(
            (*_QKV, "b_proj", "f_proj", "g_proj"),
            ("qkvb_proj", "qkv_proj", "b_proj", "f_proj", "g_proj"),
            elsewhere={Engine.SGLANG: ("fused_qkvbfg_proj", "b_proj")},
        ),
    ),
    kept={
        r"\.attention\.[qkvbfg]_proj$": (
            "vLLM fuses linear attention's b with q, k and v, and SGLang builds b unquantized"
        )
    },
    # Linear attention is `self_attn` in SGLang, and has an `o_proj` in both.
    renamed={
        Engine.VLLM: (((r"\.attention\.dense$", ".attention.o_proj"),),),
        Engine.SGLANG: (
            ((r"\.attention\.dense$", ".attention.o_proj"),),
            ((r"\.attention\.", ".self_attn."), (r"\.dense$", ".o_proj")),
        ),
    },
)
_BEAM = Peculiarities(fused=(FusedModule((*_QKV, "gate_proj"), ("qkv_gate_proj", "qkv_proj")),))
_DOTS3 = Peculiarities(
    fused=(
        FusedModule(
            _MLA_GATED,
            ("fused_qkv_a_g_proj_with_mqa",),
            elsewhere={
                Engine.VLLM: ("fused_qkv_a_proj", "g_proj"),
                Engine.TRTLLM: ("kv_a_proj_with_mqa", "g_proj"),
            },
        ),
    )
)

_TABLE: Mapping[str, Peculiarities] = {
    "axk2": Peculiarities(
        # vLLM's Transformers backend has the names that transformers has in memory.
        renamed={
            Engine.VLLM: (
                (
                    (r"layernorm\.W_down$", "layernorm.mlp.fc1"),
                    (r"layernorm\.W_up$", "layernorm.mlp.fc2"),
                    (r"\.q_b_proj$", ".q_gate_proj"),
                ),
            )
        }
    ),
    "bailing_hybrid": _BAILING,
    "bailing_moe_v3": _BAILING,
    "beam": _BEAM,
    "dots3_note": _DOTS3,
    "gemma4": Peculiarities(
        # The raw names end in `.linear`; SGLang fuses the vision tower's layers all the same.
        renamed={
            Engine.SGLANG: (
                (
                    (r"(\.vision_tower\..*\.self_attn)\.[qkv]_proj\.linear$", r"\1.qkv_proj"),
                    (r"(\.vision_tower\..*\.mlp)\.(?:gate|up)_proj\.linear$", r"\1.gate_up_proj"),
                ),
            )
        }
    ),
    "glm5_next": Peculiarities(
        kept={r"\.self_attn\.": "vLLM builds GLM-5-Next's attention unquantized"}
    ),
    "granitemoehybrid": Peculiarities(renamed={Engine.VLLM: (((r"\.mamba\.", ".mixer."),),)}),
    "jamba": Peculiarities(
        kept={r"\.mamba\.": "vLLM builds Jamba's Mamba layers unquantized whatever is in the list"}
    ),
    "kimi_k3": _KIMI,
    "kimi_linear": _KIMI,
    "lfm2_moe": Peculiarities(
        kept={r"\.conv\.in_proj$": "SGLang does not load this layer's global scale"},
        renamed={Engine.SGLANG: (((r"\.feed_forward\.w2$", ".feed_forward.down_proj"),),)},
    ),
    "minimax_m3_vl": Peculiarities(
        kept={
            r"\.self_attn\.[qkv]_proj$": (
                "vLLM has q, k and v in one module with the indexer, which stays unquantized"
            )
        }
    ),
    "mistral_large4": Peculiarities(
        # As for axk2. vLLM never quantizes a vision tower.
        renamed={
            Engine.VLLM: (
                (
                    (r"^output$", "lm_head"),
                    (r"^patch_merger\.", "model.multi_modal_projector.patch_merger."),
                    (r"^vision_language_adapter\.w_in$", "model.multi_modal_projector.linear_1"),
                    (r"^vision_language_adapter\.w_out$", "model.multi_modal_projector.linear_2"),
                    (r"^layers\.", "model.language_model.layers."),
                    (r"^(model\..*)\.attention\.", r"\1.self_attn."),
                    (r"\.self_attn\.w([qkvo])$", r".self_attn.\1_proj"),
                    (r"\.self_attn\.wkv_a_with_mqa$", ".self_attn.kv_a_proj_with_mqa"),
                    (r"\.self_attn\.wkv_b$", ".self_attn.kv_b_proj"),
                    (r"^(model\..*)\.feed_forward\.", r"\1.mlp."),
                    (r"^(model\..*)\.(gate|experts|shared_experts)(?=\.|$)", r"\1.mlp.\2"),
                    (r"^(model\..*)\.w1$", r"\1.gate_proj"),
                    (r"^(model\..*)\.w2$", r"\1.down_proj"),
                    (r"^(model\..*)\.w3$", r"\1.up_proj"),
                ),
            )
        }
    ),
    "phimoe": Peculiarities(
        # vLLM has a model for the published class alone; one that transformers saved goes to its
        # Transformers backend.
        renamed={
            Engine.VLLM: (
                (
                    (r"\.block_sparse_moe\.gate$", ".mlp.router"),
                    (r"\.block_sparse_moe\.", ".mlp."),
                ),
            )
        }
    ),
    "qwen3_next": Peculiarities(
        kept={r"\.self_attn\.[qkv]_proj$": "SGLang builds this family's q, k and v unquantized"}
    ),
    "qwen3_vl_moe": Peculiarities(
        # SGLang renames entries for the names of its parameters, and looks layers up by others.
        rewritten={
            Engine.SGLANG: (
                (r"self_attn\.qkv", "self_attn.qkv_proj"),
                (r"^model\.language_model\.", "language_model.model."),
            )
        },
        listed=(
            (r"^model\.language_model\.layers\.", "*.layers."),
            (r"^(\*\..*)\.qkv_proj$", r"\1.qk[v]_proj"),
        ),
    ),
    "qwen4_exp": Peculiarities(
        kept={
            r"\.self_attn\.[qkv]_proj$": (
                "vLLM builds this family's q, k and v unquantized, in one module with the indexer"
            )
        }
    ),
}


def peculiarities_of(*model_types: object) -> Peculiarities:
    """Return what is peculiar to the first of a wrapper's and its text model's types."""
    names = (family_type(name) for name in model_types if isinstance(name, str))
    return next((_TABLE[name] for name in names if name in _TABLE), NONE)
