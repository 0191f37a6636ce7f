# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold.load` gives the model of the dequantized weights, parameter by parameter,
and that simulated activations are what a plain loop over tokens and experts computes from the
definition. The judge reads the checkpoint with the safetensors package and tables of its own.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourfold
from families import FAMILIES, LAYOUTS, Truth
from families.truth import experts_of, flatten, linears_of
from fourfold.config import OutputConfig
from fourfold.errors import ModelError, ResourceError, SourceError, UsageError
from fourfold.evaluation import loading
from numerics.activation_oracle import rounded
from nvfp4_folders import (
    Tensors,
    changed,
    dequantized,
    linears_in,
    match,
    tensors_of,
    with_input_scales,
)

Written = Callable[[str], tuple[Path, Truth]]
Made = Callable[..., Path]
EXPERTS, ALL = "w4a16_nvfp4_experts_only", "w4a16_nvfp4_default"


@pytest.fixture(scope="module")
def made(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Family's name and recipe -> its quantized checkpoint. Tests must not write into it."""

    @cache
    def make(name: str, recipe: str = EXPERTS) -> Path:
        out = tmp_path_factory.mktemp(f"{name}-out") / "out"
        fourfold.quantize(written(name)[0], out, recipe, output=OutputConfig(verify=False))
        return out

    return make


def logits(model: Any, **options: Any) -> Tensor:
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


# --- the weights --------------------------------------------------------------------------

NAMES = [*LAYOUTS, "inkling", "qwen3_moe_tied"]
DENSE_FUSED = {"inkling", "minimax_m3_vl"}
"""Families whose dense gate and up are fused on disk alone, or in memory alone."""

REFUSED = {"jetmoe", "longcat_flash_zero"}
"""Families whose experts cannot be cut out, or that transformers itself does not load."""

OTHERS = [
    name
    for name, family in FAMILIES.items()
    if name not in {*NAMES, *REFUSED} and family.layout != "dense" and not family.why_not
]


def check_parameters(name: str, truth: Truth, out: Path) -> None:
    """Each quantized linear layer is in the place of the weight that it resembles, and only it."""
    model = fourfold.load(out)
    tensors = tensors_of(out)
    weights = {linear: dequantized(tensors, linear) for linear in linears_in(tensors)}
    extra = {key.removesuffix(".weight") for key in truth.extra}
    own = {key: value for key, value in truth.weights.items() if not is_twice(key, truth)}
    matches = match({k: w for k, w in weights.items() if k not in extra}, dict(own))
    found = {**linears_of(model), **flatten(experts_of(model))}
    for linear, place in matches.items():
        assert torch.equal(found[place], weights[linear].to(found[place].dtype)), linear
    quantized = {place if isinstance(place, str) else place[0] for place in matches.values()}
    state = model.state_dict()
    assert state.keys() == truth.state.keys()
    for key, value in truth.state.items():
        assert state[key].dtype == value.dtype, key
        if not any(key.startswith(f"{module}.") for module in quantized):
            assert torch.equal(state[key], value), key
    for place, matrix in own.items():
        if place not in matches.values():
            assert torch.equal(found[place], matrix), place


def is_twice(place: object, truth: Truth) -> bool:
    """Experts that are linear layers of their own are in the truth as both."""
    return isinstance(place, tuple) and any(key.startswith(place[0]) for key in truth.linears)


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str, written: Written, made: Made) -> None:
    recipe = EXPERTS if name in DENSE_FUSED else ALL
    check_parameters(name, written(name)[1], made(name, recipe))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_parameters_of_every_other_family(name: str, written: Written, made: Made) -> None:
    recipe = EXPERTS if name in DENSE_FUSED else ALL
    check_parameters(name, written(name)[1], made(name, recipe))


def test_float32_gives_the_values_unrounded(made: Made) -> None:
    out = made("qwen3_moe")
    tensors = tensors_of(out)
    model = fourfold.load(out, dtype=torch.float32)
    found = flatten(experts_of(model))
    for linear in linears_in(tensors):
        layer, expert, leaf = re.search(r"layers\.(\d)\..*\.(\d)\.(\w+)_proj$", linear).groups()  # type: ignore[union-attr]
        place = (f"model.layers.{layer}.mlp.experts", int(expert), leaf)
        assert torch.equal(found[place], dequantized(tensors, linear))
    assert model.dtype == torch.float32


def test_it_is_an_ordinary_model_of_transformers(made: Made, tmp_path: Path) -> None:
    folder = changed(made("qwen3_moe"), tmp_path / "out", lambda tensors: None)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    model = fourfold.load(folder)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "fourfold_simulation")
    assert model.generation_config.repetition_penalty == 1.5
    assert model.name_or_path == str(folder)
    assert {value.device.type for value in model.parameters()} == {"cpu"}


def test_a_checkpoint_of_modelopt_loads_the_same(made: Made, tmp_path: Path) -> None:
    """Without fourfold's record, where names on disk are those of single experts."""
    out = made("mixtral")
    folder = changed(out, tmp_path / "foreign", lambda tensors: None)
    (folder / "quant_summary.json").unlink()
    ours, theirs = fourfold.load(out).state_dict(), fourfold.load(folder).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def drop(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key, None)


def add(key: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        if "lm_head.weight" in tensors:
            tensors[key] = torch.zeros(2)

    return change


NORM, EXPERT = "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop(f"{EXPERT}.weight_scale"), SourceError, f"{EXPERT}.weight_scale: missing, while"),
        (drop(NORM), SourceError, f"{NORM}: the checkpoint has no tensor for it"),
        (add("model.surplus.weight"), ModelError, "model.surplus.weight: the model has no place"),
        (add("model.surplus.bias"), ModelError, "no place for this tensor (1 in all)"),
    ],
)
def test_a_key_too_many_or_too_few_is_named(
    made: Made,
    tmp_path: Path,
    change: Callable[[Tensors], object],
    error: type[Exception],
    message: str,
) -> None:
    folder = changed(made("qwen3_moe"), tmp_path / "broken", change)
    with pytest.raises(error, match=re.escape(message)):
        fourfold.load(folder)


def test_a_buffer_that_nobody_needs_does_no_harm(made: Made, tmp_path: Path) -> None:
    change = add("model.layers.0.self_attn.rotary_emb.inv_freq")
    fourfold.load(changed(made("qwen3_moe"), tmp_path / "old", change))


def test_fused_experts_without_a_record_are_missing(made: Made, tmp_path: Path) -> None:
    folder = changed(made("gpt_oss"), tmp_path / "foreign", lambda tensors: None)
    (folder / "quant_summary.json").unlink()
    with pytest.raises(
        SourceError, match=r"experts\.gate_up_proj: the checkpoint has no tensor for"
    ):
        fourfold.load(folder)


def test_too_little_memory_is_said_before_weights_are_read(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "memory_available", lambda: 100_000)
    with pytest.raises(
        ResourceError, match=r"of memory are needed for the whole model, 100\.0 kB are"
    ):
        fourfold.load(made("qwen3_moe"))


def test_what_is_no_checkpoint_of_ours_is_refused(written: Written, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no quantized weights"):
        fourfold.load(written("qwen3_moe")[0])
    with pytest.raises(SourceError, match="no such folder"):
        fourfold.load(tmp_path / "nowhere")


def test_broken_generation_settings_are_named(made: Made, tmp_path: Path) -> None:
    folder = changed(made("qwen3_moe"), tmp_path / "out", lambda tensors: None)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"generation_config\.json: cannot be read"):
        fourfold.load(folder)


# --- simulated activations ----------------------------------------------------------------


def scale_of(linear: str) -> float:
    """Input scales that differ from layer to layer and from site to site."""
    is_down = re.search(r"(down_proj|w2|fc2|o_proj)$", linear) is not None
    layer = int(re.search(r"(?:layers|blocks?|h)\.(\d+)\.", linear).group(1))  # type: ignore[union-attr]
    return (2 + layer) / 2688 * (0.5 if is_down else 1.5)


@pytest.fixture(scope="module")
def w4a4(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Family's name and recipe -> its W4A4 checkpoint. Tests must not write into it."""

    @cache
    def make(name: str, recipe: str = ALL) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-w4a4") / "out"
        return with_input_scales(made(name, recipe), folder, scale_of)

    return make


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_5_moe_text"])
def test_linear_layers_are_given_rounded_inputs(name: str, w4a4: Made) -> None:
    out = w4a4(name)
    tensors = tensors_of(out)
    model = fourfold.load(out, simulate_activations=True)
    seen = []

    def keep(module: nn.Linear, args: tuple[Tensor], _: object, output: Tensor) -> None:
        seen.append((module, args[0], output))

    def exact(path: str) -> Callable[..., None]:
        """Sees what the layer is given before it is rounded."""

        def hook(module: nn.Linear, args: tuple[Tensor]) -> None:
            expected = F.linear(rounded(args[0], scale_of(path)), module.weight, module.bias)
            wanted.append((module, expected))

        return hook

    wanted: list[tuple[nn.Module, Tensor]] = []
    paths = [path for path in linears_of(model) if f"{path}.weight_scale" in tensors]
    assert len(paths) > 3
    for path in paths:
        layer = model.get_submodule(path)
        layer.register_forward_pre_hook(exact(path), prepend=True)
        layer.register_forward_hook(keep, with_kwargs=True)
    logits(model)
    assert len(seen) == len(wanted) == len(paths)
    for (module, _, output), (same, expected) in zip(seen, wanted, strict=True):
        assert module is same
        assert torch.equal(output, expected)


@dataclass(frozen=True)
class Block:
    """A family's experts: the module in memory, the names of one expert, and its activation."""

    module: str
    name: str
    inner: Callable[[dict[str, Tensor]], Tensor]
    is_sent_everything: bool = False
    """Whether the module gets every token for every expert, and no routes."""


def gated(parts: dict[str, Tensor]) -> Tensor:
    return F.silu(parts["gate_proj"]) * parts["up_proj"]


def gated_by_gpt_oss(parts: dict[str, Tensor]) -> Tensor:
    gate = parts["gate_proj"].clamp(max=7.0)
    up = parts["up_proj"].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def squared(parts: dict[str, Tensor]) -> Tensor:
    return F.relu(parts["up_proj"]).square()


BLOCKS = {
    "qwen3_moe": Block("model.layers.1.mlp.experts", "model.layers.1.mlp.experts", gated),
    "gpt_oss": Block("model.layers.1.mlp.experts", "model.layers.1.mlp.experts", gated_by_gpt_oss),
    "nemotron_h": Block("model.layers.1.mixer.experts", "backbone.layers.1.mixer.experts", squared),
    "llama4": Block(
        "language_model.model.layers.1.feed_forward.experts",
        "language_model.model.layers.1.feed_forward.experts",
        gated,
        is_sent_everything=True,
    ),
}


def tame(tensors: Tensors) -> None:
    """Weights of few bits, so that every sum of products is exact in float32, in any order."""
    for linear in linears_in(tensors):
        scales = tensors[f"{linear}.weight_scale"].view(torch.uint8)
        picked = torch.tensor([0x30, 0x38, 0x40], dtype=torch.uint8)[scales.long() % 3]
        tensors[f"{linear}.weight_scale"] = picked.view(torch.float8_e4m3fn)  # 0.5, 1, 2
        tensors[f"{linear}.weight_scale_2"] = torch.tensor(2.0**-5)


def lowest_bit(values: Tensor) -> float:
    """The largest power of two that divides all values."""
    mantissa, exponent = np.frexp(values[values != 0].double().numpy())
    integer = (mantissa * 2.0**53).astype(np.int64)
    return float(np.min((integer & -integer).astype(np.float64) * 2.0 ** (exponent - 53.0)))


def product(x_I: Tensor, weight_OI: Tensor) -> Tensor:
    """Their product, exact in float32: the sum is at most 2²⁴ times the unit of its terms."""
    if not x_I.any():
        return weight_OI @ x_I
    unit = lowest_bit(x_I) * lowest_bit(weight_OI)
    assert float((weight_OI.double().abs() @ x_I.double().abs()).max()) <= 2.0**24 * unit
    return (weight_OI.double() @ x_I.double()).float()


INPUT_SCALE = 2.0**-9


def one_expert(tensors: Tensors, block: Block, expert: int, x_I: Tensor) -> Tensor:
    """What an expert makes of a token, by the definition of each step."""

    def linear(leaf: str, x_I: Tensor) -> Tensor:
        name = f"{block.name}.{expert}.{leaf}"
        sums = product(rounded(x_I, INPUT_SCALE), dequantized(tensors, name))
        bias = tensors.get(f"{name}.bias")
        return sums if bias is None else sums + bias.float()

    leaves = [
        x for x in ("gate_proj", "up_proj") if f"{block.name}.{expert}.{x}.weight" in tensors
    ]  # fmt: skip
    return linear("down_proj", block.inner({leaf: linear(leaf, x_I) for leaf in leaves}))


def experts_by_hand(tensors: Tensors, block: Block, args: tuple[Tensor, ...]) -> Tensor:
    if block.is_sent_everything:
        hidden_TH = args[0]
        count = len({name.split(".")[-2] for name in linears_in(tensors) if block.name in name})
        each = len(hidden_TH) // count
        return torch.stack(
            [one_expert(tensors, block, row // each, x) for row, x in enumerate(hidden_TH)]
        )
    hidden_TH, index_TK, weights_TK = args
    made_TKH = torch.stack(
        [
            torch.stack([one_expert(tensors, block, int(e), x) for e in index_K])
            for x, index_K in zip(hidden_TH, index_TK, strict=True)
        ]
    )
    return (made_TKH * weights_TK[..., None]).sum(dim=1)


@pytest.mark.parametrize("name", BLOCKS)
def test_experts_are_the_loop_by_hand(name: str, made: Made, tmp_path: Path) -> None:
    block = BLOCKS[name]
    tamed = changed(made(name), tmp_path / "tamed", tame)
    out = with_input_scales(tamed, tmp_path / "out", lambda linear: INPUT_SCALE)
    model = fourfold.load(out, simulate_activations=True, dtype=torch.float32)
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    experts = model.get_submodule(block.module)
    experts.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    logits(model)
    ((args, output),) = calls
    with torch.no_grad():
        expected = experts_by_hand(tensors_of(out), block, args)
    assert torch.equal(output.view(expected.shape), expected)
    model.fourfold_simulation.remove()
    logits(model)
    assert not torch.equal(calls[1][1].view(expected.shape), expected)


SIMULATED = [
    "qwen3_moe", "mixtral", "gpt_oss", "qwen3_5_moe_vl", "deepseek_v3", "granitemoe",
    "nemotron_h", "llama4", "aria", "inkling", "step3p7", "longcat_flash",
]  # fmt: skip


@pytest.mark.parametrize("name", SIMULATED)
def test_every_site_is_rounded_until_it_is_removed(name: str, made: Made, w4a4: Made) -> None:
    plain = logits(fourfold.load(made(name, ALL)))
    model = fourfold.load(w4a4(name), simulate_activations=True)
    simulation = model.fourfold_simulation
    assert not torch.equal(logits(model), plain)
    experts = [f"{path}.{x}" for path, scales in simulation.sites.experts.items() for x in scales]
    assert set(simulation.calls) == {*simulation.sites.linears, *experts}
    before = dict(simulation.calls)
    simulation.remove()
    assert torch.equal(logits(model), plain)
    assert simulation.calls == before
    simulation.remove()


def test_a_site_has_its_largest_scale(made: Made, tmp_path: Path) -> None:
    scales = {
        "q_proj": 1.0, "k_proj": 3.0, "v_proj": 2.0,
        "gate_proj": 5.0, "up_proj": 4.0, "down_proj": 7.0,
    }  # fmt: skip

    def scale(linear: str) -> float:
        expert = re.search(r"experts\.(\d)", linear)
        return scales.get(linear.rpartition(".")[2], 6.0) + (int(expert[1]) / 8 if expert else 0)

    out = with_input_scales(made("qwen3_moe", ALL), tmp_path / "out", scale)
    sites = fourfold.load(out, simulate_activations=True).fourfold_simulation.sites
    assert {sites.linears[f"model.layers.1.self_attn.{x}_proj"].scale for x in "qkv"} == {3.0}
    assert sites.linears["model.layers.1.self_attn.o_proj"] == ("nvfp4", 6.0)
    experts = sites.experts["model.layers.1.mlp.experts"]
    assert {x: experts[x].scale for x in experts} == {"gate_up": 5.375, "down": 7.375}


def test_two_models_do_not_mix(made: Made, w4a4: Made) -> None:
    plain = fourfold.load(made("qwen3_moe", ALL))
    first = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    exact, simulated = logits(plain), logits(first)
    second = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    assert torch.equal(logits(second), simulated)
    assert torch.equal(logits(first), simulated)
    first.fourfold_simulation.remove()
    assert torch.equal(logits(first), exact)
    assert torch.equal(logits(second), simulated)
    assert torch.equal(logits(plain), exact)


def test_a_third_model_does_not_take_the_place_of_the_first(w4a4: Made) -> None:
    first = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    second = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    simulated = logits(second)
    first.fourfold_simulation.remove()
    third = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    assert torch.equal(logits(second), simulated)
    assert torch.equal(logits(third), simulated)


def test_models_in_several_threads_do_not_mix(made: Made, w4a4: Made) -> None:
    models = [
        fourfold.load(w4a4("qwen3_moe"), simulate_activations=True),
        fourfold.load(w4a4("mixtral"), simulate_activations=True),
    ]
    expected = [logits(model) for model in models]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            simulated = list(pool.map(logits, models * 20))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(result, expected[n % 2]) for n, result in enumerate(simulated))


def test_a_simulated_model_cannot_be_copied(w4a4: Made) -> None:
    model = fourfold.load(w4a4("qwen3_moe"), simulate_activations=True)
    with pytest.raises(UsageError, match="A model whose activations are simulated cannot be copi"):
        copy.deepcopy(model)


def test_weights_alone_have_no_activations_to_simulate(made: Made) -> None:
    with pytest.raises(UsageError, match=r"only its weights are quantized \(W4A16\)"):
        fourfold.load(made("qwen3_moe"), simulate_activations=True)


def test_a_missing_input_scale_is_named(w4a4: Made, tmp_path: Path) -> None:
    key = f"{EXPERT}.input_scale"
    folder = changed(w4a4("qwen3_moe", EXPERTS), tmp_path / "broken", drop(key))
    with pytest.raises(SourceError, match=re.escape(f"{key}: is missing, while others that read")):
        fourfold.load(folder, simulate_activations=True)
    fourfold.load(folder)


def test_half_quantized_experts_are_refused(written: Written, w4a4: Made, tmp_path: Path) -> None:
    """Expert 3 of layer 1 as it was, the others in NVFP4."""
    _, truth = written("qwen3_moe")

    def restore(tensors: Tensors) -> None:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.3.{leaf}"
            if f"{name}.weight" in tensors:
                for part in ("weight_scale", "weight_scale_2", "input_scale"):
                    del tensors[f"{name}.{part}"]
                tensors[f"{name}.weight"] = truth.raw[f"{name}.weight"]

    folder = changed(w4a4("qwen3_moe", EXPERTS), tmp_path / "half", restore)
    with pytest.raises(ModelError, match=r"9 of 12 linear layers of its experts are quantized"):
        fourfold.load(folder, simulate_activations=True)
