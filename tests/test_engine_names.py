# SPDX-License-Identifier: Apache-2.0
"""Every family's linear layers under the names by which engines look them up, recipe by recipe.

The names are written here anew, as read in the engines' model files: what each engine fuses, and
what it calls otherwise in single families. For every layer that a plan quantizes or keeps, the
plan's list must get the right verdict under each of these names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import fourfold
from families import FAMILIES, Truth, mostly_slow
from fourfold.models.engines import Verdict, check, excludes, write_ignore
from fourfold.models.families import Engine, experts_module
from fourfold.models.fusion import KEEP_ALWAYS
from fourfold.models.peculiarities import peculiarities_of
from fourfold.planning import Plan
from fourfold.planning.rows import Action

Written = Callable[[str], tuple[Path, Truth]]

VLLM, SGLANG, TRTLLM = Engine.VLLM, Engine.SGLANG, Engine.TRTLLM
EXPERTS, DEFAULT = "w4a16_nvfp4_experts_only", "w4a16_nvfp4_default"
RECIPES = [EXPERTS, DEFAULT, "nvfp4_experts_only"]
LAYER = "model.layers.0"
MOE = [name for name, family in FAMILIES.items() if family.layout != "dense" and name != "jetmoe"]
"""JetMoE's attention has experts, and `plan` refuses it."""

FUSED: Mapping[str, list[tuple[str, set[str]]]] = {
    "beam": [("qkv_gate_proj", {"q_proj", "k_proj", "v_proj", "gate_proj"})],
    "bailing_hybrid": [
        ("qkvb_proj", {"q_proj", "k_proj", "v_proj", "b_proj"}),
        ("fused_qkvbfg_proj", {"q_proj", "k_proj", "v_proj", "b_proj", "f_proj", "g_proj"}),
    ],
    "dots3_note": [("fused_qkv_a_g_proj_with_mqa", {"q_a_proj", "kv_a_proj_with_mqa", "g_proj"})],
    "": [
        ("in_proj_qkvgfab", {"q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"}),
        ("qkv_proj", {"q_proj", "k_proj", "v_proj"}),
        ("fused_qkv_a_proj", {"q_a_proj", "kv_a_proj_with_mqa"}),
        ("fused_qkv_a_proj_with_mqa", {"q_a_proj", "kv_a_proj_with_mqa"}),
        ("in_proj_qkvz", {"in_proj_qkv", "in_proj_z"}),
        ("in_proj_ba", {"in_proj_b", "in_proj_a"}),
        ("gate_up_proj", {"gate_proj", "up_proj"}),
        ("gate_up_proj", {"w1", "w3"}),
    ],
}
"""By family, else for all: a fused module, and the siblings that it holds."""

ALIASES: Mapping[str, list[tuple[Engine, str, str]]] = {
    "axk2": [
        (VLLM, r"(.*_layernorm)\.W_down", r"\1.mlp.fc1"),
        (VLLM, r"(.*_layernorm)\.W_up", r"\1.mlp.fc2"),
        (VLLM, r"(.*\.self_attn)\.q_b_proj", r"\1.q_gate_proj"),
    ],
    "bailing_hybrid": [
        (VLLM, r"(.*\.attention)\.dense", r"\1.o_proj"),
        (SGLANG, r"(.*\.attention)\.dense", r"\1.o_proj"),
        (SGLANG, r"(.*)\.attention\.dense", r"\1.self_attn.o_proj"),
        (SGLANG, r"(.*)\.attention\.(fused_qkvbfg_proj|b_proj)", r"\1.self_attn.\2"),
    ],
    "gemma4": [
        (SGLANG, r"(.*\.vision_tower\..*\.self_attn)\.[qkv]_proj\.linear", r"\1.qkv_proj"),
        (SGLANG, r"(.*\.vision_tower\..*\.mlp)\.(gate|up)_proj\.linear", r"\1.gate_up_proj"),
    ],
    "granitemoehybrid": [(VLLM, r"(.*)\.mamba\.(in_proj|out_proj)", r"\1.mixer.\2")],
    "lfm2_moe": [(SGLANG, r"(.*\.feed_forward)\.w2", r"\1.down_proj")],
    "mistral_large4": [
        (VLLM, r"layers\.(\d+)\.gate", r"model.language_model.layers.\1.mlp.gate"),
        (VLLM, r"layers\.(\d+)\.experts", r"model.language_model.layers.\1.mlp.experts"),
        (
            VLLM,
            r"layers\.(\d+)\.attention\.w([qo])",
            r"model.language_model.layers.\1.self_attn.\2_proj",
        ),
        (
            VLLM,
            r"layers\.(\d+)\.attention\.wkv_a_with_mqa",
            r"model.language_model.layers.\1.self_attn.kv_a_proj_with_mqa",
        ),
        (
            VLLM,
            r"layers\.(\d+)\.attention\.indexer\.(\w+)",
            r"model.language_model.layers.\1.self_attn.indexer.\2",
        ),
        (
            VLLM,
            r"layers\.(\d+)\.feed_forward\.w2",
            r"model.language_model.layers.\1.mlp.down_proj",
        ),
        (
            VLLM,
            r"layers\.(\d+)\.shared_experts\.w2",
            r"model.language_model.layers.\1.mlp.shared_experts.down_proj",
        ),
        (
            VLLM,
            r"layers\.(\d+)\.shared_experts\.gate_up_proj",
            r"model.language_model.layers.\1.mlp.shared_experts.gate_up_proj",
        ),
        (VLLM, r"output", "lm_head"),
    ],
    "phimoe": [
        (VLLM, r"(.*)\.block_sparse_moe\.gate", r"\1.mlp.router"),
        (VLLM, r"(.*)\.block_sparse_moe\.experts", r"\1.mlp.experts"),
    ],
}
"""By family: engine, the name in the checkpoint (or that of the fused module), the engine's own."""

STAY = {
    "bailing_hybrid": r"\.attention\.[qkvbfg]_proj$",
    "glm5_next": r"layers\.\d+\.self_attn\.\w+_proj(_with_mqa)?$",
    "jamba": r"\.mamba\.(in|x|dt|out)_proj$",
    "lfm2_moe": r"\.conv\.in_proj$",
    "minimax_m3_vl": r"language_model.*\.self_attn\.[qkv]_proj$",
    "qwen3_next": r"\.self_attn\.[qkv]_proj$",
    "qwen4_exp": r"\.self_attn\.[qkv]_proj$",
}
"""What the default recipe leaves as it is, because an engine cannot load it quantized."""


@pytest.mark.parametrize("name", mostly_slow(MOE, *FUSED, *ALIASES, *STAY, "qwen3_vl_moe"))
def test_each_layer_is_treated_rightly(name: str, written: Written) -> None:
    for recipe in RECIPES:
        plan = fourfold.plan(written(name)[0], recipe)
        quantized, kept = sides(plan)
        peculiar = peculiarities_of(*plan.inventory.model_types)
        assert check(plan.ignore, sorted(quantized), sorted(kept), peculiar) == []
        for side, verdict in ((quantized, Verdict.QUANTIZED), (kept, Verdict.EXCLUDED)):
            for engine, module in names_in_engines(name, side, quantized | kept):
                ruling = excludes(engine, module, plan.ignore, peculiar)
                assert ruling.verdict is verdict, (recipe, engine, module, ruling)


def sides(plan: Plan) -> tuple[set[str], set[str]]:
    """The names of the linear layers that a plan quantizes, and of those that it keeps."""
    tensors = plan.inventory.tensors
    kept = {
        tensors[row.key].stem
        for row in plan.rows
        if row.action is Action.COPY and tensors[row.key].is_matrix
    }
    return {linear.name for linear in plan.linears}, kept


def names_in_engines(
    family: str, names: set[str], everything: set[str]
) -> Iterator[tuple[Engine, str]]:
    for name in sorted(names):
        for module in fused(family, name, everything):
            for engine in Engine:
                yield engine, module
            for engine, pattern, own in ALIASES.get(family, ()):
                if re.fullmatch(pattern, module):
                    yield engine, re.sub(f"^{pattern}$", own, module)


def fused(family: str, name: str, everything: set[str]) -> list[str]:
    """The engine modules that hold a linear layer."""
    if (module := experts_module(name)) is not None:
        return [module]
    parent, _, last = name.rpartition(".")
    for table in (FUSED.get(family, []), FUSED[""]):
        modules = [
            f"{parent}.{own}"
            for own, parts in table
            if last in parts and all(f"{parent}.{part}" in everything for part in parts)
        ]
        if modules:
            return modules
    return [name]


@pytest.mark.parametrize("name", STAY)
def test_what_an_engine_cannot_load_stays(name: str, written: Written, tmp_path: Path) -> None:
    folder = written(name)[0]
    plan = fourfold.plan(folder, DEFAULT)
    stay = {raw.stem for raw in plan.inventory.tensors.values() if re.search(STAY[name], raw.stem)}
    assert stay
    assert stay <= sides(plan)[1]
    always = re.compile("|".join(KEEP_ALWAYS))
    reasons = {row.reason for row in plan.rows if row.key.removesuffix(".weight") in stay}
    assert any("vLLM" in reason or "SGLang" in reason for reason in reasons), reasons
    named = sorted(stem for stem in stay if not always.search(stem))
    recipe = tmp_path / "named.yaml"
    recipe.write_text(
        f"rules:\n- {{names: {named}, weights: {{format: nvfp4}}}}\n"
        "- {roles: [experts], weights: {format: nvfp4}}\n"
    )
    assert set(named) <= sides(fourfold.plan(folder, recipe))[0]


@pytest.mark.parametrize("name", ["beam", "dots3_note"])
def test_what_an_engine_fuses_has_one_scale(name: str, written: Written) -> None:
    plan = fourfold.plan(written(name)[0], DEFAULT)
    (parts,) = (parts for _, parts in FUSED[name])
    groups = [{x.name.rpartition(".")[2] for x in group.linears} for group in plan.groups]
    assert parts in groups


def test_other_families_with_these_names_are_not_fused_so(written: Written) -> None:
    plan = fourfold.plan(written("afmoe")[0], DEFAULT)
    groups = [{x.name.rpartition(".")[2] for x in group.linears} for group in plan.groups]
    assert {"q_proj", "k_proj", "v_proj"} in groups
    assert {"gate_proj"} in groups


@pytest.mark.parametrize(
    ("family", "kept", "engine", "own"),
    [
        ("granitemoehybrid", f"{LAYER}.mamba.in_proj", VLLM, f"{LAYER}.mixer.in_proj"),
        ("lfm2_moe", f"{LAYER}.feed_forward.w2", SGLANG, f"{LAYER}.feed_forward.down_proj"),
        ("phimoe", f"{LAYER}.block_sparse_moe.gate", VLLM, f"{LAYER}.mlp.router"),
        ("axk2", f"{LAYER}.self_attn.q_b_proj", VLLM, f"{LAYER}.self_attn.q_gate_proj"),
    ],
)
def test_a_list_without_an_engine_s_own_name_is_found(
    family: str, kept: str, engine: Engine, own: str
) -> None:
    peculiar = peculiarities_of(family)
    assert own in write_ignore([], [kept], peculiar)
    assert [(m.engine, m.module) for m in check([kept], [], [kept], peculiar)] == [(engine, own)]


def test_verify_finds_a_list_without_an_engine_s_own_name(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fourfold.quantize(written("lfm2_moe")[0], out, EXPERTS)
    assert fourfold.verify(out).clean
    for name, keys in {
        "config.json": ("quantization_config", "ignore"),
        "hf_quant_config.json": ("quantization", "exclude_modules"),
    }.items():
        config = json.loads((out / name).read_text())
        entries = config[keys[0]][keys[1]]
        config[keys[0]][keys[1]] = [entry for entry in entries if "down_proj" not in entry]
        (out / name).write_text(json.dumps(config))
    found = [x for x in fourfold.verify(out).findings if x.severity == "error"]
    assert {finding.id for finding in found} == {"ignore-lacks-unquantized"}
    assert all(finding.tensor.endswith("feed_forward.down_proj") for finding in found)


def test_entries_that_sglang_rewrites() -> None:
    """Qwen3-VL: `attn.qkv` in an entry becomes `attn.qkv_proj`, also in `self_attn.qkv_proj`."""
    layer = "model.language_model.layers.0"
    attention = [f"{layer}.self_attn.{part}_proj" for part in "qkvo"]
    peculiar = peculiarities_of("qwen3_vl_moe", "qwen3_vl_moe_text")
    plain = write_ignore([], attention)
    assert {m.engine for m in check(plain, [], attention, peculiar)} == {SGLANG}
    ignore = write_ignore([], attention, peculiar)
    assert check(ignore, [], attention, peculiar) == []
    assert "*.layers.0.self_attn.qk[v]_proj" in ignore
    assert "*.layers.0.self_attn.o_proj" in ignore
