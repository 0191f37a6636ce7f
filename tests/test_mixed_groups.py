# SPDX-License-Identifier: Apache-2.0
"""FP8 beside NVFP4 in the compressed-tensors layout, against the library that owns it.

The library's presets, its dequantizer and transformers' loader read what fourfold writes; the
tensors are those of the other layout, and conversions between the two keep codes and scales.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import (
    FP8,
    FP8_BLOCK,
    FP8_DYNAMIC,
    MXFP8,
    NVFP4A16,
)
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeForCausalLM,
)

import fourfold
from conftest import Written
from families import FAMILIES, quiet, read_back
from fourfold.errors import PlanError, SourceError
from jobs import assert_same, start
from nvfp4_folders import Tensors, changed, tensors_of
from test_compressed_tensors import same, stated
from test_mixed import RECIPES, calibration, tiny
from test_ranks import on_ranks

PRESETS = {"fp8": FP8, "fp8_channel": FP8_DYNAMIC, "fp8_block": FP8_BLOCK, "mxfp8": MXFP8}
FORMATS = dict.fromkeys(PRESETS, "float-quantized") | {"mxfp8": "mxfp8-quantized"}
RENAMED = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2"}
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 128×128 block in some weights, and several in others."""
    folder = tmp_path_factory.mktemp("moe") / "source"
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny()).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, vocab_size=128, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense") / "source"
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def rest(name: str) -> str:
    """What a rule says of linear weights in an FP8 format; no calibration is needed."""
    constant = ", amax: constant" if name == "fp8" else ""
    return f"weights: {{format: {name}, scale: max}}, activations: {{format: {name}{constant}}}"


def recipe(
    folder: Path, name: str, layout: str = "compressed-tensors", nvfp4: str = "experts"
) -> Path:
    """The roles `nvfp4` in NVFP4, and an FP8 format for all others."""
    file = folder / f"{name}-{layout}.yaml"
    file.write_text(
        f"rules:\n- {{roles: [{nvfp4}], weights: {{format: nvfp4}}}}\n"
        "- {roles_if_present: [mlp, shared_experts, attention, lm_head], "
        f"{rest(name)}}}\nlayout: {layout}\n"
    )
    return file


def quantized(source: Path, folder: Path, name: str, **options: str) -> Path:
    file = recipe(folder, name, **options)
    out = folder / file.stem
    result = fourfold.quantize(source, out, file)
    assert result.report is not None
    assert not result.report.findings, str(result.report)
    return out


def decoded_by_the_library(out: Path, folder: Path) -> Path:
    """A BF16 checkpoint. The converter refuses the scales of inputs, and files beside the index."""

    def without_input_scales(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(("input_scale", "input_global_scale"))]:
            del tensors[key]

    plain = changed(out, folder / "plain", without_input_scales)
    (plain / "calibration.safetensors").unlink(missing_ok=True)
    convert_checkpoint(plain, folder / "bf16", CompressedTensorsDequantizer(plain))
    return folder / "bf16"


# ------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("name", PRESETS)
def test_the_groups_are_the_library_s_presets(name: str, moe: Path, tmp_path: Path) -> None:
    config = stated(quantized(moe, tmp_path, name))
    assert config["format"] == "mixed-precision"
    parsed = QuantizationConfig.model_validate(config)
    groups = {group.format: group for group in parsed.config_groups.values()}
    wanted = {"nvfp4-pack-quantized": NVFP4A16, FORMATS[name]: PRESETS[name]}
    assert groups.keys() == wanted.keys()
    for form, preset in wanted.items():
        scheme = QuantizationScheme(**preset, targets=groups[form].targets, format=form)
        assert groups[form].model_dump_json() == scheme.model_dump_json()
    assert groups["nvfp4-pack-quantized"].targets == [
        rf"re:(.*\.)?layers\.{layer}\.mlp\.experts\." for layer in (1, 2)
    ]
    assert r"re:(.*\.)?lm_head$" in groups[FORMATS[name]].targets


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{roles: [experts]}\n- {roles: [attention], weights: {format: fp8, scale: max}}",
         r"compressed-tensors layout cannot say fp8\. Choose activations: \{format: fp8\}"),
        (f"{{roles: [experts], {rest('mxfp8')}}}", "and no weight NVFP4"),
        ("{roles: [experts], weights: {format: nvfp4}, activations: {format: fp8}}",
         r"cannot say nvfp4 with fp8 activations\. Choose activations: none, or"),
    ],
)  # fmt: skip
def test_what_the_layout_cannot_say(rules: str, message: str, moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"rules:\n- {rules}\nlayout: compressed-tensors\n")
    with pytest.raises(PlanError, match=message):
        fourfold.plan(moe, file)


# -------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", RECIPES)
def test_a_built_in_recipe(name: str, moe: Path, tmp_path: Path) -> None:
    """The tensors are those of the other layout, and the library's model is that of `load`."""
    text = (files("fourfold.recipes") / f"{name}.yaml").read_text()
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{text}layout: compressed-tensors\n")
    needs_data = fourfold.Recipe.load(str(file)).needs_calibration
    data = calibration(tmp_path) if needs_data else None
    result = fourfold.quantize(moe, tmp_path / "out", file, calibration=data)
    assert result.report is not None
    assert not result.report.findings, str(result.report)
    ours = tensors_of(tmp_path / "out")
    fourfold.quantize(moe, tmp_path / "modelopt", name, calibration=data)
    theirs = tensors_of(tmp_path / "modelopt")
    for key, tensor in ours.items():
        stem, _, leaf = key.rpartition(".")
        is_reciprocal = leaf.endswith("global_scale")
        leaf = leaf.replace("input_global_scale", "input_scale")
        other = theirs.pop(f"{stem}.{RENAMED.get(leaf, leaf)}")
        assert same(tensor, 1 / other if is_reciprocal else other), key
    assert not theirs
    with quiet(), torch.no_grad():
        bf16 = decoded_by_the_library(tmp_path / "out", tmp_path)
        logits = Qwen3MoeForCausalLM.from_pretrained(bf16, dtype=torch.float32)(IDS).logits
        assert (fourfold.load(tmp_path / "out").float()(IDS).logits - logits).abs().max() < 1e-5


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "fp8"),
        ("mixtral", "mxfp8"),
        ("deepseek_v3", "fp8_channel"),
        pytest.param("qwen2_moe", "mxfp8", marks=SLOW),
        pytest.param("qwen3_5_moe_text", "fp8_channel", marks=SLOW),
        pytest.param("olmoe", "fp8", marks=SLOW),
        pytest.param("glm4_moe", "fp8_channel", marks=SLOW),
        pytest.param("nemotron_h", "fp8", marks=SLOW),
        pytest.param("phimoe", "mxfp8", marks=SLOW),
        pytest.param("lfm2_moe", "fp8_channel", marks=SLOW),
        pytest.param("jamba", "fp8", marks=SLOW),
        pytest.param("minimax_m2", "mxfp8", marks=SLOW),
        pytest.param("qwen3_next", "fp8_channel", marks=SLOW),
    ],
)
def test_the_library_s_dequantizer_gives_the_same_model(
    family: str, name: str, written: Written, tmp_path: Path
) -> None:
    result = fourfold.quantize(written(family)[0], tmp_path / "out", recipe(tmp_path, name))
    assert result.clean, str(result.report)
    formats = {scheme.weights for scheme in result.plan.schemes.values()}
    assert formats == {"nvfp4", name}
    bf16 = decoded_by_the_library(tmp_path / "out", tmp_path)
    with quiet(), torch.no_grad():
        theirs, _ = read_back(FAMILIES[family], bf16)
        logits = fourfold.load(tmp_path / "out").float()(IDS).logits
        assert (theirs.float()(IDS).logits - logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_dequantizes_fp8_layers(name: str, moe: Path, tmp_path: Path) -> None:
    """All but the experts, whose global scales transformers 5.23 leaves out."""
    out = quantized(moe, tmp_path, name)
    config = CompressedTensorsConfig(dequantize=True)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, quantization_config=config
        ).state_dict()
    ours = fourfold.load(out, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert ".experts." in key or torch.equal(theirs[key], tensor), key


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_loads_a_dense_model(name: str, dense: Path, tmp_path: Path) -> None:
    """With `dequantize=True` it reads all layers by one group. Without, it decodes each by its own,
    and rounds FP32 scales to BF16."""
    out = quantized(dense, tmp_path, name, nvfp4="mlp")
    with quiet(), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        logits = theirs(IDS).logits
        rounded = fourfold.load(out, simulate_activations=True)(IDS).logits
    for key, tensor in fourfold.load(out).state_dict().items():
        wrong = (theirs.state_dict()[key].float() - tensor.float()).abs()
        assert bool((wrong <= 2**-7 * tensor.float().abs()).all()), key
        assert name != "mxfp8" or not wrong.any()
    if name == "mxfp8":  # scales that BF16 holds: the same numbers, inputs rounded likewise
        assert torch.equal(logits, rounded)


@pytest.mark.parametrize("name", PRESETS)
def test_load_rounds_inputs_as_for_the_other_layout(name: str, moe: Path, tmp_path: Path) -> None:
    sites = []
    for layout in ("compressed-tensors", "modelopt"):
        out = quantized(moe, tmp_path, name, layout=layout)
        model = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
        sites.append(model.fourfold_simulation.sites.linears)
    assert sites[0] == sites[1]
    assert {rounding.format for rounding in sites[0].values()} == {name}


# ---------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", PRESETS)
def test_convert_there_and_back(name: str, moe: Path, tmp_path: Path) -> None:
    """FP8 comes back bit for bit, and NVFP4 but for the rounding of reciprocals."""
    first = quantized(moe, tmp_path, name, layout="modelopt")
    fourfold.convert(first, tmp_path / "there", layout="compressed-tensors")
    direct = quantized(moe, tmp_path, name)
    there, ours = tensors_of(tmp_path / "there"), tensors_of(direct)
    assert there.keys() == ours.keys()
    for key, tensor in ours.items():
        assert there[key].shape == tensor.shape
        assert same(there[key], tensor), key
    assert stated(tmp_path / "there") == stated(direct)
    assert not fourfold.verify(tmp_path / "there", source=moe).findings
    fourfold.convert(tmp_path / "there", tmp_path / "back", layout="modelopt")
    back, before = tensors_of(tmp_path / "back"), tensors_of(first)
    assert back.keys() == before.keys()
    for key, tensor in before.items():
        assert back[key].shape == tensor.shape
        if key.endswith("weight_scale_2"):
            torch.testing.assert_close(back[key], tensor, rtol=2e-7, atol=0)
        else:
            assert same(back[key], tensor), key
    assert json.loads((tmp_path / "back/hf_quant_config.json").read_text()) == json.loads(
        (first / "hf_quant_config.json").read_text()
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [("fp8_channel", "16-bit scales"), ("fp8_channel", "a static scale"), ("mxfp8", "no inputs")],
)
def test_convert_says_what_it_cannot_keep(name: str, what: str, moe: Path, tmp_path: Path) -> None:
    """Others write FP8 that no format here has as it is."""
    attention = "model.layers.0.self_attn.q_proj"

    def edit(tensors: Tensors) -> None:
        scale = tensors.get(f"{attention}.weight_scale")
        if scale is not None and what == "16-bit scales":
            tensors[f"{attention}.weight_scale"] = scale.bfloat16()
        elif scale is not None and what == "a static scale":
            tensors[f"{attention}.input_scale"] = torch.ones(1)

    out = changed(quantized(moe, tmp_path, name), tmp_path / "changed", edit)
    if what == "no inputs":
        config = json.loads((out / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"FP8.*, which is not carried over to another layout"):
        fourfold.convert(out, tmp_path / "out", layout="modelopt")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_and_ranks_write(moe: Path, tmp_path: Path) -> None:
    file, options = recipe(tmp_path, "fp8"), {"threads": 1, "verify": False, "shards": 2}
    output = fourfold.OutputConfig(verify=False, shards=2)
    fourfold.quantize(moe, tmp_path / "out", file, output=output)
    for kill_at in (40, 0):
        process = start(moe, tmp_path / "killed", file, kill_at=kill_at, **options)
        process.join()
        assert bool(process.exitcode) == bool(kill_at)
    assert_same(tmp_path / "out", tmp_path / "killed")
    words = ["quantize", moe, tmp_path / "ranks", "--recipe", file, "--threads", 1]
    for code, _, err in on_ranks([*words, "--shards", 2, "--no-verify"]):
        assert code == 0, err
    assert_same(tmp_path / "out", tmp_path / "ranks")


def test_a_source_in_this_layout_keeps_its_fp8(moe: Path, tmp_path: Path) -> None:
    """The codecs read it; FP8 that stays FP8 keeps its codes in the other layout, too."""
    source = quantized(moe, tmp_path, "fp8_channel")
    out = quantized(source, tmp_path, "fp8_channel", layout="modelopt")
    before, after = tensors_of(source), tensors_of(out)
    fp8 = [key for key, tensor in before.items() if tensor.dtype == torch.float8_e4m3fn]
    weights = [key for key in fp8 if key.endswith(".weight")]
    assert len(weights) == 16
    for key in weights:
        assert same(before[key], after[key])
        assert same(before[f"{key}_scale"], after[f"{key}_scale"])
