# SPDX-License-Identifier: Apache-2.0
"""Proves that `fourfold.evaluate` gives the figures of the whole models, for sources and outputs of
every kind, and refuses what it cannot compare before a model runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
from families import Truth
from fourfold.embedded import heldout_text, model_dir
from fourfold.errors import SourceError, UsageError
from fourfold.evaluation.comparison import compare
from fourfold.sources.opening import open_model

from .checkpoints import (
    FP8,
    LENGTH,
    WINDOWS,
    Ran,
    change_config,
    options_for,
    write_fp8,
    write_outputs,
)

Written = Callable[[str], tuple[Path, Truth]]
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_outputs(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source predicts; the source runs in the first test that needs it."""
    return tmp_path_factory.mktemp("cache")


TOKENS = torch.tensor(list(heldout_text().encode()[: LENGTH * WINDOWS]))


def test_the_figures_are_those_of_the_whole_models(outputs: Pair, cache: Path) -> None:
    found = fourfold.evaluate(model_dir(), outputs, options_for(cache))
    source = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    for figures, out, rounds in zip(found.models, outputs, (False, True), strict=True):
        model = fourfold.load(out, dtype=torch.float32, simulate_activations=rounds)
        wanted = compare(source, model, TOKENS, LENGTH)
        assert figures.simulated is rounds
        assert figures.kl == pytest.approx(wanted.kl, rel=1e-5)
        assert figures.top1 == pytest.approx(wanted.top1_agreement)
        assert math.log2(figures.perplexity) == pytest.approx(wanted.quantized_bits, rel=1e-6)
        assert math.log2(found.perplexity) == pytest.approx(wanted.reference_bits, rel=1e-6)
        assert figures.kl_median < figures.kl_p90 < figures.kl_p99
        assert figures.kl_interval is not None
        assert figures.kl_interval[0] < figures.kl < figures.kl_interval[1]
    first, second = found.models
    assert (first.ratio, first.ratio_interval) == (None, None)
    assert second.ratio == pytest.approx(second.kl / first.kl)
    assert (found.windows, found.length, found.rest) == (WINDOWS, LENGTH, 0.0)


def test_weights_alone(outputs: Pair, cache: Path) -> None:
    options = options_for(cache)
    exact = fourfold.evaluate(model_dir(), outputs, options, simulate_activations=False)
    assert [figures.simulated for figures in exact.models] == [False, False]
    assert exact.models[0].kl == exact.models[1].kl
    with pytest.raises(UsageError, match=r"only its weights are quantized \(W4A16\)"):
        fourfold.evaluate(model_dir(), outputs[0], options, simulate_activations=True)


def test_the_layout_does_not_matter(outputs: Pair, cache: Path, tmp_path: Path) -> None:
    """But for the last digit of scales, whose reciprocals compressed-tensors stores."""
    fourfold.convert(outputs[1], tmp_path / "other", layout="compressed-tensors")
    found = fourfold.evaluate(model_dir(), [outputs[1], tmp_path / "other"], options_for(cache))
    assert found.models[1].simulated
    assert found.models[0].kl == pytest.approx(found.models[1].kl, rel=1e-4)


def test_the_likeliest_tokens_alone(outputs: Pair, cache: Path) -> None:
    whole = fourfold.evaluate(model_dir(), outputs[0], options_for(cache))
    part = fourfold.evaluate(model_dir(), outputs[0], options_for(cache, top=5))
    assert part.compared == 5
    assert 0 < part.rest < 0.5
    assert 0.3 * whole.models[0].kl < part.models[0].kl < whole.models[0].kl
    assert part.models[0].perplexity == whole.models[0].perplexity
    assert part.models[0].top5 == whole.models[0].top5
    assert part.perplexity == whole.perplexity
    assert "a lower bound" in str(part)
    assert "a lower bound" not in str(whole)


def test_a_checkpoint_of_another_tool(tmp_path: Path, cache: Path) -> None:
    """FP8, with a scale that is chosen for each input."""
    out = write_fp8(tmp_path / "fp8", FP8)
    rounded = fourfold.evaluate(model_dir(), out, options_for(cache)).models[0]
    exact = fourfold.evaluate(
        model_dir(), out, options_for(cache), simulate_activations=False
    ).models[0]
    assert (rounded.simulated, exact.simulated) == (True, False)
    assert 0 < exact.kl < rounded.kl < 1e-2


def test_a_source_that_is_quantized(outputs: Pair, tmp_path: Path) -> None:
    """It is measured by its decoded weights, as quantization reads it."""
    source = write_fp8(tmp_path / "fp8", FP8)
    options = options_for(tmp_path / "cache")
    found = fourfold.evaluate(source, [source, outputs[0]], options, simulate_activations=False)
    assert found.models[0].kl < 1e-3 * found.models[1].kl


def test_a_source_that_is_open(outputs: Pair, cache: Path, tmp_path: Path) -> None:
    """Also one whose weights are in memory: what it predicts is not kept."""
    named = fourfold.evaluate(model_dir(), outputs[0], options_for(cache))
    model = AutoModelForCausalLM.from_pretrained(model_dir())
    for source in (open_model(model_dir()), open_model(model)):
        found = fourfold.evaluate(source, outputs[0], options_for(tmp_path / "cache"))
        assert found.models[0].kl == named.models[0].kl
        assert (found.cache is None) is (source.model is not None)
        source.close()


def test_what_cannot_be_simulated_is_a_warning(written: Written, tmp_path: Path) -> None:
    source, out, data = written("deepseek_v3")[0], tmp_path / "out", tmp_path / "ids.jsonl"
    data.write_text(json.dumps({"input_ids": [*range(3, 67)]}))
    calibration = fourfold.CalibrationConfig(data, calib_size=2, calib_seq=32)
    recipe = "nvfp4_experts_only_mse-fp8_cast_kv"
    fourfold.quantize(source, out, recipe, calibration=calibration)
    options = fourfold.EvaluationConfig(data, length=32, cache=tmp_path / "cache")
    with pytest.warns(fourfold.FourfoldWarning, match="the latent cache of MLA is not simulated"):
        found = fourfold.evaluate(source, out, options)
    assert found.models[0].simulated
    assert found.models[0].kv_cache is None
    assert found.windows == 2


# --- what is refused, before a model runs -------------------------------------------------


def check_refused(error: type[Exception], message: str, source: Path, *outs: Path | str) -> None:
    ran = Ran()
    with pytest.raises(error, match=message):
        fourfold.evaluate(source, outs, options_for(source / "no-cache"), on_event=ran)
    assert ran.models == []
    assert not (source / "no-cache").exists()


def test_another_model(outputs: Pair, written: Written, tmp_path: Path) -> None:
    other = tmp_path / "other"
    fourfold.quantize(written("mixtral")[0], other, "w4a16_nvfp4_experts_only")
    source = shutil.copytree(model_dir(), tmp_path / "source")
    wanted = "other: its architecture is MixtralForCausalLM, that of .* is Qwen3MoeForCausalLM"
    check_refused(UsageError, wanted, source, outputs[0], other)
    smaller = change_config(shutil.copytree(outputs[0], tmp_path / "smaller"), vocab_size=256)
    wanted = r"smaller: its vocabulary size is 256, that of .* is 320\. Give a checkpoint that was"
    check_refused(UsageError, wanted, source, outputs[0], smaller)


def test_no_checkpoint(outputs: Pair, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir(), tmp_path / "source")
    check_refused(SourceError, "nowhere: no such folder", source, tmp_path / "nowhere")
    check_refused(SourceError, "holds no quantized weights that can be", source, model_dir())
    check_refused(UsageError, "`outs` is empty", source)
    with pytest.raises(UsageError, match="have no effect beside an EvaluationConfig"):
        fourfold.evaluate(source, outputs[0], options_for(tmp_path), windows=3)
    with pytest.raises(UsageError, match=re.escape("`outs=7`: give a quantized checkpoint's")):
        fourfold.evaluate(source, 7, "text.txt")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="nowhere: no such folder"):
        fourfold.evaluate(tmp_path / "nowhere", outputs[0], "text.txt")


def test_no_tokenizer(outputs: Pair, tmp_path: Path) -> None:
    source = shutil.copytree(model_dir(), tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    check_refused(UsageError, "tokenizer.* JSONL with input_ids needs none", source, outputs[0])
