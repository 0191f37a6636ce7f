# SPDX-License-Identifier: Apache-2.0
"""Recipes of other tools end in an error that shows the equivalent recipe, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import fourfold
from fourfold.recipes import Recipe

NVFP4 = "{num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}}"
OLD_NVFP4 = "{num_bits: [2, 1], block_sizes: {-1: 16, type: static, scale_bits: [4, 3]}}"
CONSTANT = NVFP4.replace("}}", "}, constant_amax: 2688}")
FP8 = "{num_bits: e4m3, axis: null}"


def of_modelopt(*entries: str, algorithm: str = "max", imports: str = "{}") -> str:
    lines = "".join(f"    - {entry}\n" for entry in entries)
    return (
        f"imports: {imports}\n"
        "metadata: {recipe_type: ptq, description: mine}\n"
        f"quantize:\n  algorithm: {algorithm}\n  quant_cfg:\n{lines}"
    )


def quantizers(scope: str, cfg: str = NVFP4, kinds: str = "weight input") -> list[str]:
    return [f"{{quantizer_name: '{scope}{kind}_quantizer', cfg: {cfg}}}" for kind in kinds.split()]


OFF = "{quantizer_name: '*', enable: false}"
KV_FP8 = f"{{quantizer_name: '*[kv]_bmm_quantizer', cfg: {FP8}}}"
KV_CAST = "{quantizer_name: '*[kv]_bmm_quantizer', cfg: {num_bits: e4m3, use_constant_amax: true}}"
NO_HEAD = "{quantizer_name: '*lm_head*', enable: false}"
NO_GATE = "{quantizer_name: '*mlp.gate.*', enable: false}"
SWEEP = "{method: mse, fp8_scale_sweep: true}"


def error_of(recipe: str | Path) -> str:
    with pytest.raises(fourfold.RecipeError) as caught:
        Recipe.load(recipe)
    assert caught.value.exit_code == 2
    return str(caught.value)


def error_in(text: str, folder: Path) -> str:
    file = folder / "theirs.yaml"
    file.write_text(text)
    message = error_of(file)
    assert "theirs.yaml" in message
    return message


@pytest.mark.parametrize(
    ("text", "builtin"),
    [
        (
            of_modelopt(OFF, *quantizers("*"), KV_FP8, NO_HEAD, NO_GATE, algorithm=SWEEP),
            "nvfp4_default_mse-fp8_kv",
        ),
        (
            of_modelopt(
                OFF, *quantizers("*.experts.*"), *quantizers("*block_sparse_moe*"), NO_HEAD
            ),
            "nvfp4_experts_only",
        ),
        (
            of_modelopt(OFF, *quantizers("*mixer.experts.*"), KV_CAST, algorithm=SWEEP),
            "nvfp4_experts_only_mse-fp8_cast_kv",
        ),
        (
            of_modelopt(
                OFF,
                *quantizers("*mlp*", OLD_NVFP4),
                *quantizers("*.mixer.up_proj."),
                *quantizers("*.experts.*"),
                KV_CAST,
                algorithm=SWEEP,
            ),
            "nvfp4_mlp_only_mse-fp8_cast_kv",
        ),
        (of_modelopt(OFF, *quantizers("*", kinds="weight"), NO_HEAD), "w4a16_nvfp4_default"),
        (
            of_modelopt(
                OFF,
                *quantizers("*.experts.*", kinds="weight"),
                *quantizers("*.experts.*", CONSTANT, kinds="input"),
                algorithm=SWEEP,
            ),
            "nvfp4_experts_only_mse-constant_inputs",
        ),
        (
            of_modelopt(
                "{$import: off}",
                "{$import: body}",
                "{$import: rest}",
                imports="{off: configs/ptq/units/base_disable_all, "
                "body: configs/ptq/units/w4_nvfp4, "
                "rest: configs/ptq/units/default_disabled_quantizers}",
            ),
            "w4a16_nvfp4_default",
        ),
        (
            "imports: {preset: configs/ptq/presets/model/nvfp4_experts_only}\n"
            "metadata: {recipe_type: ptq}\nquantize: {$import: preset}\n",
            "nvfp4_experts_only",
        ),
        (
            f"quant_cfg:\n  '*weight_quantizer': {OLD_NVFP4}\n"
            "  'nn.BatchNorm1d': {'*': {enable: false}}\n"
            "  '*lm_head*': {enable: false}\n  default: {enable: false}\nalgorithm: max\n",
            "w4a16_nvfp4_default",  # `default` is what is true before all other patterns
        ),
    ],
)
def test_modelopt_recipes_that_are_built_in(text: str, builtin: str, tmp_path: Path) -> None:
    message = error_in(text, tmp_path)
    assert "a recipe of ModelOpt" in message
    assert f"`recipe={builtin}`" in message
    assert len(message.splitlines()) == 1


def test_an_equivalent_that_is_not_built_in_is_printed(tmp_path: Path) -> None:
    off = "{quantizer_name: '*layers.0.*', enable: false}"
    text = of_modelopt(OFF, *quantizers("*"), "{quantizer_name: '*self_attn*', enable: false}", off)
    message = error_in(text, tmp_path)
    file = tmp_path / "ours.yaml"
    file.write_text(message.partition("\n")[2])
    recipe = Recipe.load(file)
    assert recipe.quantize_if_present == ("experts", "shared_experts", "mlp", "linear_attention")
    assert recipe.keep == ("*layers.0.*",)
    assert recipe.weights.scale == "max"
    assert recipe.activations != "none"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (of_modelopt(OFF, *quantizers("*", FP8)), "FP8"),
        (of_modelopt(OFF, *quantizers("*"), algorithm="{method: gptq}"), "gptq"),
        (of_modelopt(OFF, *quantizers("*"), algorithm="awq_lite"), "awq_lite"),
        (of_modelopt(OFF, *quantizers("*o_proj*")), "o_proj"),
        (of_modelopt(OFF, *quantizers("*", NVFP4.replace("16", "32"))), "blocks of 32"),
        (of_modelopt(OFF, *quantizers("*mlp*"), *quantizers("*attn*", kinds="input")), "inputs"),
        (of_modelopt(OFF, *quantizers("*"), KV_FP8.replace("e4m3", "e2m1")), "bmm"),
        (of_modelopt(OFF, *quantizers("*", CONSTANT)), "a constant amax of 2688 for *weight"),
        (
            of_modelopt(
                OFF,
                *quantizers("*", kinds="weight"),
                *quantizers("*", CONSTANT.replace("2688", "448"), kinds="input"),
            ),
            "a constant amax of 448",
        ),
        (
            of_modelopt(
                OFF,
                *quantizers("*mlp*", kinds="weight"),
                *quantizers("*self_attn*", kinds="weight"),
                *quantizers("*mlp*", CONSTANT, kinds="input"),
                *quantizers("*self_attn*", kinds="input"),
            ),
            "only some of the inputs",
        ),
        (of_modelopt("{$import: theirs}"), "theirs"),
        (of_modelopt(OFF), "no weights"),
        ("metadata: {recipe_type: speculative_eagle}\neagle: {}\n", "speculative_eagle"),
        ("metadata: {recipe_type: auto_quantize}\nauto_quantize: {}\n", "auto_quantize"),
        ("quantize: {algorithm: max, quant_cfg: 3}\n", "could not be read"),
        ("stage: {modifiers: {GPTQModifier: {scheme: NVFP4}}}\n", "GPTQModifier"),
        ("stage: {modifiers: {QuantizationModifier: {scheme: W4A16}}}\n", "W4A16"),
    ],
)
def test_what_has_no_equivalent_is_named(text: str, why: str, tmp_path: Path) -> None:
    message = error_in(text, tmp_path)
    assert "no equivalent" in message
    assert why in message
    assert "docs/from-modelopt.md" in message


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("general/ptq/nvfp4_experts_only_mse-kv_fp8_cast", "nvfp4_experts_only_mse-fp8_cast_kv"),
        ("NVFP4_EXPERTS_ONLY_CFG", "nvfp4_experts_only"),
        ("general/ptq/nvfp4_weight_only-kv_fp16.yaml", "w4a16_nvfp4_default"),
        ("nvfp4_mlp_only_mse-kv_fp8_cast", "nvfp4_mlp_only_mse-fp8_cast_kv"),
        ("nvfp4_weight_only-kv_fp16", "w4a16_nvfp4_default"),
        ("NVFP4A16", "w4a16_nvfp4_default"),
    ],
)
def test_names_of_other_tools(name: str, builtin: str) -> None:
    assert f"`recipe={builtin}`" in error_of(name)


@pytest.mark.parametrize("kv_format", ["fp8", "nvfp4"])
def test_a_name_whose_equivalent_is_printed(kv_format: str) -> None:
    message = error_of(f"nvfp4_default-kv_{kv_format}_cast")
    assert yaml.safe_load(message.partition("\n")[2])["kv_cache"] == {
        "format": kv_format,
        "scale": "cast",
    }


@pytest.mark.parametrize("name", ["fp8", "nvfp4_default-kv_nvfp4", "int4_awq"])
def test_other_names_are_unknown(name: str) -> None:
    assert "no such recipe" in error_of(name)


def test_llm_compressor(tmp_path: Path) -> None:
    text = (
        "default_stage:\n  default_modifiers:\n    QuantizationModifier:\n"
        "      targets: [Linear]\n      scheme: NVFP4A16\n"
        "      ignore: [lm_head, 're:.*mlp.gate$', 're:.*self_attn.*', 're:.*linear_attn.*']\n"
    )
    message = error_in(text, tmp_path)
    assert "a recipe of llm-compressor" in message
    ours = yaml.safe_load(message.partition("\n")[2])
    assert ours["quantize_if_present"] == ["experts", "shared_experts", "mlp"]
    assert ours["activations"] == "none"


@pytest.mark.parametrize(("inputs", "activations"), [("null", "none"), ("{num_bits: 4}", "nvfp4")])
def test_groups_of_llm_compressor(inputs: str, activations: str, tmp_path: Path) -> None:
    group = (
        "{targets: [Linear], weights: {num_bits: 4, type: float, group_size: 16}, "
        f"input_activations: {inputs}}}"
    )
    ignore = "['re:.*self_attn.*', 're:.*linear_attn.*', 're:.*shared_expert.*', lm_head]"
    text = (
        "stage: {modifiers: {QuantizationModifier: "
        f"{{config_groups: {{group_0: {group}}}, ignore: {ignore}}}}}}}\n"
    )
    ours = yaml.safe_load(error_in(text, tmp_path).partition("\n")[2])
    assert ours["quantize_if_present"] == ["experts", "mlp"]
    assert activations in str(ours["activations"])
    message = error_in(text.replace("group_size: 16", "group_size: 32"), tmp_path)
    assert "config_groups" in message
