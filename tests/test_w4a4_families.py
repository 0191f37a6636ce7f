"""W4A4 for every family: each recipe's output verifies clean, and its scales are what they should.

Scales are judged by the checkpoint alone: one `input_scale` for all that reads one activation,
positive, and for a family whose whole model fits, what plain hooks on that model give.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

import fourfold
from families import FAMILIES, Truth, write_checkpoint
from fourfold.api import plan
from fourfold.sources.safetensors import open_source

Written = Callable[[str], tuple[Path, Truth]]

RECIPES = [
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_mlp_only_mse-fp8_cast_kv",
    "nvfp4_default_mse-fp8_kv",
]

NAMED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_5_moe_vl",
    "deepseek_v3",
    "glm4_moe",
    "olmoe",
    "jamba",
    "gpt_oss",
    "nemotron_h",
    "minimax_m2",
    "llama4",
]
"""Every recipe for these, but in turns: the widest and one other, the rest in the slow suite. The
widest one for all others."""

DENSE = ["qwen3", "llama", "qwen3_tied", "llama_unnamed"]

REFUSED = {
    "jetmoe": (fourfold.PlanError, "JetMoeParallelExperts"),
    "ernie4_5_vl_moe": (fourfold.ObservationError, "vision_moe"),
    "openai_privacy_filter": (fourfold.ObservationError, "no keys and values"),
    "nllb_moe": (fourfold.ObservationError, "no keys and values"),
    "diffusion_gemma": (fourfold.ObservationError, "no keys and values"),
    "longcat_flash_zero": (fourfold.ModelError, "the architecture says"),
}
"""Families that a text alone cannot calibrate, or only without a KV cache; and why."""

CASES = [(name, RECIPES[-1]) for name in FAMILIES] + [
    pytest.param(name, recipe, marks=[] if turn == place % 4 else pytest.mark.slow)
    for place, name in enumerate(NAMED)
    for turn, recipe in enumerate(RECIPES[:-1])
]


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids that every tiny model knows."""
    file = tmp_path_factory.mktemp("calib") / "ids.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (30 + n % 7,), generator=generator) for n in range(30)]
    file.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    return file


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, framework="pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_every_family(
    name: str, recipe: str, written: Written, calib: Path, tmp_path: Path
) -> None:
    folder, _ = written(name)
    out = tmp_path / "out"
    options = {"calib": [calib], "calib_size": 9, "calib_seq": 24, "batch_size": 3, "threads": 1}
    if name in REFUSED:
        error, words = REFUSED[name]
        with pytest.raises(error, match=words):
            fourfold.quantize(folder, out, recipe, **options)
        assert not out.exists()
        return
    result = fourfold.quantize(folder, out, recipe, **options)
    assert result.clean, str(result.report)
    assert result.report.counts.input_scales == len(result.linears)
    alone = fourfold.verify(out)
    assert alone.clean, str(alone)
    check_scales(folder, out, recipe)


def check_scales(folder: Path, out: Path, recipe: str) -> None:
    tensors = read_all(out)
    sites: dict[str, set[float]] = defaultdict(set)
    for linear in plan(open_source(folder), recipe).linears:
        scale = tensors[f"{linear.name}.input_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == ()
        assert 0 < float(scale) < float("inf")
        sites[linear.input_site].add(float(scale))
    assert all(len(scales) == 1 for scales in sites.values())
    kv = [name for name in tensors if name.endswith((".k_scale", ".v_scale"))]
    assert bool(kv) <= recipe.endswith("-fp8_kv")
    assert all(0 < float(tensors[name]) < float("inf") for name in kv)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "NVFP4"
    assert config["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4
    assert ("kv_cache_scheme" in config) == ("-fp8" in recipe)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_want_a_wider_recipe(name: str, written: Written, tmp_path: Path) -> None:
    with pytest.raises(fourfold.RecipeError, match="has no experts"):
        fourfold.quantize(written(name)[0], tmp_path / "out", "nvfp4_experts_only")


@pytest.mark.parametrize("headroom", [0, 1, 6])
def test_headroom_is_a_power_of_two(
    headroom: int, written: Written, calib: Path, tmp_path: Path
) -> None:
    found = {}
    for name, amax in (("max", "max"), ("room", f"{{headroom: {headroom}}}")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"activations: {{amax: {amax}}}\nquantize: [experts]\n")
        options = {"calib": [calib], "calib_seq": 24, "threads": 1}
        assert fourfold.quantize(written("qwen3_moe")[0], tmp_path / name, file, **options).clean
        found[name] = {
            key: float(value)
            for key, value in read_all(tmp_path / name).items()
            if key.endswith(".input_scale")
        }
    assert found["max"]
    assert found["room"] == {key: value * 2**headroom for key, value in found["max"].items()}


def test_scales_are_what_plain_hooks_give(written: Written, calib: Path, tmp_path: Path) -> None:
    """Attention and the KV cache of a whole model: amax over rows, amax/2688, amax/448."""
    from transformers import AutoModelForCausalLM, DynamicCache

    folder, _ = written("qwen3_moe")
    result = fourfold.quantize(
        folder, tmp_path / "out", RECIPES[-1], calib=[calib], calib_size=9, calib_seq=24,
        batch_size=3, threads=1,
    )  # fmt: skip
    tensors = read_all(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    amax: dict[str, float] = defaultdict(float)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, path=path: amax.__setitem__(
                    path, max(amax[path], float(args[0].abs().max()))
                )
            )
    kv: dict[str, float] = defaultdict(float)
    for batch in batches_of(folder, calib):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**batch, past_key_values=cache, use_cache=True)
        for number, layer in enumerate(cache.layers):
            for kind, states in (("k", layer.keys), ("v", layer.values)):
                place = f"model.layers.{number}.self_attn.{kind}_proj.{kind}_scale"
                kv[place] = max(kv[place], float(states.abs().max()))
    linears = [x for x in result.linears if x.role == "attention"]
    assert linears
    for linear in linears:
        wanted = torch.tensor(amax[linear.name], dtype=torch.float32) / 2688
        assert torch.equal(tensors[f"{linear.name}.input_scale"], wanted), linear.name
    assert len(kv) == 6
    for place, largest in kv.items():
        wanted = torch.tensor(largest, dtype=torch.float32) / 448
        assert torch.equal(tensors[place], wanted), place


def batches_of(folder: Path, calib: Path) -> list[dict[str, torch.Tensor]]:
    from fourfold.calibration.data import CalibrationOptions, load_calibration

    options = CalibrationOptions((str(calib),), size=9, seq=24, batch_size=3)
    data = load_calibration(folder, options, vocab_size=96)
    return [
        {"input_ids": each.input_ids, "attention_mask": each.attention_mask}
        for each in data.batches
    ]


def test_values_that_are_keys(calib: Path, tmp_path: Path) -> None:
    """Gemma 4's full attention has no v_proj: k_proj makes both, and both get a scale."""
    family = FAMILIES["gemma4"]

    def build_config() -> PreTrainedConfig:
        config = family.build_config()
        config.text_config.attention_k_eq_v = True
        return config

    write_checkpoint(replace(family, build_config=build_config), tmp_path / "model")
    result = fourfold.quantize(
        tmp_path / "model", tmp_path / "out", RECIPES[-1], calib=[calib], calib_seq=24, threads=1
    )
    assert result.clean, str(result.report)
    attention = "model.language_model.layers.1.self_attn"
    tensors = read_all(tmp_path / "out")
    assert f"{attention}.v_proj.weight" not in tensors
    assert float(tensors[f"{attention}.k_proj.k_scale"]) > 0
    assert float(tensors[f"{attention}.v_proj.v_scale"]) > 0


def test_values_from_layers_that_engines_know_no_scale_for(written: Written) -> None:
    """Zaya's values come from two layers beside k_proj: there is no name for their scale."""
    work = plan(written("zaya")[0], RECIPES[-1])
    assert work.kv_scales == ()
