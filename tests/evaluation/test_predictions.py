# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold eval` measures the whole models although it holds one layer of them: the
logits of source and output are those of transformers and of `fourfold.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fourfold
from families import FAMILIES, LAYOUTS, Truth, mostly_slow, quiet, read_back
from fourfold.config import OutputConfig
from fourfold.evaluation.loading import OpenedModel
from fourfold.evaluation.predictions import Predictor
from fourfold.evaluation.simulated_activations import is_rounded
from fourfold.events import Event, WindowEvaluated
from fourfold.models.internals import runnable
from fourfold.sources.decoded import open_decoded
from fourfold.sources.safetensors import open_source
from fourfold.storage.source import Source
from nvfp4_folders import with_input_scales

Written = Callable[[str], tuple[Path, Truth]]

WRITES_NO_TEXT = {
    "openai_privacy_filter": "it classifies tokens",
    "switch_transformers": "it has an encoder",
    "nllb_moe": "it has an encoder",
    "diffusion_gemma": "it has an encoder",
}

REFUSED = {"jetmoe", "longcat_flash_zero"}
"""Families whose experts cannot be cut out, or that transformers itself does not load."""

NAMES = [
    name
    for name, family in FAMILIES.items()
    if not family.why_not and not family.load_error and name not in {*WRITES_NO_TEXT, *REFUSED}
]

IDS_NW = torch.randint(3, 90, (3, 19), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Family's name -> its experts in NVFP4 with rounded inputs."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        options = OutputConfig(verify=False)
        fourfold.quantize(
            written(name)[0], folder / "w4a16", "w4a16_nvfp4_experts_only", output=options
        )
        return with_input_scales(folder / "w4a16", folder / "w4a4", lambda _: 6 / 2688)

    return make


def by_whole(model: nn.Module) -> list[Tensor]:
    with torch.no_grad(), quiet():
        return [
            runnable(model)(input_ids=ids_W[None], use_cache=False).logits[0] for ids_W in IDS_NW
        ]


def opened_model(source: Source) -> OpenedModel:
    return OpenedModel(source, dtype=torch.float32, reads_text_once=True)


def by_layers(opened: OpenedModel, **options: object) -> list[Tensor]:
    logits: dict[int, Tensor] = {}
    predictor = Predictor(IDS_NW, 1, **options)
    predictor.run("model", opened, lambda window, x: logits.update({window: x.clone()}))
    return [logits[window] for window in range(len(IDS_NW))]


def check_same(streamed: list[Tensor], whole: list[Tensor]) -> None:
    for mine, theirs in zip(streamed, whole, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(NAMES, "deepseek_v3", "nemotron_h", "gemma4"))
def test_a_source_predicts_what_transformers_does(name: str, written: Written) -> None:
    folder = written(name)[0]
    model, _ = read_back(FAMILIES[name], folder, dtype=torch.float32)
    opened = opened_model(open_source(folder))
    check_same(by_layers(opened), by_whole(model.eval()))


WITH_EXPERTS = [name for name in NAMES if FAMILIES[name].layout != "dense"]


@pytest.mark.parametrize("name", mostly_slow(WITH_EXPERTS, "deepseek_v3", "nemotron_h", "gemma4"))
def test_an_output_predicts_what_load_does(name: str, made: Callable[..., Path]) -> None:
    """With rounded inputs, which differ from exact ones."""
    out = made(name)
    checkpoint = open_decoded(out, dtype=torch.float32)
    assert is_rounded(checkpoint)
    opened = opened_model(checkpoint)
    with opened.simulate_activations(checkpoint):
        streamed = by_layers(opened)
    model = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
    check_same(streamed, by_whole(model))
    model.fourfold_simulation.remove()
    pairs = zip(streamed, by_whole(model), strict=True)
    assert any(float((mine - exact).abs().max()) > 1e-3 for mine, exact in pairs)


def test_a_rounded_kv_cache(written: Written, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": IDS_NW.flatten().tolist()}))
    calibration = fourfold.CalibrationConfig(data, calib_size=1, calib_seq=32)
    recipe = "nvfp4_experts_only_mse-fp8_cast_kv"
    fourfold.quantize(written("qwen3_moe")[0], out, recipe, calibration=calibration)
    checkpoint = open_decoded(out, dtype=torch.float32)
    opened = opened_model(checkpoint)
    with opened.simulate_activations(checkpoint) as simulation:
        streamed = by_layers(opened)
        assert simulation.calls["model.layers.0.kv"] == len(IDS_NW)
    model = fourfold.load(out, dtype=torch.float32, simulate_activations=True)
    check_same(streamed, by_whole(model))


@pytest.mark.parametrize("limit", [0, 3000])
def test_hidden_states_may_wait_in_a_file(limit: int, written: Written, tmp_path: Path) -> None:
    source = open_source(written("qwen3_moe")[0])
    opened = opened_model(source)
    in_memory = by_layers(opened, activation_memory=1 << 30)
    for mine, theirs in zip(
        by_layers(opened, activation_memory=limit, scratch=tmp_path), in_memory, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_one_layer_holds_weights_at_a_time(written: Written) -> None:
    """Embeddings are there before the first layer, the head with the last."""
    opened = opened_model(open_source(written("qwen3_moe")[0]))
    model, events, loaded = opened.model, list[WindowEvaluated](), set[tuple[str, ...]]()
    parts = {"embedding": model.model.embed_tokens, "head": model.lm_head}
    parts |= {f"layer {number}": layer for number, layer in enumerate(opened.streamed.layers)}

    def look(event: Event) -> None:
        assert isinstance(event, WindowEvaluated)
        events.append(event)
        states = {
            name: {value.is_meta for value in part.parameters()} for name, part in parts.items()
        }
        loaded.add(tuple(name for name, is_meta in states.items() if is_meta == {False}))

    embedded: list[bool] = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, _: embedded.append(not module.weight.is_meta)
    )
    by_layers(opened, on_event=look)
    assert embedded == [True] * len(IDS_NW)
    last = len(opened.streamed.layers) - 1
    assert loaded == {
        *((f"layer {number}",) for number in range(last)),
        ("head", f"layer {last}"),
        (),
    }
    assert all(value.is_meta for value in model.parameters())
    assert events[-1].windows_done == events[-1].windows_total == (last + 1) * len(IDS_NW)


@pytest.mark.parametrize("name", ["openai_privacy_filter", "switch_transformers"])
def test_models_that_do_not_predict_the_next_token(name: str, written: Written) -> None:
    opened = opened_model(open_source(written(name)[0]))
    with pytest.raises(fourfold.ModelError, match=r"Only models that .* can be measured\."):
        by_layers(opened)


def test_the_families_that_are_taken_are_many() -> None:
    assert {*LAYOUTS} <= {*NAMES}
    assert len(NAMES) > 60
