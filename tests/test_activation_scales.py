# SPDX-License-Identifier: Apache-2.0
"""Scales of activations: they are what plain hooks on the whole model give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import fourfold
from families import FAMILIES, Truth, write_checkpoint
from fourfold.api import plan
from fourfold.config import CalibrationConfig, Runtime
from jobs import flat, ids_file
from nvfp4_folders import tensors_of

Written = Callable[[str], tuple[Path, Truth]]

WIDEST = "nvfp4_default_mse-fp8_kv"

DENSE = ["qwen3", "llama", "qwen3_tied", "llama_unnamed"]


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ids_file(tmp_path_factory.mktemp("calib"))


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
        assert fourfold.quantize(
            written("qwen3_moe")[0], tmp_path / name, file, **flat(**options)
        ).clean
        found[name] = {
            key: float(value)
            for key, value in tensors_of(tmp_path / name).items()
            if key.endswith(".input_scale")
        }
    assert found["max"]
    assert found["room"] == {key: value * 2**headroom for key, value in found["max"].items()}


def test_scales_are_what_plain_hooks_give(written: Written, calib: Path, tmp_path: Path) -> None:
    """Attention and the KV cache of a whole model: amax over rows, amax/2688, amax/448."""
    from transformers import AutoModelForCausalLM, DynamicCache

    folder, _ = written("qwen3_moe")
    result = fourfold.quantize(
        folder,
        tmp_path / "out",
        WIDEST,
        calibration=CalibrationConfig(calib=[calib], calib_size=9, calib_seq=24, batch_size=3),
        runtime=Runtime(threads=1),
    )
    tensors = tensors_of(tmp_path / "out")
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
    from fourfold.calibration.data import load_calibration

    options = CalibrationConfig(calib, calib_size=9, calib_seq=24, batch_size=3)
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
        tmp_path / "model",
        tmp_path / "out",
        WIDEST,
        calibration=CalibrationConfig(calib=[calib], calib_seq=24),
        runtime=Runtime(threads=1),
    )
    assert result.clean, str(result.report)
    attention = "model.language_model.layers.1.self_attn"
    tensors = tensors_of(tmp_path / "out")
    assert f"{attention}.v_proj.weight" not in tensors
    assert float(tensors[f"{attention}.k_proj.k_scale"]) > 0
    assert float(tensors[f"{attention}.v_proj.v_scale"]) > 0


def test_values_from_layers_that_engines_know_no_scale_for(written: Written) -> None:
    """Zaya's values come from two layers beside k_proj: there is no name for their scale."""
    work = plan(written("zaya")[0], WIDEST)
    assert work.kv_scales == ()
