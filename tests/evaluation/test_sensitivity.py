# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold sensitivity` measures what each component of a model costs: the KL of a
transformers model in memory with that component exchanged, whatever the other variants are."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fourfold
from conftest import Written
from families import mostly_slow, quiet
from fourfold.config import EvaluationConfig
from fourfold.documents import DOCUMENTS
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import ResourceError
from fourfold.evaluation.comparison import compare
from fourfold.evaluation.sensitivity import (
    LEAST_TOKENS,
    MOST_TOKENS,
    ComponentFigures,
    OptionFigures,
    Sensitivity,
    cost_of_token,
    tokens_within,
)
from fourfold.evaluation.variants import Variants, check_memory
from fourfold.formats.nvfp4.activations import fake_quantize
from fourfold.planning import Plan, make_plan
from fourfold.planning.components import Component, components_of
from fourfold.recipes import Recipe
from fourfold.sources.opening import open_model
from fourfold.storage.source import Source
from test_cli import in_process, options_of

from .checkpoints import HELDOUT
from .test_predictions import NAMES

LENGTH, WINDOWS = 64, 2
TOKENS = torch.tensor(list(heldout_text().encode()[: LENGTH * WINDOWS]))
W4A4 = Recipe(
    name="w4a4",
    weights={"scale": "mse"},
    activations={"format": "nvfp4"},
    quantize_if_present=["experts", "shared_experts", "mlp", "attention", "linear_attention"],
)
EVERY_ROLE = "w4a16_nvfp4_default_mse"
LAYER = 1
ATTENTION = f"model.layers.{LAYER}.self_attn"


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    config = EvaluationConfig(HELDOUT, length=LENGTH, windows=WINDOWS)
    return fourfold.sensitivity(model_dir(), config, W4A4, candidates=["w4a16", "fp8"])


# --- the same, in memory ------------------------------------------------------------------


def reference_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """All weights in NVFP4, from a written checkpoint."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    fourfold.quantize(model_dir(), out, EVERY_ROLE)
    return fourfold.load(out, dtype=torch.float32)


def run_experts(
    module: Any, round_in: Any, round_mid: Any, hidden_TH: Tensor, index_TK: Tensor, p_TK: Tensor
) -> Tensor:
    """The experts one after the other."""
    out_TH = torch.zeros_like(hidden_TH)
    for expert in range(len(module.down_proj)):
        token_R, place_R = torch.where(index_TK == expert)
        gate, up = (round_in(hidden_TH[token_R]) @ module.gate_up_proj[expert].T).chunk(2, -1)
        rows = round_mid(F.silu(gate) * up) @ module.down_proj[expert].T
        out_TH.index_add_(0, token_R, rows * p_TK[token_R, place_R, None])
    return out_TH


class Largest:
    """Notes the largest magnitude, and changes nothing."""

    def __init__(self) -> None:
        self.amax = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        self.amax = max(self.amax, float(x.abs().max())) if x.numel() else self.amax
        return x


@cache
def amaxes() -> dict[str, float]:
    """The largest inputs of a layer in the source, over the windows."""
    model, largest = reference_model(), [Largest() for _ in range(4)]
    layer = model.model.layers[LAYER]
    hook_inputs(layer.self_attn.q_proj, largest[0])
    hook_inputs(layer.self_attn.o_proj, largest[1])
    layer.mlp.experts.forward = partial(run_experts, layer.mlp.experts, *largest[2:])
    compare(model, model, TOKENS, LENGTH)
    return dict(zip(("qkv", "o", "gate_up", "down"), (x.amax for x in largest), strict=True))


def hook_inputs(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_pre_hook(lambda _, args: (change(args[0]),))


def to_fp8(x: Tensor, amax: float) -> Tensor:
    scale = torch.tensor(amax) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def exchanged(model: Any, component: str, option: str, quantized: Any) -> Any:
    """`model` with one component of a layer in another format."""

    def change(input_of: str) -> Callable[[Tensor], Tensor]:
        amax = amaxes()[input_of]
        if option == "recipe":
            return lambda x: fake_quantize(x, amax / 2688)
        return partial(to_fp8, amax=amax) if option == "fp8" else lambda x: x

    layer, theirs = model.model.layers[LAYER], quantized.model.layers[LAYER]
    if component == "experts":
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(experts, name).data
            for expert, of_expert in enumerate(getattr(theirs.mlp.experts, name).data):
                if option == "fp8":
                    amax = float(weights[expert].abs().max())
                    of_expert = to_fp8(weights[expert], amax)
                weights[expert] = of_expert
        experts.forward = partial(run_experts, experts, change("gate_up"), change("down"))
        return model
    names = ["o_proj"] if component == "o" else ["q_proj", "k_proj", "v_proj"]
    linears = [getattr(layer.self_attn, name) for name in names]
    amax = max(float(linear.weight.data.abs().max()) for linear in linears)
    for name, linear in zip(names, linears, strict=True):
        values = getattr(theirs.self_attn, name).weight.data
        linear.weight.data = to_fp8(linear.weight.data, amax) if option == "fp8" else values
        hook_inputs(linear, change(component))
    return model


@pytest.mark.parametrize("option", ["recipe", "w4a16", "fp8"])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("qkv", f"{ATTENTION}.{{k,q,v}}_proj"),
        ("o", f"{ATTENTION}.o_proj"),
        ("experts", f"model.layers.{LAYER}.mlp.experts"),
    ],
)
def test_a_part_is_exchanged_alone(
    component: str, name: str, option: str, measured: Sensitivity, quantized: nn.Module
) -> None:
    model = exchanged(reference_model(), component, option, quantized)
    wanted = compare(reference_model(), model, TOKENS, LENGTH).kl
    [component] = [component for component in measured.components if component.component == name]
    [figures] = [figures for figures in component.options if figures.option == option]
    assert figures.kl == pytest.approx(wanted, rel=1e-3)


def test_the_whole(measured: Sensitivity) -> None:
    assert len(measured.components) == 12
    assert sum(component.weights for component in measured.components) == 4 * (
        16 * 3 * 128 * 64 + 3 * 128 * 128
    )
    components = sum(component.options[0].kl for component in measured.components)
    assert 0 < measured.together < components
    bits = {x.option: x.bits for x in measured.components[0].options}
    assert bits["recipe"] == pytest.approx(4.5, abs=0.01)
    assert bits["fp8"] == pytest.approx(8, abs=0.01)
    assert not measured.is_estimate


# --- variants that share layers -----------------------------------------------------------


def variants_of(
    source: Source, plan: Plan, components: list[Component], **options: Any
) -> Variants:
    windows = torch.randint(3, 90, (2, 19), generator=torch.Generator().manual_seed(0))
    return Variants(plan, source, components, list(windows), threads=1, **options)


def some_variants(components: list[Component]) -> list[dict[str, str]]:
    """Units of the first and of the last layer alone, all of them, and none."""
    ends = {components[0].layer, components[-1].layer}
    alone = [
        {component.name: option}
        for component in components
        for option in ("recipe", "fp8", "mxfp8")
        if component.layer in ends and component.has(option)
    ]
    return [*alone, {component.name: "recipe" for component in components}, {}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", mostly_slow(NAMES))
def test_a_variant_costs_the_same_beside_others_and_alone(name: str, written: Written) -> None:
    with quiet(), closing(open_model(written(name)[0])) as source:
        try:
            plan = make_plan(source, W4A4)
        except fourfold.PlanError:  # its other linear layers do not divide into blocks
            plan = make_plan(source, Recipe(weights={"scale": "mse"}, quantize=["experts"]))
        components = components_of(plan)
        assert len({component.name for component in components}) == len(components)
        variants = some_variants(components)
        sharing = variants_of(source, plan, components)
        beside = sharing.measure(variants, "beside")
        alone = variants_of(source, plan, components, shares=False).measure(variants, "alone")
    assert sharing.shares
    for one, other in zip(beside, alone, strict=True):
        assert one.kl_of_windows.tolist() == other.kl_of_windows.tolist()
    assert beside[-1].kl_of_windows.tolist() == [0, 0]
    assert all(x.kl_of_windows.min() > 0 for x in beside[:-1])


def test_layers_that_change_something_else_are_not_shared() -> None:
    """Here the second layer is called with what the first one has left behind."""

    def measure(**options: Any) -> tuple[bool, list[float]]:
        with closing(open_model(model_dir())) as source:
            plan = make_plan(source, W4A4)
            components = components_of(plan)
            variants = variants_of(source, plan, components, **options)
            first, second = variants.opened.streamed.layers[:2]
            left: list[float] = []
            first.mlp.register_forward_hook(lambda *_: left.append(1.5))
            second.register_forward_pre_hook(
                lambda _, args: (args[0] * (left.pop() if left else 1.0), *args[1:])
            )
            last = [{component.name: "recipe"} for component in components if component.layer == 3]
            return variants.shares, [
                float(x.kl_of_windows.mean()) for x in variants.measure(last, "last")
            ]

    _, figures = measure()
    assert figures == measure(shares=False)[1]


def test_the_tokens_that_are_read() -> None:
    with closing(open_model(model_dir())) as source:
        plan = make_plan(source, W4A4)
        components = components_of(plan)
        layer = 3 * 128 * 128 + 16 * 128 + 3 * 128 * 64 * 2  # a router; two of 16 experts
        assert cost_of_token(plan, []) == 4 * layer
        assert cost_of_token(plan, [components[0], components[-1]]) == (2 + 2 + 2 + 3) * layer
    assert tokens_within(1) == MOST_TOKENS
    assert tokens_within(1e10, limit=1e13) == 1000
    assert tokens_within(1e18) == LEAST_TOKENS


# --- the command --------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys) -> Run:
    return partial(in_process, monkeypatch, capsys, "sensitivity")


def test_memory_is_checked_before_anything_is_read() -> None:
    """A layer in BF16 and three in float32, and what is outside of layers, counted by hand."""
    with closing(open_model(model_dir())) as source:
        plan = make_plan(source, W4A4)
        layers = [0] * len(plan.inventory.layer_paths)
        outside = 0
        for raw in plan.inventory.tensors.values():
            if raw.layer is None:
                outside += raw.info.numel
            else:
                layers[raw.layer] += raw.info.numel
        needed = 4 * outside + (2 + 3 * 4) * max(layers)
        check_memory(plan, available=needed)
        with pytest.raises(ResourceError, match=r"are needed on 2 ranks to measure .* are avail"):
            check_memory(plan, processes=2, available=2 * needed - 1)
        check_memory(plan, "cuda:0", available=0)


def test_options() -> None:
    options = """
        source --text -t --recipe -r --candidates --length --windows --tokens --device
        --activation-memory --threads --hf-config --dtype --trust-remote-code --quiet -q --log-file
        --json
    """
    assert options_of("sensitivity") == set(options.split())


def test_figures_as_text_and_as_json(run: Run, measured: Sensitivity, tmp_path: Path) -> None:
    recipe = tmp_path / "w4a4.yaml"
    recipe.write_text(W4A4.to_yaml())
    arguments = [model_dir(), "-t", HELDOUT, "-r", recipe, "--candidates", "w4a16,fp8"]
    arguments += ["--length", LENGTH, "--windows", WINDOWS]
    code, text, err = run(*arguments)
    assert (code, err) == (0, "")
    assert text.splitlines() == str(measured).splitlines()
    code, text, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    values = json.loads(text)
    assert DOCUMENTS["sensitivity"](**values).model_dump(mode="json") == values
    assert values["components"] == json.loads(json.dumps(measured.to_dict()["components"]))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-t", "nowhere.txt"], 2, "nowhere.txt: no such file."),
        (["-t", HELDOUT, "--candidates", "fp9"], 2, "--candidates: 'fp9' is no candidate; known:"),
        (["-t", HELDOUT, "--candidates", "fp8,fp8"], 2, "--candidates: 'fp8' is given twice"),
        (["-t", HELDOUT, "--length", "4096"], 2, "Give --length 2048 or less."),
        (["-t", HELDOUT, "-r", "nothing"], 2, "nothing: no such recipe"),
        ([], 2, "Missing option '--text'"),
    ],
)
def test_errors(arguments: list[object], code: int, message: str, run: Run) -> None:
    exit_code, text, err = run(model_dir(), *arguments)
    assert (exit_code, text) == (code, "")
    assert message in err
    assert len(err.splitlines()) <= 4


def test_the_text() -> None:
    options = (
        OptionFigures("recipe", "NVFP4 W4A4", 4.5, 0.02, (0.01, 0.03)),
        OptionFigures("fp8", "FP8", 8.0, 0.001, None),
    )
    components = (
        ComponentFigures("layers.0.mlp.experts", "experts", 0, 393_216, options),
        ComponentFigures("layers.0.o_proj", "attention", 0, 4096, options[:1]),
    )
    result = Sensitivity("model", "mine", "text.txt", "00", 1, 256, True, 0.03, components, 1.0)
    assert str(result).splitlines() == [
        "model, recipe mine: KL of each component alone on 1 windows of 256 tokens from text.txt",
        "component             weights  NVFP4 W4A4       FP8",
        "layers.0.mlp.experts  393,216    2.00e-02  1.00e-03",
        "layers.0.o_proj         4,096    2.00e-02",
        "KL in nats a token; weights that need statistics of inputs are measured with `mse`",
        "all components as the recipe has them: 3.000e-02 together, 4.000e-02 as a sum",
        "an estimate: 256 tokens, because the model is large (`tokens` reads more)",
    ]
