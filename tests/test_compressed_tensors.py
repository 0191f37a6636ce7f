# SPDX-License-Identifier: Apache-2.0
"""Outputs in the compressed-tensors layout, against the library that owns it.

The judge is never fourfold's own reader alone: the tensors of the other layout, transformers'
loader, and the library's own dequantizer and converter read what fourfold writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert import (
    CompressedTensorsDequantizer,
    ModelOptNvfp4Converter,
    convert_checkpoint,
)
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import fourfold
from conftest import Written
from families import FAMILIES, quiet, read_back
from fourfold.errors import PlanError
from fourfold.evaluation.simulated_kv_cache import find_kv_cache
from fourfold.formats.scheme import Scheme
from fourfold.layouts import LAYOUTS
from fourfold.layouts.base import CheckpointContents
from fourfold.models.inventory_builder import take_inventory
from fourfold.models.peculiarities import NONE, peculiarities_of
from fourfold.sources.decoded import open_decoded
from jobs import assert_same, flat, ids_file, start, start_command
from nvfp4_folders import tensors_of
from test_ranks import on_ranks

ROLES = "quantize_if_present: [experts, shared_experts, mlp, attention, lm_head]"
W4A16 = f"weights: {{format: nvfp4, scale: mse}}\n{ROLES}"
EXPERTS = "weights: {format: nvfp4, scale: max}\nquantize: [experts]"
W4A4 = f"{W4A16}\nactivations: {{format: nvfp4}}\nkv_cache: {{format: fp8, scale: calibrated}}"
CONSTANT = (
    f"{W4A16}\nactivations: {{format: nvfp4, amax: constant}}\n"
    "kv_cache: {format: fp8, scale: cast}"
)
MIXED = """
rules:
- {roles: [experts], weights: {format: nvfp4, scale: mse}}
- roles: [attention, mlp]
  weights: {format: nvfp4, scale: mse}
  activations: {format: nvfp4, amax: constant}
"""
SUFFIXES = {
    "weight": "weight_packed",
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}
IDS = torch.arange(3, 19)[None]

Quantize = Callable[..., Path]


@pytest.fixture
def quantize(written: Written, tmp_path: Path) -> Quantize:
    """Quantize a family's tiny checkpoint, in a layout, into a folder of that name."""

    def run(family: str, text: str, layout: str = "compressed-tensors") -> Path:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{text}\nlayout: {layout}\n")
        needs_data = fourfold.Recipe.load(str(recipe)).needs_calibration
        data = {"calib": [ids_file(tmp_path)], "calib_seq": 24, "calib_size": 4}
        result = fourfold.quantize(
            written(family)[0],
            tmp_path / layout,
            recipe,
            **flat(threads=1, **data if needs_data else {}),
        )
        assert result.clean, str(result.report)
        return tmp_path / layout

    return run


def stated(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


# ------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("qwen3_moe", W4A4), ("mixtral", EXPERTS), ("gpt_oss", EXPERTS), ("deepseek_v3", CONSTANT)],
)
def test_the_tensors_are_those_of_the_other_layout(
    family: str, recipe: str, quantize: Quantize
) -> None:
    ours = tensors_of(quantize(family, recipe))
    theirs = tensors_of(quantize(family, recipe, "modelopt"))
    linears = [key.removesuffix(".weight_scale_2") for key in theirs if key.endswith("scale_2")]
    assert linears
    for name in linears:
        for leaf, own in SUFFIXES.items():
            tensor = theirs.pop(f"{name}.{leaf}", None)
            if tensor is None:
                assert leaf == "input_scale"
                assert f"{name}.{own}" not in ours
                continue
            if leaf in ("weight_scale_2", "input_scale"):
                tensor = 1 / tensor.reshape(1)
                assert ours[f"{name}.{own}"].shape == (1,)
            assert same(ours.pop(f"{name}.{own}"), tensor)
    for key in [key for key in ours if key.endswith(("k_scale", "v_scale"))]:
        module, _, leaf = key.rpartition(".")
        scale = ours.pop(key)
        assert scale.shape == (1,)
        calibrated = theirs.pop(f"{module}.{leaf[0]}_proj.{leaf}", torch.ones(()))
        assert same(scale, calibrated.reshape(1))
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)


def test_the_library_s_own_converter_gives_the_same(quantize: Quantize, tmp_path: Path) -> None:
    ours = tensors_of(quantize("qwen3_moe", W4A4))
    modelopt = quantize("qwen3_moe", W4A4, "modelopt")
    kv = QuantizationConfig.model_validate(stated(tmp_path / "compressed-tensors")).kv_cache_scheme
    assert kv is not None
    kv.scale_dtype = torch.float32
    converter = ModelOptNvfp4Converter(kv_cache_scheme=kv)
    theirs = {}
    for file in sorted(modelopt.glob("model-*.safetensors")):
        theirs |= converter.process(load_file(file))
    for key in list(theirs):
        stem, _, leaf = key.rpartition(".")
        if leaf in ("k_scale", "v_scale"):  # it leaves their names as they are
            theirs[f"{stem.rpartition('.')[0]}.{leaf}"] = theirs.pop(key)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)


# --------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(("recipe", "preset"), [(W4A16, NVFP4A16), (CONSTANT, NVFP4)])
def test_the_library_reads_the_configuration(recipe: str, preset: dict, quantize: Quantize) -> None:
    out = quantize("qwen3_moe", recipe)
    config = QuantizationConfig.model_validate(stated(out))
    (group,) = config.config_groups.values()
    wanted = QuantizationScheme(**preset, targets=group.targets, format=group.format)
    assert group.model_dump_json() == wanted.model_dump_json()
    assert config.quantization_status == "compressed"
    assert config.format == group.format == "nvfp4-pack-quantized"
    assert (config.kv_cache_scheme is None) == (recipe is W4A16)
    assert "Linear" in group.targets
    assert config.ignore == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert not (out / "hf_quant_config.json").exists()


def test_experts_that_stay_are_one_expression(quantize: Quantize) -> None:
    out = quantize("qwen3_moe", W4A16.replace("experts, shared_experts", "shared_experts"))
    experts = [entry for entry in stated(out)["ignore"] if "experts" in entry]
    assert experts == [rf"re:(.*\.)?layers\.{layer}\.mlp\.experts\." for layer in (1, 2)]


def test_schemes_that_differ_are_groups_of_their_own(quantize: Quantize) -> None:
    out = quantize("qwen3_moe", MIXED)
    one, other = stated(out)["config_groups"].values()
    assert {one["input_activations"] is None, other["input_activations"] is None} == {True, False}
    report = fourfold.verify(out)
    assert report.quant_algo == "MIXED_PRECISION"
    experts = one if one["input_activations"] is None else other
    assert experts["targets"] == [rf"re:(.*\.)?layers\.{layer}\.mlp\.experts\." for layer in (1, 2)]
    tensors = tensors_of(out)
    assert "model.layers.1.self_attn.q_proj.input_global_scale" in tensors
    assert not any(".experts." in key and "input_global" in key for key in tensors)


def test_groups_that_no_targets_tell_apart() -> None:
    """One of the parts that engines fuse is in another group; `plan` says so in other words."""
    names = [f"model.layers.1.self_attn.{last}" for last in ("q_proj", "k_proj", "v_proj")]
    layout, scheme = LAYOUTS["compressed-tensors"], Scheme("nvfp4", "max")
    alike, other = dict.fromkeys(names, scheme), replace(scheme, activations="nvfp4")
    layout.check(alike, NONE)
    with pytest.raises(PlanError, match="no targets tell the groups of the layout apart"):
        layout.check(alike | {names[0]: other}, NONE)
    gated = alike | {"model.layers.1.self_attn.gate_proj": other}
    layout.check(gated, NONE)
    with pytest.raises(PlanError, match="no targets tell the groups of the layout apart"):
        layout.check(gated, peculiarities_of("beam"))  # whose engines fuse the gate, too


def test_names_that_begin_otherwise_are_told_apart() -> None:
    """MTP layers count from 0 as the decoder's do."""
    names = [f"{stack}.0.mlp.experts.0.up_proj" for stack in ("model.layers", "mtp.layers")]
    scheme = Scheme("nvfp4", "max")
    schemes = {names[0]: scheme, names[1]: replace(scheme, activations="nvfp4")}
    LAYOUTS["compressed-tensors"].check(schemes, NONE)
    config = LAYOUTS["compressed-tensors"].quantization_config(
        CheckpointContents(schemes, [], None)
    )
    decoder, mtp = config["config_groups"].values()
    assert mtp["targets"] == [r"re:(.*\.)?mtp\.layers\.0\.mlp\.experts\."]
    wrappers = "model|language_model|text_model|thinker|backbone|transformer"
    assert decoder["targets"] == [rf"re:(({wrappers})\.)*layers\.0\.mlp\.experts\."]


def test_a_kv_cache_in_nvfp4_is_refused(written: Written, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{EXPERTS}\nkv_cache: {{format: nvfp4}}\nlayout: compressed-tensors\n")
    with pytest.raises(PlanError, match="cannot state the format nvfp4"):
        fourfold.plan(written("qwen3_moe")[0], recipe)


# --------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_transformers_loads_a_dense_model(family: str, quantize: Quantize) -> None:
    """The library rounds dequantized weights to BF16, and so does `load` by default."""
    out = quantize(family, CONSTANT)
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(
            out,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
        logits = fourfold.load(out).float()(IDS).logits
        assert (theirs(IDS).logits - logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "mixtral",
        "deepseek_v3",
        pytest.param("qwen3_5_moe_text", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", marks=pytest.mark.slow),
        pytest.param("olmoe", marks=pytest.mark.slow),
        pytest.param("glm4_moe", marks=pytest.mark.slow),
        pytest.param("nemotron_h", marks=pytest.mark.slow),
        pytest.param("phimoe", marks=pytest.mark.slow),
        pytest.param("lfm2_moe", marks=pytest.mark.slow),
        pytest.param("jamba", marks=pytest.mark.slow),
        pytest.param("minimax_m2", marks=pytest.mark.slow),
        pytest.param("qwen3_next", marks=pytest.mark.slow),
    ],
)
def test_the_library_s_dequantizer_gives_the_same_model(
    family: str, quantize: Quantize, tmp_path: Path
) -> None:
    """transformers 5.23 drops the global scales of experts, so the library writes BF16 first."""
    out = quantize(family, W4A16)
    convert_checkpoint(out, tmp_path / "bf16", CompressedTensorsDequantizer(out))
    with quiet(), torch.no_grad():
        theirs, _ = read_back(FAMILIES[family], tmp_path / "bf16")
        logits = fourfold.load(out).float()(IDS).logits
        assert (theirs.float()(IDS).logits - logits).abs().max() < 1e-5


# ----------------------------------------------------------------------------- whole runs


def test_convert_there_and_back(quantize: Quantize, tmp_path: Path) -> None:
    """Codes, block scales and copies stay; numbers come back within the reciprocal's rounding."""
    first = quantize("qwen3_moe", W4A4, "modelopt")
    fourfold.convert(first, tmp_path / "there", layout="compressed-tensors")
    ours = tensors_of(quantize("qwen3_moe", W4A4))
    there = tensors_of(tmp_path / "there")
    assert ours.keys() == there.keys()
    assert all(same(ours[key], there[key]) for key in ours)
    assert stated(tmp_path / "there") == stated(tmp_path / "compressed-tensors")
    assert fourfold.verify(tmp_path / "there").clean
    fourfold.convert(tmp_path / "there", tmp_path / "back", layout="modelopt")
    back, before = tensors_of(tmp_path / "back"), tensors_of(first)
    assert back.keys() == before.keys()
    for key, tensor in before.items():
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(back[key], tensor, rtol=2e-7, atol=0)
        else:
            assert same(back[key], tensor)


def test_convert_states_every_scale_of_a_kv_cache(quantize: Quantize, tmp_path: Path) -> None:
    first = quantize("qwen3_moe", CONSTANT, "modelopt")
    assert not any("k_scale" in key for key in tensors_of(first))
    fourfold.convert(first, tmp_path / "there", layout="compressed-tensors")
    there = tensors_of(tmp_path / "there")
    scales = [tensor for key, tensor in there.items() if key.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 6
    assert all(tensor.tolist() == [1.0] for tensor in scales)


def test_what_a_killed_run_and_ranks_write(written: Written, tmp_path: Path) -> None:
    """The same bytes as one run on one process, KV scales and all."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{CONSTANT}\nlayout: compressed-tensors\n")
    model, options = written("qwen3_moe")[0], {"threads": 1, "verify": False, "shards": 2}
    fourfold.quantize(model, tmp_path / "out", recipe, **flat(**options))
    for kill_at in (40, 20, 0):
        process = start(model, tmp_path / "killed", recipe, kill_at=kill_at, **options)
        process.join()
        assert bool(process.exitcode) == bool(kill_at)
    assert_same(tmp_path / "out", tmp_path / "killed")
    words = ["quantize", model, tmp_path / "ranks", "--recipe", recipe, "--threads", 1]
    for code, _, err in on_ranks([*words, "--shards", 2, "--no-verify"]):
        assert code == 0, err
    assert_same(tmp_path / "out", tmp_path / "ranks")
    merged = fourfold.merge([tmp_path / "ranks"], tmp_path / "merged", shards=1)
    assert merged.report is not None
    assert merged.report.clean
    ours, theirs = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[key], theirs[key]) for key in ours)


def test_load_rounds_as_for_the_other_layout(quantize: Quantize) -> None:
    """Inputs by their scales, keys and values by calibrated ones."""
    logits = {}
    for layout in ("compressed-tensors", "modelopt"):
        out = quantize("qwen3_moe", W4A4, layout)
        with torch.no_grad():
            model = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
            logits[layout] = model(IDS).logits
            plain = fourfold.load(out, dtype=torch.float32)(IDS).logits
    assert (logits["modelopt"] - plain).abs().max() > 1e-2
    torch.testing.assert_close(*logits.values(), rtol=1e-4, atol=1e-4)


def test_scales_of_keys_and_values_are_found(quantize: Quantize) -> None:
    """Of the wrong ones the logits tell little: they are compared as they are found."""
    scales = {}
    for layout in ("compressed-tensors", "modelopt"):
        with closing(open_decoded(quantize("qwen3_moe", W4A4, layout))) as checkpoint:
            kv_cache = find_kv_cache(checkpoint, take_inventory(checkpoint))
            assert kv_cache is not None
            scales[layout] = kv_cache.scales
    assert scales["modelopt"] == scales["compressed-tensors"]
    assert len(scales["modelopt"]) == 3
    assert (1.0, 1.0) not in scales["modelopt"].values()


def test_commands_read_it(quantize: Quantize, tmp_path: Path) -> None:
    out = quantize("qwen3_moe", CONSTANT)
    with torch.no_grad():
        plain = fourfold.load(out, dtype=torch.float32)(IDS).logits
        model = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
        rounded = model(IDS).logits
    assert 0 < (plain - rounded).abs().max() < plain.abs().max()
    for words in (["summary", out], ["report", out], ["verify", out], ["inspect", out]):
        process = start_command(*words)
        text, err = process.communicate()
        assert process.returncode == 0, err
        assert text
    card = (out / "README.md").read_text()
    assert "that of compressed-tensors" in card
    assert "Verified after it was written" in card


def test_a_source_in_this_layout_is_quantized_again(quantize: Quantize, tmp_path: Path) -> None:
    """It is decoded; the output is in the default layout and knows nothing of the source's."""
    out = quantize("qwen3_moe", W4A16)
    recipe = tmp_path / "again.yaml"
    recipe.write_text(EXPERTS)
    result = fourfold.quantize(out, tmp_path / "again", recipe)
    assert result.clean, str(result.report)
    assert stated(tmp_path / "again")["quant_method"] == "modelopt"
