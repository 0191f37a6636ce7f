# SPDX-License-Identifier: Apache-2.0
"""Every family that transformers can build, in upstream's layout, from the plan to the proof.

The widest recipe goes through plan, calibration, quantize and verify once for each family. The
judge shares nothing with the writer: it reads OUT with the safetensors package, dequantizes with
its own table, and finds each matrix of the truth among the dequantized ones by its content alone.
Only then are the names looked at. The roles of all linear weights are pinned in `roles.json`, which
was read by people: a change there is a change of what recipes quantize. Write it anew with
`python tests/test_every_family.py`, and look at the difference.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fourfold
from families import FAMILIES, Truth, mostly_slow
from fourfold.config import CalibrationConfig, Runtime
from fourfold.events import PlanMade
from fourfold.models.inventory import Inventory
from fourfold.models.inventory_builder import take_inventory
from fourfold.planning import Plan
from fourfold.sources.safetensors import open_source
from jobs import flat, ids_file, only
from nvfp4_folders import (
    BOUND,
    Tensors,
    dequantized,
    linears_in,
    match,
    resembles,
    tensors_of,
    weight_map_of,
)

Written = Callable[[str], tuple[Path, Truth]]

ROLES = Path(__file__).with_name("roles.json")
WIDEST = "nvfp4_default_mse-fp8_kv"
WEIGHTS_ONLY = ["w4a16_nvfp4_experts_only", "w4a16_nvfp4_experts_only_mse"]

PROJECTIONS = {
    "gate": {"gate_proj", "w1"},
    "up": {"up_proj", "w3", "v1", "fc3", "wi", "fc1"},
    "down": {"down_proj", "w2", "fc2", "wo"},
}
UNCUT = {"jetmoe": "JetMoeParallelExperts"}
"""Families whose experts cannot be cut out: the error names this module class."""

UNCALIBRATED = {
    "ernie4_5_vl_moe": (fourfold.ObservationError, "vision_moe"),
    "openai_privacy_filter": (fourfold.ObservationError, "no keys and values"),
    "nllb_moe": (fourfold.ObservationError, "no keys and values"),
    "diffusion_gemma": (fourfold.ObservationError, "no keys and values"),
    "longcat_flash_zero": (fourfold.ModelError, "the architecture says"),
}
"""Families that a text alone cannot calibrate, or only without a KV cache, and why. Their weights
alone can be quantized."""

UNEVEN = {"ernie4_5_vl_moe"}
"""Experts of two widths in one list: without the source, verify takes them for damaged."""

MOE = [name for name, family in FAMILIES.items() if family.layout != "dense"]


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ids_file(tmp_path_factory.mktemp("calib"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, written: Written, calib: Path, tmp_path: Path) -> None:
    folder, out = written(name)[0], tmp_path / "out"
    plans: list[Plan] = []
    options = {
        "calib": [calib], "calib_size": 9, "calib_seq": 24, "batch_size": 3, "threads": 1,
        "on_event": only(PlanMade, lambda event: plans.append(event.plan)),
    }  # fmt: skip
    if name in UNCUT:
        refused(folder, out, fourfold.PlanError, UNCUT[name], options)
        inventory = take_inventory(open_source(folder))
    elif name in UNCALIBRATED:
        refused(folder, out, *UNCALIBRATED[name], options)
        inventory = check_weights(name, written, out, WEIGHTS_ONLY[1])
    else:
        result = fourfold.quantize(folder, out, WIDEST, **flat(**options))
        assert result.clean, str(result.report)
        check_output(name, written, out, result)
        check_scales(plans[0], out, WIDEST, result)
        inventory = plans[0].inventory
    assert roles_of(inventory) == json.loads(ROLES.read_text())[name]


def refused(folder: Path, out: Path, error: type[Exception], words: str, options: dict) -> None:
    with pytest.raises(error, match=words):
        fourfold.quantize(folder, out, WIDEST, **flat(**options))
    assert not out.exists()


@pytest.mark.parametrize("name", mostly_slow(name for name in MOE if name not in UNCUT))
@pytest.mark.parametrize("recipe", WEIGHTS_ONLY)
def test_weights_only(name: str, recipe: str, written: Written, tmp_path: Path) -> None:
    check_weights(name, written, tmp_path / "out", recipe)


def check_weights(name: str, written: Written, out: Path, recipe: str) -> Inventory:
    plans: list[Plan] = []
    result = fourfold.quantize(
        written(name)[0],
        out,
        recipe,
        on_event=only(PlanMade, lambda event: plans.append(event.plan)),
    )
    assert result.clean, str(result.report)
    check_output(name, written, out, result)
    return plans[0].inventory


def check_output(
    name: str, written: Written, out: Path, result: fourfold.Result, bound: float = BOUND
) -> None:
    alone, truth = fourfold.verify(out), written(name)[1]
    assert alone.clean or name in UNEVEN, str(alone)
    tensors = tensors_of(out)
    assert tensors.keys() == weight_map_of(out).keys()
    linears = {linear: dequantized(tensors, linear) for linear in linears_in(tensors)}
    of_experts = {linear.name for linear in result.linears if linear.role == "experts"}
    text = {key: value for key, value in truth.experts.items() if not is_tower(key[0])}
    matches = match({key: linears[key] for key in of_experts}, dict(text), bound)
    assert sorted(matches.values(), key=str) == sorted(text, key=str)
    for linear, expert in matches.items():
        check_name(linear, expert)
    for linear in linears.keys() - of_experts:
        assert resembles(linears[linear], truth.raw[f"{linear}.weight"], bound), linear
    check_ledger(truth, tensors, linears)


def is_tower(module: str) -> bool:
    return re.search(r"talker|vision_encoder|vision_tower", module) is not None


def check_name(linear: str, expert: object) -> None:
    module, number, projection = expert  # type: ignore[misc]
    parts = linear.split(".")
    assert parts[-1] in PROJECTIONS[projection]
    assert layer_of(linear) == layer_of(module)
    in_list = int(parts[-2].removeprefix("expert_"))
    # ERNIE 4.5 VL numbers its vision experts after its text experts.
    assert in_list == number or ("vision_moe" in module and in_list > number)


def layer_of(name: str) -> str | None:
    layer = re.search(r"(?:layers|blocks?|h)\.(\d+)\.", name)
    return layer.group(1) if layer else None


def check_ledger(truth: Truth, tensors: Tensors, linears: Tensors) -> None:
    """Every source tensor is there bit for bit, or its elements are in what was cut out of it."""
    kept = {
        key for key in truth.raw if key in tensors and key.removesuffix(".weight") not in linears
    }
    for key in kept:
        source, copy = truth.raw[key], tensors[key]
        assert source.dtype == copy.dtype
        assert torch.equal(source.view(torch.uint8), copy.view(torch.uint8)) or source.ndim == 0
    gone = sum(value.numel() for key, value in truth.raw.items() if key not in kept)
    leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    parts = {f"{linear}.{leaf}" for linear in linears for leaf in leaves}
    kv = {name for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    biases = set(tensors) - kept - parts - kv
    assert all(name.endswith(".bias") and ".experts." in name for name in biases)
    quantized = sum(value.numel() for value in linears.values())
    assert gone == quantized + sum(tensors[name].numel() for name in biases)


def check_scales(plan: Plan, out: Path, recipe: str, result: fourfold.Result) -> None:
    """One positive input scale for everything that reads one activation."""
    assert result.report is not None
    assert result.report.counts.input_scales == len(result.linears)
    tensors = tensors_of(out)
    sites: dict[str, set[float]] = defaultdict(set)
    for linear in plan.linears:
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


OTHER_RECIPES = [
    "nvfp4_experts_only",
    "nvfp4_experts_only_mse",
    "nvfp4_experts_only_mse-fp8_cast_kv",
    "nvfp4_mlp_only_mse-fp8_cast_kv",
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
"""The families that most people have. Each recipe for one of them; the rest in the slow suite."""


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=[] if turn == place else pytest.mark.slow)
        for place, name in enumerate(NAMED)
        for turn, recipe in enumerate(OTHER_RECIPES)
    ],
)
def test_other_recipes_with_activations(
    name: str, recipe: str, written: Written, calib: Path, tmp_path: Path
) -> None:
    plans: list[Plan] = []
    result = fourfold.quantize(
        written(name)[0],
        tmp_path / "out",
        recipe,
        on_event=only(PlanMade, lambda event: plans.append(event.plan)),
        calibration=CalibrationConfig(calib=[calib], calib_size=9, calib_seq=24, batch_size=3),
        runtime=Runtime(threads=1),
    )
    assert result.clean, str(result.report)
    check_scales(plans[0], tmp_path / "out", recipe, result)


NO_KV = {name for name, (_, words) in UNCALIBRATED.items() if words == "no keys and values"}


@pytest.mark.parametrize("name", mostly_slow(x for x in FAMILIES if x not in UNCUT))
def test_codes_by_calibration(name: str, written: Written, calib: Path, tmp_path: Path) -> None:
    """Layer after layer, codes and scales chosen with calibration data, activations rounded."""
    out, recipe = tmp_path / "out", "nvfp4_default_best"
    plans: list[Plan] = []
    options = {
        "calib": [calib], "calib_size": 9, "calib_seq": 24, "batch_size": 3, "threads": 1,
        "on_event": only(PlanMade, lambda event: plans.append(event.plan)),
    }  # fmt: skip
    if name in UNCALIBRATED.keys() - NO_KV:
        error, words = UNCALIBRATED[name]
        with pytest.raises(error, match=words):
            fourfold.quantize(written(name)[0], out, recipe, **flat(**options))
        assert not out.exists()
        return
    result = fourfold.quantize(written(name)[0], out, recipe, **flat(**options))
    assert result.clean, str(result.report)
    # Codes that make up for others' errors are farther from the weights, but not farther than this.
    check_output(name, written, out, result, bound=0.35)
    check_scales(plans[0], out, recipe, result)


def roles_of(inventory: Inventory) -> dict[str, list[str]]:
    """Role → names of its linear weights, numbers as `*`; experts' by their module alone."""
    by_role: dict[str, set[str]] = defaultdict(set)
    for linear in inventory.linears:
        by_role[linear.role.value].add(re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", linear.name))
    return {role: sorted(names) for role, names in sorted(by_role.items())}


if __name__ == "__main__":
    import tempfile

    from families import write_checkpoint

    pinned = {}
    for name, family in sorted(FAMILIES.items()):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(family, Path(folder))
            pinned[name] = roles_of(take_inventory(open_source(Path(folder))))
    ROLES.write_text(json.dumps(pinned, indent=1) + "\n")
