# SPDX-License-Identifier: Apache-2.0
"""Arguments of a wrong type or shape end in our own errors, which are `ValueError`s, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourfold
from conftest import Written
from fourfold.config import CalibrationConfig, OutputConfig, Runtime
from fourfold.errors import CalibrationError, RecipeError, UsageError
from fourfold.formats import nvfp4
from fourfold.formats.nvfp4.activations import fake_quantize

W4A16, W4A4 = "w4a16_nvfp4_experts_only", "nvfp4_experts_only"


def test_argument_errors_are_value_errors() -> None:
    for error in (UsageError, RecipeError, CalibrationError):
        assert issubclass(error, ValueError)
    with pytest.raises(ValueError, match="give a whole number"):
        Runtime(threads=0)
    with pytest.raises(ValueError, match="no such recipe"):
        fourfold.Recipe.load("nonsense")


WEIGHT = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
QUANTIZED = nvfp4.quantize(WEIGHT)
PARTS = QUANTIZED.codes, QUANTIZED.block_scale


@pytest.mark.parametrize(
    "scale", [torch.ones(2), torch.ones(0), torch.ones(4, 1), "x", "1", [1.0], object(), 1j, b"1"]
)
@pytest.mark.parametrize(
    "call",
    [
        lambda scale: nvfp4.quantize(WEIGHT, global_scale=scale),
        lambda scale: nvfp4.dequantize(*PARTS, scale),
        lambda scale: nvfp4.error_energy(WEIGHT, *PARTS, scale),
        lambda scale: fake_quantize(WEIGHT, scale),
        nvfp4.global_scale,
    ],
)
def test_a_scale_is_one_number(call: Callable[[Any], object], scale: object) -> None:
    with pytest.raises(UsageError, match=r"is one number, not a tensor|is a number or a tensor"):
        call(scale)


@pytest.mark.parametrize("scale", [1e-3, torch.tensor(1e-3), torch.tensor([1e-3])])
def test_a_tensor_with_one_element_is_one_number(scale: Any) -> None:
    tensor = nvfp4.quantize(WEIGHT, global_scale=scale)
    assert tensor.global_scale.shape == ()
    assert torch.equal(nvfp4.dequantize(*PARTS, scale), nvfp4.dequantize(*PARTS, 1e-3))


def test_what_is_no_weight() -> None:
    for weight in ([[1.0] * 16], None, torch.ones(2, 16, dtype=torch.int32), WEIGHT.numpy()):
        with pytest.raises(UsageError, match="is not a weight that can be quantized"):
            nvfp4.quantize(weight)
    out = torch.empty(4, 16, dtype=torch.uint8), torch.empty(4, 2, dtype=torch.uint8)
    with pytest.raises(UsageError, match=r"needs float32 \[4\], one for each weight, got None"):
        nvfp4.quantize_batch_into(WEIGHT, *out, scale="max", global_scales=1.0)


WRONG: list[tuple[str, Callable[[Path, Path], object]]] = [
    ("`recipe=5`", lambda model, _: fourfold.plan(model, 5)),
    ("`recipe=None`", lambda model, out: fourfold.quantize(model, out, None)),
    ("`out=None`", lambda model, _: fourfold.quantize(model, None, W4A16)),
    ("`calibration=3`", lambda model, out: fourfold.quantize(model, out, W4A4, calibration=3)),
    ("`calibration={", lambda model, out: fourfold.quantize(model, out, W4A4, calibration={})),
    ("`calib=3`", lambda model, out: fourfold.quantize(model, out, W4A4, calibration=[3])),
    ("`calib=5`", lambda *_: CalibrationConfig(calib=5)),
    ("`statistics=5`", lambda *_: CalibrationConfig(statistics=5)),
    ("`runtime={", lambda model, out: fourfold.quantize(model, out, W4A16, runtime={"a": 1})),
    ("`output={", lambda model, out: fourfold.quantize(model, out, W4A16, output={"a": 1})),
    ("`overwrite='yes'`", lambda *_: OutputConfig(overwrite="yes")),
    ("`strict=1`", lambda *_: OutputConfig(strict=1)),
    ("`device=5`", lambda *_: Runtime(device=5)),
    ("`on_event=5`", lambda model, out: fourfold.quantize(model, out, W4A16, on_event=5)),
    ("`forward_loop=5`", lambda model, out: fourfold.quantize(model, out, W4A4, forward_loop=5)),
    ("int: is no model", lambda _, out: fourfold.quantize(5, out, W4A16)),
    ("`out=5`", lambda *_: fourfold.verify(5)),
    ("`out=5`", lambda *_: fourfold.load(5)),
    ("`device='foo'`", lambda model, _: fourfold.load(model, device="foo")),
    ("`out=5`", lambda *_: fourfold.generate(5, "a")),
    ("`prompt=5`", lambda model, _: fourfold.generate(model, 5)),
    ("temperature x", lambda model, _: fourfold.generate(model, "a", temperature="x")),
    ("max_new_tokens x", lambda model, _: fourfold.generate(model, "a", max_new_tokens="x")),
    ("`folders='abc'`", lambda _, out: fourfold.merge("abc", out)),
    ("`folders=5`", lambda _, out: fourfold.merge([5], out)),
]


@pytest.mark.parametrize(("words", "call"), WRONG, ids=[words for words, _ in WRONG])
def test_wrong_types(
    words: str, call: Callable[[Path, Path], object], written: Written, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(words)}.*(give|Give)") as caught:
        call(written("qwen3_moe")[0], tmp_path / "out")
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loop", [5, "data.jsonl", [[1, 2]], torch.ones(2)])
def test_a_forward_loop_that_is_not_callable(
    loop: object, written: Written, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(written("qwen3_moe")[0])
    with pytest.raises(UsageError, match=r"(?s)^`forward_loop=.*give a function that calls"):
        fourfold.quantize(model, tmp_path / "out", W4A4, forward_loop=loop)
    with pytest.raises(UsageError, match=r"^`tokenizer=5`: give an object"):
        fourfold.quantize(model, tmp_path / "out", W4A16, tokenizer=5)
    assert not (tmp_path / "out").exists()
